// The plain C interface of the CPU kernel. __init__.py mirrors Arguments field by field: change both together.
#pragma once

#include <cstdint>

enum Type : int32_t { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2, INT8 = 3, FLOAT8_E4M3FN = 4 };  // the last two: weights
enum Activation : int32_t { SILU = 0, GELU = 1, GELU_TANH = 2, RELU = 3 };

// T tokens, H hidden size, E experts of which the first K have weights, D neurons per expert, F = K * D. All tensors are
// contiguous; a pointer may be null where "or null" says so.
struct Arguments {
    const void* x;             // [T, H] of x_type
    const void* router_input;  // [T, H] of router_input_type; may be x
    const float* tau;          // [T]
    void* y;                   // [T, H] of x_type, written
    const void* router_weight; // [E, H], or [E, rank]
    const void* router_down;   // [rank, H] or null
    const void* router_bias;   // [E] or null
    const void* w_in;          // [F, H]; with glu the gate's rows
    const void* w_up;          // [F, H] if glu
    const void* w_out;         // [F, H]
    const void* b_in;          // [2 F] or [F], or null
    const void* b_out;         // [H] or null
    const float* scale_in;     // [F] or null: what each row of w_in is multiplied by
    const float* scale_up;     // [F] if glu and scale_in: the same for w_up
    const float* scale_out;    // [F] or null: the same for w_out
    int32_t* active_counts;    // [T] or null, added to
    void* experts_read;        // [1] or null, added to
    int64_t* full_reads;       // [1] or null, 1 added if all K experts were read
    int64_t tokens, hidden, experts, kept, expert_size, rank;  // kept: K
    int32_t x_type, router_input_type, router_weight_type, router_down_type, router_bias_type;
    int32_t weight_type, b_in_type, b_out_type;
    int32_t experts_read_bytes; // 4 or 8
    int32_t activation;
    int32_t glu;
    int32_t by_threshold;  // LTE's rule instead of cumulative mass
    int32_t sigmoid_gate;
    float threshold;
    int32_t threads;  // at most so many compute; 0: all that OpenMP gives
};

// Return 0, or 1 where memory ran out. One function per instruction set that was built.
extern "C" {
int prunepath_routed_ffn_plain(const Arguments*);
int prunepath_routed_ffn_avx2(const Arguments*);
int prunepath_routed_ffn_avx512(const Arguments*);
int prunepath_routed_ffn_avx512_bf16(const Arguments*);
// Which experts tokens take, by cumulative mass: active [tokens, experts] of their logits [tokens, experts] and tau [tokens].
int prunepath_select_plain(const float* logits, const float* tau, int64_t tokens, int64_t experts, uint8_t* active);
int prunepath_select_avx2(const float* logits, const float* tau, int64_t tokens, int64_t experts, uint8_t* active);
int prunepath_select_avx512(const float* logits, const float* tau, int64_t tokens, int64_t experts, uint8_t* active);
int prunepath_select_avx512_bf16(const float* logits, const float* tau, int64_t tokens, int64_t experts, uint8_t* active);
// Whether this processor runs an instruction set, by its name above.
int prunepath_processor_runs(const char* isa);
}
