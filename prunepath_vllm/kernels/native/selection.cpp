// Selection by cumulative mass alone, for steps whose products a library computes. Compiled once per instruction set.
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "openmp.h"
#include "select.h"

namespace {

struct Selection {
    const float* logits;  // [tokens, experts]
    const float* tau;     // [tokens]; 0 marks a padding row
    int64_t tokens, experts;
    uint8_t* active;  // [tokens, experts], written
    float* buffers;   // [threads, 2, padded experts]
};

void run(void* data) {
    const Selection& s = *(const Selection*)data;
    const int worker = omp_get_thread_num(), workers = omp_get_num_threads();
    const int64_t width = padded(s.experts);
    float *logits = s.buffers + 2 * worker * width, *probabilities = logits + width;
    for (int64_t e = s.experts; e < width; e++) logits[e] = -INFINITY;
    for (int64_t t = worker; t < s.tokens; t += workers) {
        uint8_t* active = s.active + t * s.experts;
        std::memset(active, s.tau[t] >= 1, s.experts);
        if (!(s.tau[t] > 0) || s.tau[t] >= 1) continue;
        std::memcpy(logits, s.logits + t * s.experts, s.experts * sizeof(float));
        softmax(logits, s.experts, probabilities);
        select_cumulative_mass(probabilities, s.experts, s.tau[t], active);
    }
}

}  // namespace

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
extern "C" __attribute__((visibility("default"))) int JOIN(prunepath_select_, ISA)(
    const float* logits, const float* tau, int64_t tokens, int64_t experts, uint8_t* active) {
    const int threads = omp_get_max_threads();
    float* buffers = (float*)std::aligned_alloc(64, 2 * threads * padded(experts) * sizeof(float));
    if (!buffers) return 1;
    Selection s{logits, tau, tokens, experts, active, buffers};
    GOMP_parallel(run, &s, threads, 0);
    std::free(buffers);
    return 0;
}
