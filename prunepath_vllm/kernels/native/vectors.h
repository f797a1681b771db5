// Vectors and element types, for the instruction set this file is compiled for.
//
// Everything is in an anonymous namespace, and nothing of the standard library with inline bodies is used: the same
// code is compiled several times with different instructions, and the linker would merge equally named functions.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

#include "interface.h"

namespace {

#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX2__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif
constexpr int BLOCK = 2 * WIDTH;     // elements that are loaded at once
using Tokens = uint64_t;             // a set of those that are computed at once
constexpr int MOST_MASKED = 64;      // so many, at most

// Up to whole blocks.
int64_t padded(int64_t n) { return (n + BLOCK - 1) / BLOCK * BLOCK; }

typedef float Floats __attribute__((vector_size(WIDTH * 4)));
typedef int32_t Ints __attribute__((vector_size(WIDTH * 4)));
typedef uint32_t Bits __attribute__((vector_size(WIDTH * 4)));
typedef int8_t Bytes __attribute__((vector_size(WIDTH)));

#define INLINE inline __attribute__((always_inline))

template <class V>
INLINE V load(const void* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

template <class V>
INLINE void store(void* p, V v) {
    std::memcpy(p, &v, sizeof v);
}

INLINE Floats splat(float v) { return v - Floats{}; }  // not v + 0, which would turn -0 into 0

// Halves are added to halves.
template <int LANES = WIDTH, class V>
INLINE float sum(V v) {
    if constexpr (LANES == 1) {
        return v;
    } else if constexpr (LANES == 2) {
        return v[0] + v[1];
    } else {
        typedef float Half __attribute__((vector_size(LANES * 2)));
        Half halves[2];
        std::memcpy(halves, &v, sizeof v);
        return sum<LANES / 2>(halves[0] + halves[1]);
    }
}

INLINE float from_bits(uint32_t bits) { return load<float>(&bits); }
INLINE uint32_t to_bits(float v) { return load<uint32_t>(&v); }

// e^v to a few units in the last place; infinity above 88.72, as in float32, 0 below -87.3.
INLINE Floats exponential(Floats v) {
    const Floats magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    Floats low = splat(-87.3f), high = splat(88.72283f);
    Floats x = v < low ? low : v;
    x = x > high ? high : x;
    Floats shifted = x * 1.44269504f + magic;
    Floats n = shifted - magic;
    Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Floats p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    // In two steps: 2^128 is no float32.
    Ints exponent = (Ints)shifted - (Ints)magic;
    Ints half = exponent >> 1;
    p = p * (Floats)((half + 127) << 23) * (Floats)((exponent - half + 127) << 23);
    p = v > high ? splat(__builtin_inff()) : p;
    return v < low ? Floats{} : p;
}

INLINE Floats sigmoid(Floats v) { return 1.0f / (1.0f + exponential(-v)); }

INLINE float half_to_float(uint16_t h) {
    // Exponent moved by a multiplication, which is right for subnormal numbers, too.
    const float scaled = from_bits((uint32_t)(h & 0x7fff) << 13) * 0x1p112f;
    const bool special = (h & 0x7c00) == 0x7c00;  // infinity or NaN
    const uint32_t bits = special ? 0x7f800000u | (uint32_t)(h & 0x3ff) << 13 : to_bits(scaled);
    return from_bits(bits | (uint32_t)(h & 0x8000) << 16);
}

INLINE uint16_t float_to_half(float v) {
    const uint32_t sign = to_bits(v) >> 16 & 0x8000;
    const uint32_t bits = to_bits(v) & 0x7fffffff;
    if (bits > 0x7f800000) return sign | 0x7e00;
    if (bits >= 0x477ff000) return sign | 0x7c00;  // 65520 and above round to infinity
    if (bits < 0x38800000)                         // subnormal: adding .5 rounds at a half's last place
        return sign | (to_bits(from_bits(bits) + 0.5f) - 0x3f000000);
    return sign | ((bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13);
}

INLINE uint16_t float_to_bfloat(float v) {
    const uint32_t bits = to_bits(v);
    if ((bits & 0x7fffffff) > 0x7f800000) return bits >> 16 | 0x40;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// float_to_bfloat() of every element, as float32.
INLINE Floats round_to_bfloat(Floats v) {
    const Bits bits = (Bits)v;
    const Bits rounded = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
    return v == v ? (Floats)rounded : v;
}

// A vector as elements of float32, float16 or bfloat16.
INLINE void narrow(Floats v, int32_t type, void* to) {
    typedef uint16_t Halves __attribute__((vector_size(WIDTH * 2)));
    if (type == FLOAT32)
        store(to, v);
    else if (type == BFLOAT16)
        store(to, __builtin_convertvector((Bits)round_to_bfloat(v) >> 16, Halves));
    else
        for (int i = 0; i < WIDTH; i++) ((uint16_t*)to)[i] = float_to_half(v[i]);
}

INLINE float element(const void* p, int32_t type, int64_t i) {
    switch (type) {
        case FLOAT32: return ((const float*)p)[i];
        case FLOAT16: return half_to_float(((const uint16_t*)p)[i]);
        case BFLOAT16: return from_bits((uint32_t)((const uint16_t*)p)[i] << 16);
        default: return ((const int8_t*)p)[i];
    }
}

// Element types. `widen` gives a block as two vectors, in an order of the type's own: bfloat16 takes two instructions
// if even and odd elements come apart. An input or output of the products is kept in that order as well (`slot`).
// An `Input` is what a row is multiplied with: float32, or bfloat16 where the processor multiplies it.

struct Float32 {
    using Stored = float;
    using Input = float;
    static constexpr float UNIT = 1;
    static INLINE int64_t slot(int64_t i) { return i; }
    static INLINE void widen(const Stored* p, Floats& a, Floats& b) {
        a = load<Floats>(p);
        b = load<Floats>(p + WIDTH);
    }
};

struct Float16 {
    using Stored = uint16_t;
    using Input = float;
    static constexpr float UNIT = 1;
    static INLINE int64_t slot(int64_t i) { return i; }
    static INLINE void widen(const Stored* p, Floats& a, Floats& b) {
#if defined(__AVX512F__)
        a = (Floats)_mm512_cvtph_ps(load<__m256i>(p));
        b = (Floats)_mm512_cvtph_ps(load<__m256i>(p + WIDTH));
#elif defined(__AVX2__)
        a = (Floats)_mm256_cvtph_ps(load<__m128i>(p));
        b = (Floats)_mm256_cvtph_ps(load<__m128i>(p + WIDTH));
#elif defined(__ARM_FP16_FORMAT_IEEE)
        const __fp16* halves = (const __fp16*)p;
        for (int i = 0; i < WIDTH; i++) a[i] = halves[i], b[i] = halves[WIDTH + i];
#else
        float wide[BLOCK];
        for (int i = 0; i < BLOCK; i++) wide[i] = half_to_float(p[i]);
        a = load<Floats>(wide);
        b = load<Floats>(wide + WIDTH);
#endif
    }
};

struct BFloat16 {
    using Stored = uint16_t;
    using Input = float;
    static constexpr float UNIT = 1;
    static INLINE int64_t slot(int64_t i) { return i / BLOCK * BLOCK + i % BLOCK / 2 + i % 2 * WIDTH; }
    static INLINE void widen(const Stored* p, Floats& a, Floats& b) {
        const Bits pairs = load<Bits>(p);
        a = (Floats)(pairs << 16);
        b = (Floats)(pairs & 0xffff0000u);
    }
};

struct Int8 {
    using Stored = int8_t;
    using Input = float;
    static constexpr float UNIT = 1;
    static INLINE int64_t slot(int64_t i) { return i; }
    static INLINE void widen(const Stored* p, Floats& a, Floats& b) {
#if defined(__AVX512F__)
        a = (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load<__m128i>(p)));
        b = (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load<__m128i>(p + WIDTH)));
#elif defined(__AVX2__)
        const __m128i bytes = load<__m128i>(p);
        a = (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
        b = (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)));
#else
        a = __builtin_convertvector(__builtin_convertvector(load<Bytes>(p), Ints), Floats);
        b = __builtin_convertvector(__builtin_convertvector(load<Bytes>(p + WIDTH), Ints), Floats);
#endif
    }
};

#if !defined(__AVX2__)
struct Float8Values {
    float of[256];
    constexpr Float8Values() : of() {
        for (int byte = 0; byte < 256; byte++) {
            const int exponent = byte >> 3 & 15, mantissa = byte & 7;
            float v = (exponent ? 8 + mantissa : mantissa) / 131072.0f;  // of the lowest exponent, over UNIT
            for (int i = 1; i < exponent; i++) v *= 2;
            of[byte] = byte & 128 ? -v : v;
        }
    }
};
constexpr Float8Values float8_values;
#endif

// Exponent and mantissa have the places of a float16's, whose exponent counts from 8 lower: 2^8 is left to the scale.
// NaN, which no checkpoint holds, is read as 480.
struct Float8 {
    using Stored = uint8_t;
    using Input = float;
    static constexpr float UNIT = 256;
    static INLINE int64_t slot(int64_t i) { return i; }
    static INLINE void widen(const Stored* p, Floats& a, Floats& b) {
#if defined(__AVX512F__)
        a = (Floats)_mm512_cvtph_ps(halves(p));
        b = (Floats)_mm512_cvtph_ps(halves(p + WIDTH));
#elif defined(__AVX2__)
        const __m256i both = halves(p);
        a = (Floats)_mm256_cvtph_ps(_mm256_castsi256_si128(both));
        b = (Floats)_mm256_cvtph_ps(_mm256_extracti128_si256(both, 1));
#else
        for (int i = 0; i < WIDTH; i++) a[i] = float8_values.of[p[i]], b[i] = float8_values.of[p[WIDTH + i]];
#endif
    }
#if defined(__AVX2__)
    static INLINE __m256i halves(const Stored* p) {
        const __m256i bits = _mm256_slli_epi16(_mm256_cvtepi8_epi16(load<__m128i>(p)), 7);
        return _mm256_and_si256(bits, _mm256_set1_epi16((short)0xbf80));  // the sign came twice
    }
#endif
};

}  // namespace
