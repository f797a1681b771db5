// What each stage of a tile of tokens computes, for one of the threads that share it.
#pragma once

#include <cmath>
#include <cstring>

#include "products.h"
#include "select.h"

namespace {

constexpr int TILE = 64;      // tokens at once, at most
static_assert(TILE <= MOST_MASKED);
constexpr int FEW = 16;       // to which rows are what takes the time
constexpr int GROUP = 16;     // rows at once in the first linear
constexpr int ADDED = 16;     // and in the second
constexpr int CHUNKS = 8;     // of the experts, each with sums of its own in the second linear
constexpr int APART = 16384;  // floats between sums of several threads: a core's prefetching takes what others write
constexpr int BESIDE = 16;    // floats between two tokens' sums: rows of a multiple of 2 KB share few sets of a cache
constexpr int PIECE = 4;      // blocks of columns; a thread's share of a chunk ends at a multiple

// Everything the threads share while they compute a tile.
struct Tile {
    const Arguments* args;
    int64_t first;  // token of the whole batch
    int tokens;
    int workers;
    bool alone;       // one thread computes it, and the others do other tiles
    bool routed;      // false: every token takes every expert, ungated
    bool same_input;  // the router reads what the first linear reads, packed alike

    Product weights, router, down, bottleneck;  // down: of whatever reads the router's input
    const void* inputs[TILE];         // what the first linear reads, packed
    const void* router_inputs[TILE];  // what the router (or its down projection) reads
    float *packed, *router_packed;    // where they lie
    float* narrow;                    // [TILE, rank] between the router's two projections
    float* logits;                    // [TILE, E]; turned into probabilities, then into what an expert is multiplied by
    uint8_t* active;                  // [TILE, E]
    Tokens* takers;                   // [E], tokens that take the expert

    // The experts of any token, ascending.
    int64_t listed;
    int32_t* experts;
    int64_t* cost_before;  // [listed + 1], of one neuron each
    int64_t* neurons;      // where the expert's activations start, [D, tokens that take it]
    float* hidden;         // activations
    float* sums;           // see Sums
    uint8_t* read;         // [E], experts of any tile

    int64_t chunk[CHUNKS + 1];  // where each chunk starts in the list
};

// f(token, how many of the set come before it), ascending.
template <class F>
INLINE void each_of(Tokens set, const F& f) {
    for (int k = 0; set; set &= set - 1) f(__builtin_ctzll(set), k++);
}

int64_t share(int64_t total, int part, int parts) { return total * part / parts; }

bool needs_logits(const Arguments& a, float tau) { return a.sigmoid_gate || (tau > 0 && tau < 1); }

int picked(const Tile& s, const void* const* from, const void** to, int* token) {
    int count = 0;
    for (int t = 0; t < s.tokens; t++)
        if (needs_logits(*s.args, s.args->tau[s.first + t])) {
            token[count] = t;
            to[count++] = from[t];
        }
    return count;
}

// Stage 1, or one half of it where the router is of low rank.
template <class Store>
void project(const Tile& s, const Product& product, const void* weight, int64_t rows, int64_t columns,
             const void* const* from, int worker, Store write) {
    const void* inputs[TILE];
    int token[TILE];
    const int count = picked(s, from, inputs, token);
    const int64_t end = share(rows, worker + 1, s.workers);
    for (int64_t row = share(rows, worker, s.workers); row < end; row += GROUP) {
        const int num_rows = end - row < GROUP ? end - row : GROUP;
        const void *pointers[GROUP], *ahead[GROUP];
        for (int r = 0; r < num_rows; r++) {
            const int64_t next = row + r + GROUP < end ? row + r + GROUP : row + r;
            pointers[r] = (const char*)weight + (row + r) * columns * product.element_bytes;
            ahead[r] = (const char*)weight + next * columns * product.element_bytes;
        }
        float out[GROUP * TILE];
        product.dot(pointers, ahead, num_rows, inputs, count, columns, out);
        for (int r = 0; r < num_rows; r++)
            for (int k = 0; k < count; k++) write(token[k], row + r, out[r * count + k]);
    }
}

// Stage 2 for one token: which experts it takes, and in place of its logits what they are multiplied by.
void select(const Tile& s, int t) {
    const Arguments& a = *s.args;
    const float tau = a.tau[s.first + t];
    float* logits = s.logits + t * padded(a.experts);
    uint8_t* active = s.active + t * a.experts;
    for (int64_t e = a.experts; e < padded(a.experts); e++) logits[e] = -INFINITY;
    const bool all = tau >= 1;
    std::memset(active, all, a.experts);
    const bool some = tau > 0 && !all;
    if (some && a.by_threshold) {
        for (int64_t e = 0; e < a.experts; e += WIDTH) {
            const Floats p = sigmoid(load<Floats>(logits + e));
            for (int i = 0; i < WIDTH && e + i < a.experts; i++) active[e + i] = p[i] > a.threshold;
        }
    } else if (some) {
        float* probabilities = s.sums + t * padded(a.hidden > a.experts ? a.hidden : a.experts);
        softmax(logits, a.experts, probabilities);
        select_cumulative_mass(probabilities, a.experts, tau, active);
    }
    if (a.sigmoid_gate)
        for (int64_t e = 0; e < a.experts; e += WIDTH) {
            const Floats gate = sigmoid(load<Floats>(logits + e));
            store(logits + e, gate);
            // A gate that is 0 in float32 makes its expert inactive, as in the reference.
            for (int i = 0; i < WIDTH && e + i < a.experts; i++) active[e + i] &= gate[i] != 0;
        }
    if (a.active_counts) {
        int32_t count = 0;
        for (int64_t e = 0; e < a.kept; e++) count += active[e];
        a.active_counts[s.first + t] += count;
    }
}

// The union of the tokens' experts that have weights, and what computing them costs.
void list_experts(Tile& s) {
    const Arguments& a = *s.args;
    // A token's row of flags after the other: they lie together.
    std::memset(s.takers, 0, a.kept * sizeof(Tokens));
    for (int t = 0; t < s.tokens; t++) {
        const uint8_t* active = s.active + t * a.experts;
        int64_t e = 0;
        for (; e + 8 <= a.kept; e += 8) {
            typedef uint8_t Flags __attribute__((vector_size(8)));
            typedef Tokens Sets __attribute__((vector_size(8 * sizeof(Tokens))));
            const Sets flags = __builtin_convertvector(load<Flags>(active + e), Sets);
            store(s.takers + e, load<Sets>(s.takers + e) | flags << t);
        }
        for (; e < a.kept; e++) s.takers[e] |= (Tokens)active[e] << t;
    }
    int64_t listed = 0, cost = 0, neurons = 0;
    for (int64_t e = 0; e < a.kept; e++) {
        const Tokens mask = s.takers[e];
        if (!mask) continue;
        s.read[e] = 1;
        s.experts[listed] = e;
        s.cost_before[listed] = cost;
        s.neurons[listed++] = neurons;
        const int tokens = __builtin_popcountll(mask);
        cost += a.expert_size * (3 + tokens);  // reading the rows costs about as much as three tokens
        neurons += a.expert_size * tokens;
    }
    s.cost_before[listed] = cost;
    s.listed = listed;
    int64_t place = 0;
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        while (place < listed && s.experts[place] < share(a.kept, chunk, CHUNKS)) place++;
        s.chunk[chunk] = place;
    }
    s.chunk[CHUNKS] = listed;
}

// Neurons with the same tokens, computed together.
struct Group {
    int size = 0;
    Tokens mask = 0;
    int64_t neuron[GROUP];  // of F
    float gate[GROUP][TILE];
    float* hidden;  // the first one's activations, which the others' follow
    const void* rows[GROUP];  // of the first linear: every neuron's, then for a GLU every neuron's second one
};

// For each of `count` rows the one that is read a group later, or itself.
void look_ahead(const void* const* rows, int count, const void* const* next, int next_count, const void** ahead) {
    for (int r = 0; r < count; r++) ahead[r] = r < next_count ? next[r] : rows[r];
}

void activate(int32_t activation, float* v, int count) {
    if (activation == GELU) {
        for (int i = 0; i < count; i++) v[i] = 0.5f * v[i] * (1.0f + erff(v[i] * 0.70710678f));
        return;
    }
    for (int i = 0; i < count; i += WIDTH) {  // v is padded to whole vectors
        const Floats x = load<Floats>(v + i);
        if (activation == SILU)
            store(v + i, x * sigmoid(x));
        else if (activation == GELU_TANH)
            store(v + i, x * sigmoid(1.5957691216f * (x + 0.044715f * x * x * x)));
        else
            store(v + i, x < 0 ? Floats{} : x);
    }
}

void compute(const Tile& s, const Group& g, const Group& next) {
    const Arguments& a = *s.args;
    const int64_t all_neurons = a.kept * a.expert_size;
    const void* inputs[TILE];
    each_of(g.mask, [&](int t, int k) { inputs[k] = s.inputs[t]; });
    const int tokens = __builtin_popcountll(g.mask);
    const int num_rows = g.size << a.glu;
    const void* ahead[GROUP] = {};
    look_ahead(g.rows, num_rows, next.rows, next.size << a.glu, ahead);
    float out[GROUP * TILE + WIDTH];
    s.weights.dot(g.rows, ahead, num_rows, inputs, tokens, a.hidden, out);
    std::memset(out + num_rows * tokens, 0, WIDTH * sizeof(float));
    if (a.scale_in || a.b_in)
        for (int r = 0; r < num_rows; r++) {
            const bool up = r >= g.size;
            const int64_t neuron = g.neuron[r % g.size], row = neuron + (up ? all_neurons : 0);
            const float scale = a.scale_in ? (up ? a.scale_up : a.scale_in)[neuron] * s.weights.unit : 1;
            const float bias = a.b_in ? element(a.b_in, a.b_in_type, row) : 0;
            for (int k = 0; k < tokens; k++) out[r * tokens + k] = out[r * tokens + k] * scale + bias;
        }
    const int values = g.size * tokens;
    float pre[GROUP * TILE + WIDTH];
    std::memcpy(pre, out, values * sizeof(float));
    std::memset(pre + values, 0, WIDTH * sizeof(float));
    activate(a.activation, pre, values);
    const bool gated = s.routed && a.sigmoid_gate;
    for (int i = 0; i < g.size && (a.scale_out || gated); i++) {
        const float scale = a.scale_out ? a.scale_out[g.neuron[i]] * s.weights.unit : 1;
        for (int k = 0; k < tokens; k++) pre[i * tokens + k] *= gated ? scale * g.gate[i][k] : scale;
    }
    for (int i = 0; i < values; i += WIDTH) {  // both arrays are padded to whole vectors
        Floats h = load<Floats>(pre + i);
        if (a.glu) h *= load<Floats>(out + values + i);
        store(pre + i, s.weights.rounded ? round_to_bfloat(h) : h);
    }
    std::memcpy(g.hidden, pre, values * sizeof(float));
}

// Where a share of the listed cost begins: the expert's place in the list, and the neuron in it.
void begin_of(const Tile& s, int64_t cost, int64_t& place, int64_t& neuron) {
    int64_t low = 0, high = s.listed;  // the last place whose cost_before <= cost
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (s.cost_before[middle] <= cost ? low : high) = middle;
    }
    place = low;
    neuron = (cost - s.cost_before[low]) / (3 + __builtin_popcountll(s.takers[s.experts[low]]));
}

// Stage 3.
void first_linear(const Tile& s, int worker) {
    const Arguments& a = *s.args;
    if (!s.listed) return;
    const int64_t total = s.cost_before[s.listed];
    const int most = GROUP >> a.glu;
    int64_t place, neuron, end_place, end_neuron;
    begin_of(s, share(total, worker, s.workers), place, neuron);
    if (worker + 1 == s.workers)
        end_place = s.listed, end_neuron = 0;
    else
        begin_of(s, share(total, worker + 1, s.workers), end_place, end_neuron);
    Group groups[2];  // one that waits until the next one is known, and the next one
    int building = 0;
    auto close = [&] {
        Group &g = groups[building], &waiting = groups[1 - building];
        for (int half = 0; half <= a.glu; half++)
            for (int i = 0; i < g.size; i++)
                g.rows[half * g.size + i] =
                    (const char*)(half ? a.w_up : a.w_in) + g.neuron[i] * a.hidden * s.weights.element_bytes;
        if (waiting.size) compute(s, waiting, g);
        waiting.size = 0;
        building = 1 - building;
    };
    for (; place < end_place || (place == end_place && end_neuron); place++, neuron = 0) {
        const Tokens mask = s.takers[s.experts[place]];
        const int tokens = __builtin_popcountll(mask);
        const int64_t end = place == end_place ? end_neuron : a.expert_size;
        for (; neuron < end; neuron++) {
            if (groups[building].size == most || (groups[building].size && groups[building].mask != mask)) close();
            Group& g = groups[building];
            g.mask = mask;
            g.neuron[g.size] = s.experts[place] * a.expert_size + neuron;
            if (!g.size) g.hidden = s.hidden + s.neurons[place] + neuron * tokens;
            if (s.routed && a.sigmoid_gate)
                each_of(mask, [&](int t, int k) {
                    g.gate[g.size][k] = s.logits[t * padded(a.experts) + s.experts[place]];
                });
            g.size++;
        }
        if (place == end_place) break;
    }
    close();
    close();
}

// The chunk that a share of the listed cost ends in, and how many blocks of its columns belong to the share.
void end_of(const Tile& s, int64_t cost, int64_t blocks, int& chunk, int64_t& block) {
    for (chunk = 0; chunk < CHUNKS; chunk++) {
        const int64_t before = s.cost_before[s.chunk[chunk]], after = s.cost_before[s.chunk[chunk + 1]];
        if (cost >= after) continue;
        block = (cost - before) * blocks / (after - before) / PIECE * PIECE;
        return;
    }
    block = 0;
}

bool by_columns(const Tile& s) { return s.tokens > FEW; }

// The columns of a thread that has some of all chunks, and that it writes out.
void columns_of(const Tile& s, int worker, int64_t& begin, int64_t& after) {
    const int64_t blocks = padded(s.args->hidden) / BLOCK;
    begin = share(blocks, worker, s.workers) * BLOCK;
    after = share(blocks, worker + 1, s.workers) * BLOCK;
}

// Where a thread has sums: chunks' in several places, the total in the first.
struct Sums {
    float* first;
    int64_t row, place;  // floats from a token's to the next one's, and from a place to the next

    Sums(const Tile& s, int worker)
        : first(s.sums), row(padded(s.args->hidden) + BESIDE), place(s.tokens * row + APART) {
        if (!by_columns(s)) return;
        // Its columns alone, in memory of its own, from which the first one's address is counted.
        int64_t begin, after;
        columns_of(s, worker, begin, after);
        first += worker * (APART + 2 * s.tokens * BESIDE) + 2 * s.tokens * begin - begin;
        row = after - begin + BESIDE;
        place = s.tokens * row;
    }
    float* of(int number, int token) const { return first + number * place + token * row; }
};

// One chunk's sums of the columns from begin on, in place number `place`.
void add_chunk(const Tile& s, const Sums& all, int chunk, int place, int64_t begin, int64_t after) {
    const Arguments& a = *s.args;
    const int64_t end = after < a.hidden ? after : a.hidden;
    float* sums[TILE];
    for (int t = 0; t < s.tokens; t++) {
        sums[t] = all.of(place, t);
        std::memset(sums[t] + begin, 0, (after - begin) * sizeof(float));
    }
    struct Rows {
        int size = 0;
        Tokens mask = 0;
        const float* factors;  // the neurons' activations, which follow one another as long as the mask is the same
        const void* rows[ADDED];
    } groups[2];
    int building = 0;
    auto close = [&] {
        Rows &next = groups[building], &g = groups[1 - building];
        if (g.size) {
            const void* ahead[ADDED];
            look_ahead(g.rows, g.size, next.rows, next.size, ahead);
            float* out[TILE];
            each_of(g.mask, [&](int t, int k) { out[k] = sums[t]; });
            s.weights.add(g.rows, ahead, g.size, g.factors, __builtin_popcountll(g.mask), out, begin, end);
        }
        g.size = 0;
        building = 1 - building;
    };
    for (int64_t listed = s.chunk[chunk]; listed < s.chunk[chunk + 1]; listed++) {
        const Tokens mask = s.takers[s.experts[listed]];
        const int tokens = __builtin_popcountll(mask);
        for (int64_t neuron = 0; neuron < a.expert_size; neuron++) {
            if (groups[building].size == ADDED || (groups[building].size && groups[building].mask != mask)) close();
            Rows& g = groups[building];
            if (!g.size) g.factors = s.hidden + s.neurons[listed] + neuron * tokens;
            g.mask = mask;
            g.rows[g.size++] = (const char*)a.w_out +
                               (s.experts[listed] * a.expert_size + neuron) * a.hidden * s.weights.element_bytes;
        }
    }
    close();
    close();
}

// Some columns' second sums are added to the first.
void add_up(const Tile& s, const Sums& all, int64_t begin, int64_t after) {
    for (int t = 0; t < s.tokens; t++) {
        float *total = all.of(0, t), *sums = all.of(1, t);
        for (int64_t i = begin; i < after; i += WIDTH) store(total + i, load<Floats>(total + i) + load<Floats>(sums + i));
    }
}

// Stage 4.
void second_linear(const Tile& s, int worker) {
    const Sums all(s, worker);
    int chunk = 0, last = 0;
    int64_t begin = 0, end = 0;
    if (by_columns(s)) {
        columns_of(s, worker, begin, end);
        for (; chunk < CHUNKS; chunk++) {
            if (chunk && s.chunk[chunk] == s.chunk[chunk + 1]) continue;
            add_chunk(s, all, chunk, chunk ? 1 : 0, begin, end);
            if (chunk) add_up(s, all, begin, end);
        }
        return;
    }
    const int64_t blocks = padded(s.args->hidden) / BLOCK, total = s.cost_before[s.listed];
    end_of(s, share(total, worker, s.workers), blocks, chunk, begin);
    end_of(s, share(total, worker + 1, s.workers), blocks, last, end);
    for (; chunk < CHUNKS && chunk <= last; chunk++, begin = 0) {
        const int64_t after = chunk == last ? end : blocks;
        if (begin < after && s.chunk[chunk] < s.chunk[chunk + 1])
            add_chunk(s, all, chunk, chunk, begin * BLOCK, after * BLOCK);
    }
}

// Stage 5.
void write_out(const Tile& s, int worker) {
    const Arguments& a = *s.args;
    int64_t begin, after;
    columns_of(s, worker, begin, after);
    const int64_t end = after < a.hidden ? after : a.hidden;
    const Sums all(s, worker);
    for (int t = 0; t < s.tokens; t++) {
        float* sums = all.of(0, t);
        if (!by_columns(s))
            for (int64_t i = begin; i < after; i += WIDTH) {
                Floats v{};
                for (int chunk = 0; chunk < CHUNKS; chunk++)
                    if (s.chunk[chunk] < s.chunk[chunk + 1]) v += load<Floats>(all.of(chunk, t) + i);
                store(sums + i, v);
            }
        s.weights.order(sums, begin, after);
        const int64_t bytes = a.x_type == FLOAT32 ? 4 : 2;
        char* row = (char*)a.y + (s.first + t) * a.hidden * bytes;
        for (int64_t i = begin; i < end; i += WIDTH) {
            const int64_t count = end - i < WIDTH ? end - i : WIDTH;
            for (int64_t k = 0; a.b_out && k < count; k++) sums[i + k] += element(a.b_out, a.b_out_type, i + k);
            char out[WIDTH * sizeof(float)];
            const bool whole = count == WIDTH;
            narrow(load<Floats>(sums + i), a.x_type, whole ? row + i * bytes : out);
            if (!whole) std::memcpy(row + i * bytes, out, count * bytes);
        }
    }
}

}  // namespace
