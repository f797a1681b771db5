// The routed feed-forward layer on a CPU. Compiled once per instruction set, ISA being its name.
//
// Up to TILE tokens are computed in one OpenMP region, in stages with a barrier after each:
//   1. router logits, the router's rows dealt to the threads;
//   2. softmax and selection, the tokens dealt to the threads;
//   3. the listed experts' neurons, dealt in shares of equal cost: two dot products and the activation, rounded to
//      bfloat16 where the second linear takes products of pairs;
//   4. the second linear: the listed neurons' rows are added up in CHUNKS sums, each of the same experts always, in
//      ascending order. A thread has some chunks whole, for rows are read fastest whole, and columns of others. Beyond
//      FEW tokens, rows are read seldom and sums often: a thread has some columns of all chunks, in turn;
//   5. the chunks' sums are added up, in order, and written out, the columns dealt to the threads.
// With a tile for each thread, none shares one. No sum is ever split between threads, and none depends on the other
// tokens of the tile. So a token's result depends neither on the number of threads nor on its batch.
#include <cstdlib>
#include <cstring>

#include "arena.h"
#include "interface.h"
#include "openmp.h"
#include "stages.h"

namespace {

// One thread's share of a tile, the others computing theirs.
void compute_tile(Tile& s, int worker) {
    const Arguments& a = *s.args;
    const auto wait = [&] {
        if (!s.alone) GOMP_barrier();
    };
    const bool works = worker < s.workers;
    if (s.routed) {
        const int64_t stride = padded(a.experts);
        auto to_logits = [&](int t, int64_t e, float v) {
            s.logits[t * stride + e] = a.router_bias ? v + element(a.router_bias, a.router_bias_type, e) : v;
        };
        if (a.router_down) {
            if (works)
                project(s, s.down, a.router_down, a.rank, a.hidden, s.router_inputs, worker, [&](int t, int64_t i, float v) {
                    s.narrow[t * padded(a.rank) + s.bottleneck.slot(i)] = v;
                });
            wait();
            const void* narrow[TILE];
            for (int t = 0; t < s.tokens; t++) narrow[t] = s.narrow + t * padded(a.rank);
            if (works) project(s, s.bottleneck, a.router_weight, a.experts, a.rank, narrow, worker, to_logits);
        } else if (works) {
            project(s, s.router, a.router_weight, a.experts, a.hidden, s.router_inputs, worker, to_logits);
        }
        wait();
        if (works)
            for (int t = worker; t < s.tokens; t += s.workers) select(s, t);
        if (s.tokens > 1) wait();
        if (worker == 0) list_experts(s);
        wait();
    }
    if (works) first_linear(s, worker);
    wait();
    if (works) second_linear(s, worker);
    if (s.workers > 1 && !by_columns(s)) wait();
    if (works) write_out(s, worker);
}

// Memory for tiles of up to `most` tokens.
void lay_out(Tile& s, Arena& arena, int64_t most) {
    const Arguments& a = *s.args;
    const int64_t places = most > FEW ? 2 : CHUNKS, apart = most > FEW ? s.workers : CHUNKS;
    const int64_t width = padded(a.hidden), wide = padded(a.hidden > a.experts ? a.hidden : a.experts);
    arena.take(s.packed, most * width);
    arena.take(s.router_packed, s.same_input ? 0 : most * width);
    arena.take(s.narrow, a.router_down ? most * padded(a.rank) : 0);
    arena.take(s.logits, most * padded(a.experts));
    arena.take(s.active, most * a.experts);
    arena.take(s.takers, a.experts);
    arena.take(s.experts, a.experts);
    arena.take(s.cost_before, a.experts + 1);
    arena.take(s.neurons, a.experts);
    arena.take(s.read, a.experts);
    // Before the sums, probabilities are there.
    const int64_t sums = places * (width + BESIDE);
    arena.take(s.sums, apart * (APART + 2 * most * BESIDE) + most * (sums > wide ? sums : wide));
    arena.take(s.hidden, most * a.kept * a.expert_size + WIDTH);  // whole vectors are read
    if (!arena.base) return;
    std::memset(s.read, 0, a.experts);
    // The ends of rows, which whole vectors read.
    if (a.router_down) std::memset(s.narrow, 0, most * padded(a.rank) * sizeof(float));
}

// Tile number `tile` of `tiles`, up to where threads can share the work.
void begin_tile(Tile& s, int64_t tile, int64_t tiles) {
    const Arguments& a = *s.args;
    const int64_t element_bytes[] = {4, 2, 2, 1}, width = padded(a.hidden);
    s.first = share(a.tokens, tile, tiles);
    s.tokens = share(a.tokens, tile + 1, tiles) - s.first;
    s.routed = a.sigmoid_gate;
    for (int t = 0; t < s.tokens; t++) {
        s.routed |= !(a.tau[s.first + t] >= 1);
        s.inputs[t] = s.packed + t * width;
        s.weights.pack((const char*)a.x + (s.first + t) * a.hidden * element_bytes[a.x_type], a.x_type, a.hidden,
                       s.packed + t * width);
    }
    if (!s.routed) {
        for (int t = 0; t < s.tokens; t++) {
            std::memset(s.active + t * a.experts, 1, a.experts);
            if (a.active_counts) a.active_counts[s.first + t] += a.kept;
        }
        list_experts(s);
    }
    for (int t = 0; s.routed && t < s.tokens; t++) {
        s.router_inputs[t] = s.same_input ? s.inputs[t] : s.router_packed + t * width;
        if (!s.same_input)
            s.down.pack((const char*)a.router_input + (s.first + t) * a.hidden * element_bytes[a.router_input_type],
                        a.router_input_type, a.hidden, s.router_packed + t * width);
    }
}

// What the threads of a region have.
struct Team {
    Tile* tiles;    // one that they share, or one each
    int64_t count;  // tiles to compute
    int64_t next;   // the first that no thread has begun
    int wanted;     // threads
};

void together(void* shared) {
    Tile& s = *((Team*)shared)->tiles;
    const int worker = omp_get_thread_num();
    // OpenMP may give fewer threads than were asked for. Threads beyond `workers` only wait.
    if (worker == 0 && omp_get_num_threads() < s.workers) s.workers = omp_get_num_threads();
    GOMP_barrier();
    compute_tile(s, worker);
}

void one_by_one(void* shared) {
    Team& team = *(Team*)shared;
    const int worker = omp_get_thread_num();
    if (worker >= team.wanted) return;
    Tile& s = team.tiles[worker];
    for (;;) {
        const int64_t tile = __atomic_fetch_add(&team.next, 1, __ATOMIC_RELAXED);
        if (tile >= team.count) return;
        begin_tile(s, tile, team.count);
        compute_tile(s, 0);
    }
}

int routed_ffn(const Arguments& a) {
    if (a.tokens <= 0) return 0;
    // Always all of OpenMP's threads: libgomp ends those that a smaller region leaves out, and vLLM has bound them to cores.
    const int available = omp_get_max_threads();
    const int wanted = a.threads > 0 ? a.threads : available;
    const int threads = available > wanted ? available : wanted;
    int64_t count = (a.tokens + TILE - 1) / TILE;
    // With a tile for each thread at least, none waits for another.
    const bool alone = wanted > 1 && count >= wanted;
    if (alone) count = (count + wanted - 1) / wanted * wanted;
    const int num_tiles = alone ? wanted : 1;

    Tile* tiles = (Tile*)std::calloc(num_tiles, sizeof(Tile));
    if (!tiles) return 1;
    Arena arena;
    for (int pass = 0; pass < 2; pass++) {
        arena.used = 0;
        for (int i = 0; i < num_tiles; i++) {
            Tile& s = tiles[i];
            s.args = &a;
            s.alone = alone;
            s.workers = alone ? 1 : wanted;
            s.weights = product_of(a.weight_type, a.x_type);
            s.router = product_of(a.router_weight_type, a.router_input_type);
            s.down = a.router_down ? product_of(a.router_down_type, a.router_input_type) : s.router;
            s.bottleneck = product_of(a.router_weight_type, FLOAT32);
            s.same_input = a.router_input == a.x && s.down.dot == s.weights.dot;
            lay_out(s, arena, (a.tokens + count - 1) / count);
        }
        if (pass) break;
        arena.base = (char*)std::aligned_alloc(64, arena.used);
        if (!arena.base) {
            std::free(tiles);
            return 1;
        }
    }

    Team team{tiles, count, 0, wanted};
    if (alone) {
        GOMP_parallel(one_by_one, &team, threads, 0);
    } else {
        for (int64_t tile = 0; tile < count; tile++) {
            begin_tile(*tiles, tile, count);
            GOMP_parallel(together, &team, threads, 0);
        }
    }
    int64_t reads = 0;
    for (int64_t e = 0; e < a.kept; e++) {
        int read = 0;
        for (int i = 0; i < num_tiles; i++) read |= tiles[i].read[e];
        reads += read;
    }
    if (a.full_reads && reads == a.kept) ++*a.full_reads;
    if (a.experts_read) {
        if (a.experts_read_bytes == 8)
            *(int64_t*)a.experts_read += reads;
        else
            *(int32_t*)a.experts_read += reads;
    }
    std::free(arena.base);
    std::free(tiles);
    return 0;
}

}  // namespace

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
extern "C" __attribute__((visibility("default"))) int JOIN(prunepath_routed_ffn_, ISA)(const Arguments* arguments) {
    return routed_ffn(*arguments);
}
