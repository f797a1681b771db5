// Softmax and the selection by cumulative mass (arXiv 2605.28283, eq. 8-9).
#pragma once

#include "vectors.h"

namespace {

INLINE float maximum(const float* v, int64_t count) {
    Floats tops = load<Floats>(v);
    for (int64_t i = WIDTH; i < count; i += WIDTH) {
        const Floats next = load<Floats>(v + i);
        tops = next > tops ? next : tops;
    }
    float top = tops[0];
    for (int i = 1; i < WIDTH; i++) top = tops[i] > top ? tops[i] : top;
    return top;
}

// Probabilities of logits, both [count, padded to whole vectors]; behind `count` the logits are -infinity.
void softmax(const float* logits, int64_t count, float* probabilities) {
    const float top = maximum(logits, count);
    Floats sums[2] = {};
    for (int64_t e = 0, odd = 0; e < count; e += WIDTH, odd ^= 1) {
        const Floats v = exponential(load<Floats>(logits + e) - top);
        store(probabilities + e, v);
        sums[odd] += v;
    }
    const float total = sum(sums[0] + sums[1]);
    for (int64_t e = 0; e < count; e += WIDTH) store(probabilities + e, load<Floats>(probabilities + e) / total);
}

// The bits of a number that is not negative rank as the number does. NaN is kept within the buckets.
INLINE uint32_t rank_bits(float v) { return to_bits(v) & 0x7fffffff; }

// active[e] = 1 for the top expert, and for every expert whose cumulative probability down the ranking stays below tau;
// ties rank the lower index first. `active` is 0 before.
//
// Nothing is sorted: the experts' mass is added up by the upper bits of their probability, from the top down to the
// bucket in which it reaches tau. The few experts in there are taken one by one. If they are many, they are looked at
// again by the bits that follow; after 31 bits they are equal, and taken by their index.
void select_cumulative_mass(const float* probabilities, int64_t count, float tau, uint8_t* active) {
    const float highest_probability = maximum(probabilities, count);
    int64_t top = 0;
    while (top < count - 1 && probabilities[top] != highest_probability) top++;
    if (probabilities[top] != highest_probability) top = 0;  // NaN

    constexpr int FEW = 64, LEVELS = 3;
    constexpr int shifts[LEVELS] = {20, 10, 0};
    double mass[1 << 11];
    double before = 0;     // mass ranked above the bucket that is looked at
    uint32_t prefix = 0;   // the bits that all of that bucket have in common, all but the last `known`
    int known = 31;
    uint32_t highest = rank_bits(probabilities[top]) >> shifts[0];  // no expert is above this bucket
    for (const int shift : shifts) {
        std::memset(mass, 0, (highest + 1) * sizeof(double));
        for (int64_t e = 0; e < count; e++) {
            const uint32_t bits = rank_bits(probabilities[e]);
            const uint32_t bucket = (bits >> shift) - (prefix << (known - shift));
            if (bits >> known == prefix && bucket <= highest) mass[bucket] += probabilities[e];
        }
        int64_t reached = highest;
        for (; reached >= 0 && (float)(before + mass[reached]) < tau; reached--) before += mass[reached];
        int64_t candidates = 0;
        int32_t candidate[FEW];
        for (int64_t e = 0; e < count; e++) {
            const uint32_t bits = rank_bits(probabilities[e]);
            const int64_t bucket = (int64_t)(bits >> shift) - (int64_t)(prefix << (known - shift));
            if (bits >> known != prefix) continue;
            active[e] = bucket > reached;
            if (bucket == reached && candidates++ < FEW) candidate[candidates - 1] = e;
        }
        if (candidates <= FEW) {
            while (candidates) {
                int64_t best = 0;
                for (int64_t i = 1; i < candidates; i++)
                    if (probabilities[candidate[i]] > probabilities[candidate[best]]) best = i;
                before += probabilities[candidate[best]];
                if (!((float)before < tau)) break;
                active[candidate[best]] = 1;
                candidates--;
                std::memmove(candidate + best, candidate + best + 1, (candidates - best) * sizeof(int32_t));
            }
            active[top] = 1;
            return;
        }
        prefix = prefix << (known - shift) | (uint32_t)reached;
        known = shift;
        highest = (1 << 10) - 1;
    }
    for (int64_t e = 0; e < count; e++) {
        if (rank_bits(probabilities[e]) != prefix) continue;
        before += probabilities[e];
        if (!((float)before < tau)) break;
        active[e] = 1;
    }
    active[top] = 1;
}

}  // namespace
