// What the processor can run. Apart from the kernel, since it must itself run everywhere.
#include <cstring>

#include "interface.h"

#define EXPORT __attribute__((visibility("default")))

extern "C" EXPORT int prunepath_processor_runs(const char* isa) {
    if (!std::strcmp(isa, "plain")) return 1;
#if defined(__x86_64__) || defined(__i386__)
    __builtin_cpu_init();
    // GCC 10's list of names has no f16c; every processor with AVX2 has it.
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (!std::strcmp(isa, "avx2")) return avx2;
    if (!std::strcmp(isa, "avx512")) return avx512;
    if (!std::strcmp(isa, "avx512_bf16")) return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
    return 0;
}
