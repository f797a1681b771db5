// One allocation for everything that a call needs, in pieces of whole cache lines.
#pragma once

#include <cstddef>
#include <cstdint>

namespace {

#if defined(__SANITIZE_ADDRESS__)
extern "C" void __asan_poison_memory_region(void const volatile*, size_t);
constexpr int GUARD = 64;
#else
constexpr int GUARD = 0;
#endif

// Hands out pieces of one allocation; a first pass with no memory adds up their sizes.
struct Arena {
    char* base = nullptr;
    size_t used = 0;
    template <class T>
    void take(T*& pointer, int64_t count) {
        const size_t bytes = count * sizeof(T);
        pointer = base ? (T*)(base + used) : nullptr;
        used += (bytes + 63) / 64 * 64 + GUARD;
#if defined(__SANITIZE_ADDRESS__)
        if (base) __asan_poison_memory_region((char*)pointer + bytes, base + used - (char*)pointer - bytes);
#endif
    }
};

}  // namespace
