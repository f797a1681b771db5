#pragma once

// libgomp's entry points, which every OpenMP runtime for Linux has. Called by name, and linked to no library, they are
// those of the runtime that PyTorch has loaded: same threads, bound to the same cores.
extern "C" {
void GOMP_parallel(void (*)(void*), void*, unsigned threads, unsigned flags);
void GOMP_barrier();
int omp_get_thread_num();
int omp_get_num_threads();
int omp_get_max_threads();
}
