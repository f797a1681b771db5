// The two products: rows with several inputs each, and rows that are added up.
#pragma once

#include "vectors.h"

namespace {

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
// tokens 3.0 ms in bfloat16, 4.2 with two rows. Rows that a call reads again are in a cache, where more at once are
// better.
#if defined(__AVX512F__)
constexpr int MOST_TOKENS = 8;
constexpr int ONCE = 0;  // past the larger caches: no row is read again soon
template <class Type, int TOKENS, bool FIRST = true>
constexpr int SIDE_BY_SIDE = TOKENS > 1 || !FIRST ? 16 / TOKENS : sizeof(typename Type::Stored) == 1 ? 4 : 1;
#else
constexpr int MOST_TOKENS = 4;
constexpr int ONCE = 3;
template <class Type, int TOKENS, bool FIRST = true>
constexpr int SIDE_BY_SIDE = 8 / TOKENS;  // eight sums at once, for which every processor has the registers
#endif

// Whether rows side by side are read one after the other, and share the reduction alone. Four tokens' sums are enough
// to keep the processor busy: four tokens 2.7 ms in bfloat16, 3.0 with four rows at once. int8 takes 1.9 so, and 1.6.
template <class Type, int TOKENS>
constexpr bool ONE_BY_ONE = ROUNDED<Type> && sizeof(typename Type::Stored) == 2 && TOKENS == 4;

// `ahead` are the rows that will be read next. Experts lie apart, which the processor's own prefetching cannot foresee.
template <class Type, int ROWS, int TOKENS, bool FIRST>
INLINE void dot_tile(const void* const* rows, const void* const* ahead, const void* const* inputs, int64_t hidden,
                     float* out, int stride) {
    using Stored = typename Type::Stored;
    using Input = typename Type::Input;
    constexpr int AT_ONCE = ONE_BY_ONE<Type, TOKENS> ? 1 : ROWS;
    Floats acc[ROWS][TOKENS] = {};
    const Stored *from[ROWS], *next[ROWS];
    const Input* x[TOKENS];
    repeat<ROWS>(EACH(r) {
        from[r.value] = (const Stored*)rows[r.value];
        next[r.value] = (const Stored*)ahead[r.value];
    });
    repeat<TOKENS>(EACH(t) { x[t.value] = (const Input*)inputs[t.value]; });
    repeat<ROWS / AT_ONCE>(EACH(part) {
        auto block = [&](int64_t i) __attribute__((always_inline)) {
            repeat<AT_ONCE>(EACH(k) {
                constexpr int r = part.value * AT_ONCE + k.value;
                typename Fetched<Input>::Array w;
                fetch<Type>(w, from[r] + i);
                if constexpr (FIRST) __builtin_prefetch(next[r] + i, 0, TOKENS > 1 ? 2 : ONCE);
                repeat<TOKENS>(EACH(t) {
                    acc[r][t.value] = multiply<Type>(acc[r][t.value], w, x[t.value] + i);
                });
            });
        };
        int64_t i = 0;
        for (; i + BLOCK <= hidden; i += BLOCK) block(i);
        if (i < hidden) {
            Stored rest[AT_ONCE][BLOCK];
            repeat<AT_ONCE>(EACH(k) {
                constexpr int r = part.value * AT_ONCE + k.value;
                from[r] = whole_block(from[r] + i, hidden - i, rest[k.value]) - i;
            });
            block(i);
        }
    });
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
    constexpr int ROWS = SIDE_BY_SIDE<Type, TOKENS, FIRST>;
    int r = 0;
    for (; r + ROWS <= num_rows; r += ROWS)
        dot_tile<Type, ROWS, TOKENS, FIRST>(rows + r, ahead + r, inputs, hidden, out + r * stride, stride);
    if constexpr (ROWS > 8)
        for (; r + 4 <= num_rows; r += 4)
            dot_tile<Type, 4, TOKENS, FIRST>(rows + r, ahead + r, inputs, hidden, out + r * stride, stride);
    for (; ROWS > 1 && r < num_rows; r++)
        dot_tile<Type, 1, TOKENS, FIRST>(rows + r, ahead + r, inputs, hidden, out + r * stride, stride);
}

// out[r, t] = rows[r] . inputs[t], [num_rows, num_tokens], and perhaps one value beyond; inputs in the order of Type,
// zero up to a whole block.
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
    if (ROUNDED<Type> && num_tokens % 4 == 3) {
        // Three tokens as four take less than two and one, where products in bfloat16 wait for memory. The fourth's
        // value is where another one is written later.
        const void* four[] = {inputs[0], inputs[1], inputs[2], inputs[2]};
        dot_tokens<Type, 4, true>(rows, ahead, num_rows, four, hidden, out, num_tokens);
        t = 3;
    } else if (num_tokens) {
        any(Index<1>{});
    }
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
