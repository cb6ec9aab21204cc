// Attention with wgmma, for compute capability 9.0 alone: INT8 Q K^T and PV in the modes of has_wgmma.
//
// A block has 128 queries and three warpgroups. One thread of the first asks for tiles of K and V, which copies bring into shared
// memory; the other two each own 64 queries. What a warpgroup does with each tile is in consume(): its matrix products run in
// the background of its own softmax and of the other's. docs/hopper.md draws it and lists what else was tried.
#pragma once

#include "common/softmax.cuh"
#include "common/wgmma.cuh"
#include "params.h"
#include "tiles.h"

namespace sage {

// What the copies bring: at turn t K of tile t and V of tile t - 1, to stages that go round.
template <int K_BYTES, int V_BYTES> struct Stages {
    static constexpr int COUNT = 3;
    static constexpr int BYTES = COUNT * (K_BYTES + V_BYTES), BARRIER_BYTES = (3 * COUNT * 8 + 15) / 16 * 16;
    uint32_t shared;  // K's stages, then V's, then the barriers

    __device__ uint32_t k(int stage) const { return shared + stage * K_BYTES; }
    __device__ uint32_t v(int stage) const { return shared + COUNT * K_BYTES + stage * V_BYTES; }
    __device__ uint32_t full(int stage) const { return shared + BYTES + stage * 8; }  // by K's stage
    __device__ uint32_t k_free(int stage) const { return full(COUNT + stage); }
    __device__ uint32_t v_free(int stage) const { return full(2 * COUNT + stage); }

    __device__ void init(int consumers) const {
        for (int stage = 0; stage < COUNT; ++stage) {
            ptx::init_barrier(full(stage), 1);
            ptx::init_barrier(k_free(stage), consumers);
            ptx::init_barrier(v_free(stage), consumers);
        }
    }
    // For one thread: all turns.
    __device__ void fill(const int8_t* k_from, const uint8_t* v_from, int tiles) const {
        int k_stage = 0, v_stage = 0, k_phase = 1, v_phase = 1;  // phases of the barriers that say a stage is free: at first it is
        for (int turn = 0; turn <= tiles; ++turn) {
            const bool with_k = turn < tiles, with_v = turn > 0;
            // The last turn as well, which brings no K: what came to this barrier before has been waited for then.
            ptx::sleep_on_barrier(k_free(k_stage), k_phase);
            if (with_v) ptx::sleep_on_barrier(v_free(v_stage), v_phase);
            ptx::expect_bytes(full(k_stage), (with_k ? K_BYTES : 0) + (with_v ? V_BYTES : 0));
            if (with_k) ptx::copy_bulk(k(k_stage), k_from + int64_t(turn) * K_BYTES, K_BYTES, full(k_stage));
            if (with_v) {
                ptx::copy_bulk(v(v_stage), v_from + int64_t(turn - 1) * V_BYTES, V_BYTES, full(k_stage));
                if (++v_stage == COUNT) v_stage = 0, v_phase ^= 1;
            }
            if (++k_stage == COUNT) k_stage = 0, k_phase ^= 1;
        }
    }
};

template <Mode MODE, int DIM, int V_DIM, bool MASKED> struct WgmmaAttention {
    static constexpr int KEYS = WGMMA_KEYS;
    static constexpr int ROWS = WGMMA_ROWS, WARPGROUPS = ROWS / 64;  // queries of a block, and those who own them
    static constexpr int THREADS = 128 * (WARPGROUPS + 1);
    static constexpr int K_BYTES = KEYS * DIM, V_BYTES = KEYS * V_DIM * v_bytes(MODE), Q_BYTES = ROWS * DIM;
    using Tiles = Stages<K_BYTES, V_BYTES>;
    static constexpr int ALIGNMENT = 1024;  // of swizzled rows
    static constexpr int FINISH_BYTES = V_DIM * 8;  // of a warpgroup: two floats a channel
    static constexpr int SHARED_BYTES = ALIGNMENT + Q_BYTES + Tiles::BYTES + Tiles::BARRIER_BYTES + WARPGROUPS * FINISH_BYTES;
    static constexpr int REGISTERS = 240, COPY_REGISTERS = 24;  // of a thread: 2 * 128 * 240 + 128 * 24 are all there are

    using Soft = Softmax<MODE, 1, KEYS, V_DIM, MASKED, 2>;
    using Pv = typename Soft::Pv;
    static constexpr int GROUPS = Soft::GROUPS;
    static constexpr bool IN_PLACE = Pv::IN_PLACE;
    using Part = typename Pv::Part[V_DIM / 8];

    // A maximum may pass the reference, which sums are relative to, by this (base 2) before they are brought to a new one: P is
    // relative to its tile's own maximum, and float32 has room. Where P is relative to the reference there is none.
    static constexpr float HEADROOM = Pv::P_AT_TILE ? 64.0f : 0.0f;

    // What a warpgroup keeps from one tile to the next.
    struct State {
        typename Soft::Rows rows;
        typename Soft::Scores s;
        Part part;            // this tile's sums of P V, unless they are added in place
        float base[1][2];     // what P's exponents are taken from
        float grow[2];        // 2^(base - reference), of the sums in `part`
        float k_scale[GROUPS];
    };

    template <class T, int A, int B> __device__ static T (&flat(T (&x)[A][B]))[A * B] { return reinterpret_cast<T(&)[A * B]>(x); }

    // Scores start at MAGIC, as Softmax wants them: the compiler hides these moves among the exponentials before.
    __device__ static void clear(typename Soft::Scores& s) {
#pragma unroll
        for (int n = 0; n < Soft::N; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) s[0][n][i] = MAGIC_BITS;
        wgmma::changed(flat(s[0]));
    }

    __device__ static void multiply_qk(typename Soft::Scores& s, uint64_t q, uint64_t k) {
#pragma unroll
        for (int step = 0; step < DIM / 32; ++step)
            wgmma::mma_s8(flat(s[0]), q + step * wgmma::STEP, k + step * wgmma::STEP);
        wgmma::commit();
    }

    // v: of the tile's rows, each 128 bytes of keys; of 2-byte codes two such panels.
    template <class Sums> __device__ static void multiply_pv(Sums& sums, const typename Soft::Probabilities& p, uint64_t v) {
#pragma unroll
        for (int step = 0; step < Soft::P_WORDS / 2; ++step) {
            const uint32_t a[4] = {p[0][0][2 * step], p[0][1][2 * step], p[0][0][2 * step + 1], p[0][1][2 * step + 1]};
            const uint64_t b = v + step / 4 * (V_DIM * WGMMA_PANEL / 16) + step % 4 * wgmma::STEP;
            const bool add = IN_PLACE || step > 0;
            if constexpr (p_type(MODE) == PType::u8) wgmma::mma_u8s8(flat(sums), a, b, add);
            else if constexpr (p_type(MODE) == PType::f16) wgmma::mma_f16(flat(sums), a, b, add);
            else wgmma::mma_e4m3(flat(sums), a, b, add);
        }
        wgmma::commit();
    }

    // One of the four sums of a thread in 8 channels.
    __device__ static float sum_of(const int32_t (&part)[4], int i) { return float(part[i]); }
    __device__ static float sum_of(const float (&part)[4], int i) { return part[i]; }
    __device__ static float sum_of(const uint32_t (&part)[2], int i) { return ptx::from_f16(uint16_t(part[i / 2] >> i % 2 * 16)); }

    // The sums of one tile to those of all.
    __device__ static void flush(State& state) {
        if constexpr (!IN_PLACE) {
#pragma unroll
            for (int j = 0; j < V_DIM / 8; ++j)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    float& sum = state.rows.acc[0][j][i];
                    if constexpr (Pv::P_AT_TILE) sum = fmaf(sum_of(state.part[j], i), state.grow[i / 2], sum);
                    else sum += sum_of(state.part[j], i);
                }
        }
    }

    // A row that has seen nothing has a maximum of -inf, from which nothing can be subtracted.
    __device__ static float finite(float top) { return top == -INFINITY ? 0.0f : top; }

    // Moves the reference up to `base` where that is too far above.
    __device__ static void rescale(State& state) {
        typename Soft::Rows& rows = state.rows;
        const bool moved = state.base[0][0] > rows.top[0][0] + HEADROOM || state.base[0][1] > rows.top[0][1] + HEADROOM;
        if (!__any_sync(0xFFFFFFFFu, moved)) return;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float top = fmaxf(rows.top[0][r], state.base[0][r]), shrink = ptx::exp2(rows.top[0][r] - finite(top));
            rows.top[0][r] = top;
            rows.total[0][r] *= shrink;
#pragma unroll
            for (int j = 0; j < V_DIM / 8; ++j) rows.acc[0][j][2 * r] *= shrink, rows.acc[0][j][2 * r + 1] *= shrink;
        }
    }

    // From the scores of a tile, which have just arrived, to what weigh() takes its exponents from.
    __device__ static void find_base(State& state, const typename Soft::Place& at, int tile, bool causal) {
        if (MASKED || tile >= at.whole_end) Soft::hide(state.s, at, state.rows, state.k_scale, tile * KEYS, causal);
        float tops[1][2];
        Soft::find_tops(tops, state.rows, state.s, state.k_scale);
#pragma unroll
        for (int r = 0; r < 2; ++r) state.base[0][r] = Pv::P_AT_TILE ? tops[0][r] : fmaxf(tops[0][r], state.rows.top[0][r]);
    }

    __device__ static void consume(const Call& call, const typename Soft::Place& at, const KCodes& k, const QCodes& q, const Tiles& tiles,
                                   uint32_t q_shared, State& state) {
        Soft::start(state.rows, call, at, q);
        const int count = at.tile_end - at.tile_begin;
        if (count == 0) return;
        const bool leads = threadIdx.x % 128 == 0;
        const uint64_t q_rows = wgmma::descriptor<DIM>(q_shared);
        const uint64_t k_rows = wgmma::descriptor<DIM>(tiles.k(0)), v_rows = wgmma::descriptor<WGMMA_PANEL>(tiles.v(0));
        const float* k_scales = k.scale + at.kv_row * call.k_groups() + int64_t(at.tile_begin) * GROUPS * call.k_sub +
                                threadIdx.x % 4 * call.k_sub / 4;
        float next_k_scale[GROUPS];
        const auto load_k_scale = [&](bool more) {
#pragma unroll
            for (int g = 0; g < GROUPS; ++g)
                if (more) next_k_scale[g] = k_scales[g * call.k_sub];
            k_scales += GROUPS * call.k_sub;
        };
        const auto take_k_scale = [&] {
#pragma unroll
            for (int g = 0; g < GROUPS; ++g) state.k_scale[g] = next_k_scale[g];
        };
#pragma unroll
        for (int j = 0; j < V_DIM / 8; ++j)
#pragma unroll
            for (int i = 0; i < int(sizeof(typename Pv::Part) / 4); ++i) state.part[j][i] = 0;
        state.grow[0] = state.grow[1] = 0.0f;

        load_k_scale(true);
        ptx::wait_barrier(tiles.full(0), 0);
        clear(state.s);
        wgmma::fence();
        multiply_qk(state.s, q_rows, k_rows);
        take_k_scale();
        bool large = Soft::large(state.rows, state.k_scale);
        load_k_scale(count > 1);
        int stage = 0, next = 1, phase = 0;  // of this tile; of the next, and the phase of its barrier
        ptx::wait_barrier(tiles.full(next), phase);
        wgmma::wait<0>();
        wgmma::changed(flat(state.s[0]));
        if (leads) ptx::arrive(tiles.k_free(0));
        find_base(state, at, at.tile_begin, call.is_causal);
        for (int tile = at.tile_begin; tile < at.tile_end; ++tile) {
            const bool more = tile + 1 < at.tile_end;
            if constexpr (IN_PLACE) rescale(state);
            float base[1][2];
#pragma unroll
            for (int r = 0; r < 2; ++r) base[0][r] = finite(state.base[0][r]);
            const typename Soft::Exponent exponent = Soft::exponent(state.s, state.rows, base, state.k_scale, call.p_max_log2, large);
            flush(state);
            typename Soft::Probabilities p;
            float sums[1][2];
            Soft::weigh(p, sums, state.s, exponent, base, call.p_max_log2);
            wgmma::changed(flat(p[0]));

            clear(state.s);

            // In the background from here on: the next tile's scores, first, and this tile's sums.
            wgmma::fence();
            multiply_qk(state.s, q_rows, k_rows + next * (K_BYTES / 16));
            if constexpr (IN_PLACE) multiply_pv(state.rows.acc[0], p, v_rows + stage * (V_BYTES / 16));
            else multiply_pv(state.part, p, v_rows + stage * (V_BYTES / 16));
            if constexpr (!IN_PLACE) rescale(state);
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float& total = state.rows.total[0][r];
                if constexpr (Pv::P_AT_TILE) {
                    state.grow[r] = ptx::exp2(state.base[0][r] - finite(state.rows.top[0][r]));
                    total = fmaf(sums[0][r], state.grow[r], total);
                } else {
                    total += sums[0][r];
                }
            }
            take_k_scale();
            large = Soft::large(state.rows, state.k_scale);
            load_k_scale(tile + 2 < at.tile_end);
            const int done = stage;
            stage = next;
            if (++next == Tiles::COUNT) next = 0, phase ^= 1;
            if (more) ptx::wait_barrier(tiles.full(next), phase);
            wgmma::wait<1>();
            wgmma::changed(flat(state.s[0]));
            if (leads && more) ptx::arrive(tiles.k_free(stage));
            if (more) find_base(state, at, tile + 1, call.is_causal);
            wgmma::wait<0>();
            if constexpr (IN_PLACE) wgmma::changed(flat(state.rows.acc[0]));
            else wgmma::changed(flat(state.part));
            wgmma::changed(flat(state.s[0]));
            if (leads) ptx::arrive(tiles.v_free(done));
        }
        flush(state);
    }

    __device__ static void run(const Call& call, const QCodes& q, const KCodes& k, const VCodes& v, const Stats& stats,
                               const Mask& mask, const Partials& partials, const View& out, float* lse) {
        extern __shared__ char shared[];
        const uint32_t q_shared = (ptx::shared_address(shared) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
        const Tiles tiles{q_shared + Q_BYTES};
        // The same in all threads of a warp: the shuffle shows that to the compiler, which then has descriptors ready in uniform registers.
        const int group = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 128, 0);
        const int warp = threadIdx.x / 32 - 4, thread = threadIdx.x % 128;  // of the warpgroups with queries; of a warpgroup
        typename Soft::Place at;
        if (!Soft::template locate<ROWS, uint32_t>(call, mask, warp, at)) return;

        // All that memory has to say is asked for at once, for each answer takes hundreds of clocks.
        const int32_t bad = stats.bad[at.kv_row];
        uint4 codes[DIM / 32];
        float2 finish;
        if (group > 0) {
            const int64_t first = at.q_row * call.q_padded() + at.row - warp % 4 * 16;
#pragma unroll
            for (int i = 0; i < DIM / 32; ++i) codes[i] = reinterpret_cast<const uint4*>(q.codes + first * DIM)[i * 128 + thread];
            if (thread < V_DIM) finish = finish_of(call, stats, at.kv_row, thread, at.k.n);
        }
        if (threadIdx.x == 0) tiles.init(WARPGROUPS);
        __syncthreads();
        if (bad) return;

        if (group == 0) {
            asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COPY_REGISTERS));
            if (threadIdx.x == 0)
                tiles.fill(k.codes + (at.kv_row * call.k_padded() + int64_t(at.tile_begin) * KEYS) * DIM,
                           v.codes + (at.kv_row * call.k_padded() + int64_t(at.tile_begin) * KEYS) * (V_DIM * v_bytes(MODE)),
                           at.tile_end - at.tile_begin);
            return;
        }
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
        const uint32_t own_q = q_shared + (group - 1) * 64 * DIM;
        const uint32_t own_finish = tiles.shared + Tiles::BYTES + Tiles::BARRIER_BYTES + (group - 1) * FINISH_BYTES;
#pragma unroll
        for (int i = 0; i < DIM / 32; ++i) {
            const int row = (i * 128 + thread) * 16 / DIM, byte = (i * 128 + thread) * 16 % DIM;
            ptx::store_shared16(own_q + row * DIM + swizzled(byte, row, DIM), codes[i]);
        }
        if (thread < V_DIM) ptx::store_shared8(own_finish + thread * 8, finish);
        ptx::publish_shared();
        ptx::meet(group, 128);
        State state;
        consume(call, at, k, q, tiles, own_q, state);
        Soft::write(call, at, state.rows, q, partials, out, lse, [&](int channel) {
            Finish f;
#pragma unroll
            for (int i = 0; i < 8; i += 2) {
                const uint4 two = ptx::load_shared16(own_finish + (channel + i) * 8);
                f.scale[i] = __uint_as_float(two.x), f.put_back[i] = __uint_as_float(two.y);
                f.scale[i + 1] = __uint_as_float(two.z), f.put_back[i + 1] = __uint_as_float(two.w);
            }
            return f;
        });
    }
};

template <Mode MODE, int DIM, int V_DIM, bool MASKED>
__global__ void __launch_bounds__(WgmmaAttention<MODE, DIM, V_DIM, MASKED>::THREADS, 1)
    attention_wgmma(const Call call, const QCodes q, const KCodes k, const VCodes v, const Stats stats, const Mask mask,
                    const Partials partials, const View out, float* lse) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    WgmmaAttention<MODE, DIM, V_DIM, MASKED>::run(call, q, k, v, stats, mask, partials, out, lse);
#endif
}

}  // namespace sage
