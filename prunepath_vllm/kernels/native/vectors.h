// Vectors, element types, and the two products, for the instruction set this file is compiled for.
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

// acc += the products of a block. The order of the additions is part of a token's result, so it is the same for any
// number of rows and tokens at once.
template <class Type>
INLINE Floats multiply(Floats acc, const Floats (&w)[2], const float* x) {
    acc = w[0] * load<Floats>(x) + acc;
    return w[1] * load<Floats>(x + WIDTH) + acc;
}

template <class Type>
INLINE void fetch(Floats (&w)[2], const typename Type::Stored* row) {
    Type::widen(row, w[0], w[1]);
}

#if defined(__AVX512BF16__)
template <class Type>
struct Pairs : Type {  // both factors in bfloat16, which holds int8 and float8 exactly
    using Input = uint16_t;
};

template <class Type>
INLINE Floats multiply(Floats acc, const __m512i (&w)[1], const uint16_t* x) {
    return (Floats)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w[0], (__m512bh)load<__m512i>(x));
}

template <class Type>
INLINE void fetch(__m512i (&w)[1], const typename Type::Stored* row) {
    if constexpr (sizeof(typename Type::Stored) == sizeof(uint16_t)) {
        w[0] = load<__m512i>(row);
    } else {
        Floats a, b;
        Type::widen(row, a, b);
        w[0] = (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
    }
}
#endif

template <class Input>
struct Fetched {
    using Array = Floats[2];
};
#if defined(__AVX512BF16__)
template <>
struct Fetched<uint16_t> {
    using Array = __m512i[1];
};
#endif

// Whether what a row is multiplied with is bfloat16, activations included.
template <class Type>
constexpr bool ROUNDED = sizeof(typename Type::Input) == sizeof(uint16_t);

// The end of a row, copied and filled up with zeros.
template <class Stored>
INLINE const Stored* whole_block(const Stored* from, int64_t count, Stored* to) {
    std::memset(to, 0, BLOCK * sizeof(Stored));
    std::memcpy(to, from, count * sizeof(Stored));
    return to;
}

// f(Index<0>), f(Index<1>), ... f(Index<N - 1>): a loop that is gone before the compiler decides what lies in registers.
// GCC 12 unrolls others only afterwards, and keeps arrays that they index in memory.
template <int I>
struct Index {
    static constexpr int value = I;
};
template <int N, class F>
INLINE void repeat(const F& f) {
    if constexpr (N > 0) {
        repeat<N - 1>(f);
        f(Index<N - 1>{});
    }
}
#define EACH(i) [&](auto i) __attribute__((always_inline))

#if defined(__AVX512F__)
// sum() of 16 vectors, in its order: halves are added to halves, of two vectors and then of four at a time.
INLINE Floats sums_of_16(const Floats (&v)[16]) {
    __m512 eighths[8], quarters[4], pairs[2];
    // Vector 4 * lane + i is taken as number lane + 4 * i, which the last steps bring back to its place.
    repeat<8>(EACH(j) {
        constexpr int first = 2 * j.value, second = first + 1;
        const __m512 a = (__m512)v[first % 4 * 4 + first / 4], b = (__m512)v[second % 4 * 4 + second / 4];
        eighths[j.value] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    });
    repeat<4>(EACH(j) {
        const __m512 a = eighths[2 * j.value], b = eighths[2 * j.value + 1];
        quarters[j.value] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    });
    repeat<2>(EACH(j) {
        const __m512 a = quarters[2 * j.value], b = quarters[2 * j.value + 1];
        pairs[j.value] = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
    });
    return (Floats)_mm512_add_ps(_mm512_shuffle_ps(pairs[0], pairs[1], 0x88), _mm512_shuffle_ps(pairs[0], pairs[1], 0xdd));
}
#endif

// Tokens that are computed together, rows that are read side by side for so many, and where what is read next is
// brought. AVX-512 computes faster than memory answers, and fewer rows at once leave more of its bandwidth.
// Qwen2.5-1.5B's layer on one Zen 5 core, one token, every expert: bfloat16 3.4 ms with eight rows, 2.3 with one; int8
// 1.4 ms with eight, 1.2 with four, 2.1 with one. Several tokens take sixteen sums, which are reduced together: two
// tokens 3.0 ms in bfloat16, 4.2 with two rows.
#if defined(__AVX512F__)
constexpr int MOST_TOKENS = 8;
constexpr int ONCE = 0;  // past the larger caches: no row is read again soon
template <class Type, int TOKENS>
constexpr int SIDE_BY_SIDE = TOKENS > 1 ? 16 / TOKENS : sizeof(typename Type::Stored) == 1 ? 4 : 1;
#else
constexpr int MOST_TOKENS = 4;
constexpr int ONCE = 3;
template <class Type, int TOKENS>
constexpr int SIDE_BY_SIDE = 8 / TOKENS;  // eight sums at once, for which every processor has the registers
#endif

// `ahead` are the rows that will be read next. Experts lie apart, which the processor's own prefetching cannot foresee.
template <class Type, int ROWS, int TOKENS, bool FIRST>
INLINE void dot_tile(const void* const* rows, const void* const* ahead, const void* const* inputs, int64_t hidden,
                     float* out, int stride) {
    using Stored = typename Type::Stored;
    using Input = typename Type::Input;
    Floats acc[ROWS][TOKENS] = {};
    const Stored *from[ROWS], *next[ROWS];
    const Input* x[TOKENS];
    repeat<ROWS>(EACH(r) {
        from[r.value] = (const Stored*)rows[r.value];
        next[r.value] = (const Stored*)ahead[r.value];
    });
    repeat<TOKENS>(EACH(t) { x[t.value] = (const Input*)inputs[t.value]; });
    auto block = [&](int64_t i) __attribute__((always_inline)) {
        repeat<ROWS>(EACH(r) {
            typename Fetched<Input>::Array w;
            fetch<Type>(w, from[r.value] + i);
            if constexpr (FIRST) __builtin_prefetch(next[r.value] + i, 0, TOKENS > 1 ? 2 : ONCE);
            repeat<TOKENS>(EACH(t) {
                acc[r.value][t.value] = multiply<Type>(acc[r.value][t.value], w, x[t.value] + i);
            });
        });
    };
    int64_t i = 0;
    for (; i + BLOCK <= hidden; i += BLOCK) block(i);
    if (i < hidden) {
        Stored rest[ROWS][BLOCK];
        repeat<ROWS>(EACH(r) { from[r.value] = whole_block(from[r.value] + i, hidden - i, rest[r.value]) - i; });
        block(i);
    }
#if defined(__AVX512F__)
    if constexpr (ROWS * TOKENS == 16) {
        Floats all[16];
        repeat<16>(EACH(i) { all[i.value] = acc[i.value / TOKENS][i.value % TOKENS]; });
        typedef float Row __attribute__((vector_size(TOKENS * 4)));
        const Floats values = sums_of_16(all);
        Row of[ROWS];
        std::memcpy(of, &values, sizeof values);
        repeat<ROWS>(EACH(r) { store(out + r.value * stride, of[r.value]); });
        return;
    }
#endif
    repeat<ROWS>(EACH(r) {
        repeat<TOKENS>(EACH(t) { out[r.value * stride + t.value] = sum(acc[r.value][t.value]); });
    });
}

template <class Type, int TOKENS, bool FIRST>
INLINE void dot_tokens(const void* const* rows, const void* const* ahead, int num_rows, const void* const* inputs,
                       int64_t hidden, float* out, int stride) {
    constexpr int ROWS = SIDE_BY_SIDE<Type, TOKENS>;
    int r = 0;
    for (; r + ROWS <= num_rows; r += ROWS)
        dot_tile<Type, ROWS, TOKENS, FIRST>(rows + r, ahead + r, inputs, hidden, out + r * stride, stride);
    for (; ROWS > 1 && r < num_rows; r++)
        dot_tile<Type, 1, TOKENS, FIRST>(rows + r, ahead + r, inputs, hidden, out + r * stride, stride);
}

// out[r, t] = rows[r] . inputs[t], [num_rows, num_tokens]; inputs in the order of Type, zero up to a whole block.
template <class Type>
void dot(const void* const* rows, const void* const* ahead, int num_rows, const void* const* inputs, int num_tokens,
         int64_t hidden, float* out) {
    int t = 0;
    auto some = [&](auto count, auto first) __attribute__((always_inline)) {
        dot_tokens<Type, count.value, first.value>(rows, ahead, num_rows, inputs + t, hidden, out + t, num_tokens);
        t += count.value;
    };
    auto any = [&](auto first) __attribute__((always_inline)) {
        const int left = num_tokens - t;
        if (MOST_TOKENS == 8 && left >= 8)
            some(Index<MOST_TOKENS>{}, first);
        else if (left >= 4)
            some(Index<4>{}, first);
        else if (left >= 2)
            some(Index<2>{}, first);
        else
            some(Index<1>{}, first);
    };
    if (num_tokens) any(Index<1>{});
    while (t < num_tokens) any(Index<0>{});
}

template <class Type, int ROWS>
INLINE void add_tile(const void* const* rows, const void* const* ahead, const float* factors, int num_tokens,
                     float* const* out, int64_t begin, int64_t end) {
    using Stored = typename Type::Stored;
    const Stored* from[ROWS];
    for (int r = 0; r < ROWS; r++) from[r] = (const Stored*)rows[r];
    Stored rest[ROWS][BLOCK];
    int64_t i = begin;
    for (int64_t whole = begin + (end - begin) / BLOCK * BLOCK;; whole = end) {  // whole blocks, then the rest
        for (; i < whole; i += BLOCK) {
            Floats w[ROWS][2];
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++) {
                Type::widen(from[r] + i, w[r][0], w[r][1]);
                __builtin_prefetch((const Stored*)ahead[r] + i, 0, ONCE);
            }
            for (int t = 0; t < num_tokens; t++) {
                Floats a = load<Floats>(out[t] + i), b = load<Floats>(out[t] + i + WIDTH);
#pragma GCC unroll 4
                for (int r = 0; r < ROWS; r++) {
                    const Floats factor = splat(factors[r * num_tokens + t]);
                    a = w[r][0] * factor + a;
                    b = w[r][1] * factor + b;
                }
                store(out[t] + i, a);
                store(out[t] + i + WIDTH, b);
            }
        }
        if (i >= end) break;
        for (int r = 0; r < ROWS; r++) from[r] = whole_block(from[r] + i, end - i, rest[r]) - i;
    }
}

#if defined(__AVX512BF16__)
// add_tile() for rows and factors that are bfloat16: two rows an instruction, which adds the upper half's product, then
// the lower one's, each rounded as a multiplication that adds is. So the sums are those of one row after another.
template <class Type, int PAIRS>
INLINE void add_pairs(const void* const* rows, const void* const* ahead, const float* factors, int num_tokens,
                      float* const* out, int64_t begin, int64_t end) {
    using Stored = typename Type::Stored;
    constexpr int ROWS = 2 * PAIRS;
    const Stored* from[ROWS];
    uint32_t both[PAIRS][MOST_MASKED];
    for (int r = 0; r < ROWS; r++) from[r] = (const Stored*)rows[r];
    for (int p = 0; p < PAIRS; p++)
        for (int t = 0; t < num_tokens; t += WIDTH) {  // what is beyond the tokens is not used
            const float* upper = factors + 2 * p * num_tokens + t;
            store(both[p] + t, load<Bits>(upper) | load<Bits>(upper + num_tokens) >> 16);
        }
    Stored rest[ROWS][BLOCK];
    int64_t i = begin;
    for (int64_t whole = begin + (end - begin) / BLOCK * BLOCK;; whole = end) {  // whole blocks, then the rest
        for (; i < whole; i += BLOCK) {
            Bits w[PAIRS][2];
            repeat<PAIRS>(EACH(p) {
                Floats upper[2], lower[2];
                Type::widen(from[2 * p.value] + i, upper[0], upper[1]);
                Type::widen(from[2 * p.value + 1] + i, lower[0], lower[1]);
                __builtin_prefetch((const Stored*)ahead[2 * p.value] + i, 0, ONCE);
                __builtin_prefetch((const Stored*)ahead[2 * p.value + 1] + i, 0, ONCE);
                w[p.value][0] = (Bits)upper[0] | (Bits)lower[0] >> 16;
                w[p.value][1] = (Bits)upper[1] | (Bits)lower[1] >> 16;
            });
            for (int t = 0; t < num_tokens; t++) {
                __m512 a = (__m512)load<Floats>(out[t] + i), b = (__m512)load<Floats>(out[t] + i + WIDTH);
                repeat<PAIRS>(EACH(p) {
                    const __m512bh factor = (__m512bh)_mm512_set1_epi32(both[p.value][t]);
                    a = _mm512_dpbf16_ps(a, (__m512bh)w[p.value][0], factor);
                    b = _mm512_dpbf16_ps(b, (__m512bh)w[p.value][1], factor);
                });
                store(out[t] + i, a);
                store(out[t] + i + WIDTH, b);
            }
        }
        if (i >= end) break;
        for (int r = 0; r < ROWS; r++) from[r] = whole_block(from[r] + i, end - i, rest[r]) - i;
    }
}
#endif

// out[t][i] += factors[r, t] * rows[r][i] for begin <= i < end, row after row; begin is a multiple of BLOCK, out in the
// order of Type, factors bfloat16 if ROUNDED.
template <class Type>
void add(const void* const* rows, const void* const* ahead, int num_rows, const float* factors, int num_tokens,
         float* const* out, int64_t begin, int64_t end) {
    constexpr int LONE = SIDE_BY_SIDE<Type, 1> < 4 ? SIDE_BY_SIDE<Type, 1> : 4;
    for (; num_tokens == 1 && num_rows >= LONE; num_rows -= LONE, rows += LONE, ahead += LONE, factors += LONE)
        add_tile<Type, LONE>(rows, ahead, factors, 1, out, begin, end);
#if defined(__AVX512BF16__)
    if constexpr (ROUNDED<Type>) {
        for (; num_tokens > 1 && num_rows >= 16; num_rows -= 16, rows += 16, ahead += 16, factors += 16 * num_tokens)
            add_pairs<Type, 8>(rows, ahead, factors, num_tokens, out, begin, end);
        for (; num_tokens > 1 && num_rows >= 8; num_rows -= 8, rows += 8, ahead += 8, factors += 8 * num_tokens)
            add_pairs<Type, 4>(rows, ahead, factors, num_tokens, out, begin, end);
        for (; num_tokens > 1 && num_rows >= 2; num_rows -= 2, rows += 2, ahead += 2, factors += 2 * num_tokens)
            add_pairs<Type, 1>(rows, ahead, factors, num_tokens, out, begin, end);
    }
#endif
    for (; num_rows >= 4; num_rows -= 4, rows += 4, ahead += 4, factors += 4 * num_tokens)
        add_tile<Type, 4>(rows, ahead, factors, num_tokens, out, begin, end);
    for (; num_rows; num_rows--, rows++, ahead++, factors += num_tokens)
        add_tile<Type, 1>(rows, ahead, factors, num_tokens, out, begin, end);
}

// `count` elements as an Input of Type, zero up to a whole block.
template <class Type>
void pack(const void* from, int32_t from_type, int64_t count, void* to) {
    typename Type::Input* input = (typename Type::Input*)to;
    const int64_t padded = (count + BLOCK - 1) / BLOCK * BLOCK;
    if constexpr (ROUNDED<Type>) {
        std::memcpy(input, from, count * sizeof(uint16_t));
        std::memset(input + count, 0, (padded - count) * sizeof(uint16_t));
    } else {
        for (int64_t i = 0; i < count; i++) input[Type::slot(i)] = element(from, from_type, i);
        for (int64_t i = count; i < padded; i++) input[Type::slot(i)] = 0;
    }
}

// From the order of Type to the elements' own, from begin to end, multiples of BLOCK.
template <class Type>
void order(float* v, int64_t begin, int64_t end) {
    if (Type::slot(1) == 1) return;
    for (int64_t i = begin; i < end; i += BLOCK) {
        float block[BLOCK];
        std::memcpy(block, v + i, sizeof block);
        repeat<BLOCK>(EACH(k) { v[i + k.value] = block[Type::slot(k.value)]; });
    }
}

template <class Type>
int64_t slot(int64_t i) {
    return Type::slot(i);
}

// The functions of an element type, picked once per call.
struct Product {
    void (*dot)(const void* const*, const void* const*, int, const void* const*, int, int64_t, float*);
    void (*add)(const void* const*, const void* const*, int, const float*, int, float* const*, int64_t, int64_t);
    void (*pack)(const void*, int32_t, int64_t, void*);
    void (*order)(float*, int64_t, int64_t);
    int64_t (*slot)(int64_t);
    int element_bytes;
    bool rounded;  // the second linear's factors are to be bfloat16
    float unit;  // what a widened element is too small by; a power of 2
};

template <class Type>
Product product() {
    return {dot<Type>, add<Type>, pack<Type>, order<Type>, slot<Type>, (int)sizeof(typename Type::Stored), ROUNDED<Type>, Type::UNIT};
}

// For rows of one type and inputs of another.
Product product_of(int32_t rows, int32_t inputs) {
    (void)inputs;
#if defined(__AVX512BF16__)
    if (inputs == BFLOAT16 && rows == BFLOAT16) return product<Pairs<BFloat16>>();
    if (inputs == BFLOAT16 && rows == INT8) return product<Pairs<Int8>>();
    if (inputs == BFLOAT16 && rows == FLOAT8_E4M3FN) return product<Pairs<Float8>>();
#endif
    switch (rows) {
        case FLOAT32: return product<Float32>();
        case FLOAT16: return product<Float16>();
        case BFLOAT16: return product<BFloat16>();
        case FLOAT8_E4M3FN: return product<Float8>();
        default: return product<Int8>();
    }
}

}  // namespace
