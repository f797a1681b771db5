// Softmax and the selection by cumulative mass (arXiv 2605.28283, eq. 8-9).
#pragma once

#include "vectors.h"

namespace {

// probabilities [count, padded to whole vectors] of logits [same]; what stands behind `count` is no matter.
void softmax(const float* logits, int64_t count, float* probabilities) {
    float top = logits[0];
    for (int64_t e = 1; e < count; e++) top = logits[e] > top ? logits[e] : top;
    for (int64_t e = 0; e < count; e += WIDTH) store(probabilities + e, exponential(load<Floats>(logits + e) - top));
    double total = 0;
    for (int64_t e = 0; e < count; e++) total += probabilities[e];
    const float sum = total;
    for (int64_t e = 0; e < count; e += WIDTH) store(probabilities + e, load<Floats>(probabilities + e) / sum);
}

// active[e] = 1 for the top expert, and for every expert whose cumulative probability down the ranking stays below tau;
// ties rank the lower index first. `active` is 0 before.
//
// Nothing is sorted: the bits of a positive float32 rank as the number does, so the experts' mass is added up by the
// upper bits, the bucket in which the sum reaches tau is looked at again by the bits that follow, and what is left
// after 31 bits are equal numbers, taken by their index.
void select_cumulative_mass(const float* probabilities, int64_t count, float tau, uint8_t* active) {
    int64_t top = 0;
    for (int64_t e = 1; e < count; e++)
        if (probabilities[e] > probabilities[top]) top = e;
    constexpr int BUCKETS = 2048;
    double mass[BUCKETS];
    double before = 0;    // mass ranked above the bucket that is looked at
    uint32_t prefix = 0;  // the bits that all of that bucket have in common
    int known = 31;       // from here on: below this bit nothing is known
    const int shifts[] = {20, 10, 0};
    for (const int shift : shifts) {
        const uint32_t buckets = 1u << (known - shift);
        for (uint32_t b = 0; b < buckets; b++) mass[b] = 0;
        for (int64_t e = 0; e < count; e++) {
            const uint32_t bits = to_bits(probabilities[e]) & 0x7fffffff;
            if (known == 31 || bits >> known == prefix) mass[bits >> shift & (buckets - 1)] += probabilities[e];
        }
        // The bucket that reaches tau; everything above it stays.
        uint32_t b = buckets;
        while (b-- && (float)(before + mass[b]) < tau) before += mass[b];
        const uint32_t reached = b + 1 == 0 ? 0 : b;  // none did: all stay
        const bool none = b + 1 == 0;
        for (int64_t e = 0; e < count; e++) {
            const uint32_t bits = to_bits(probabilities[e]) & 0x7fffffff;
            if (known != 31 && bits >> known != prefix) continue;
            if (none || (bits >> shift & (buckets - 1)) > reached) active[e] = 1;
        }
        if (none) break;
        prefix = (known == 31 ? 0 : prefix << (known - shift)) | reached;
        known = shift;
    }
    if (known == 0)
        for (int64_t e = 0; e < count; e++)
            if ((to_bits(probabilities[e]) & 0x7fffffff) == prefix) {
                before += probabilities[e];
                if (!((float)before < tau)) break;
                active[e] = 1;
            }
    active[top] = 1;
}

}  // namespace
