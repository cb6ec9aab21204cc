// Attention with mma.sync: INT8 Q K^T and PV in any mode, for compute capability 7.5 and newer.
//
// A block of warps shares one block of queries; every warp holds its own rows' scores, probabilities and outputs in registers,
// and all walk over tiles of keys that copies bring into shared memory ahead of time. K and V codes come in rows of 64 bytes
// (params.h) such that a tile is one stretch of memory, and the 16 bytes at lane * 16 of every 512 are the lane's part of a B
// operand for two instructions: no address arithmetic, no bank conflicts. docs/cuda.md draws it.
#pragma once

#include "common/copies.cuh"
#include "common/softmax.cuh"
#include "params.h"
#include "tiles.h"

namespace sage {

template <Mode MODE, int DIM, int V_DIM, bool MASKED> struct Attention {
#ifdef __CUDA_ARCH__
    static constexpr Tile TILE = tile_for(MODE, DIM, V_DIM, __CUDA_ARCH__ / 10);
#else
    static constexpr Tile TILE = tile_for(MODE, DIM, V_DIM, 0);
#endif
    static constexpr int M = TILE.m_tiles;           // 16-row tiles of a warp
    static constexpr int ROWS = 16 * M;              // rows of a warp
    static constexpr int KEYS = TILE.keys;
    static constexpr int THREADS = TILE.warps * 32;
    static constexpr int K_BYTES = KEYS * DIM, V_BYTES = KEYS * V_DIM * v_bytes(MODE);
    using TileCopies = Copies<THREADS, K_BYTES, V_BYTES>;
    static constexpr int V_ROWS = KEYS * v_bytes(MODE) / PANEL;  // 64-byte rows of one channel in a tile
    static constexpr int J = TILE.chains;
    using Soft = Softmax<MODE, M, KEYS, V_DIM, MASKED, false>;
    using Pv = typename Soft::Pv;
    using Scores = typename Soft::Scores;
    using Probabilities = typename Soft::Probabilities;
    using Rows = typename Soft::Rows;
    static constexpr int N = Soft::N, GROUPS = Soft::GROUPS;

    __device__ static int lane() { return threadIdx.x % 32; }

    // --- scores ---------------------------------------------------------------------------------------------------------------------

    // Q's A operands for 64 channels: two instructions' words for rows r and r + 8 of each 16-row tile.
    struct QPart {
        uint4 low[M], high[M];
    };
    static constexpr int HALVES = DIM / 64;

    __device__ static QPart load_q(const int8_t* codes, int half) {
        QPart part;
#pragma unroll
        for (int m = 0; m < M; ++m) {
            const int8_t* at = codes + (m * 16 + lane() / 4) * DIM + half * 64 + lane() % 4 * 16;
            part.low[m] = *reinterpret_cast<const uint4*>(at);
            part.high[m] = *reinterpret_cast<const uint4*>(at + 8 * DIM);
        }
        return part;
    }

    // J columns of keys, 64 channels of each.
    using Operands = uint4[J];
    static constexpr int QK_STEPS = HALVES * N / J;
    __device__ static void load_k(Operands& b, uint32_t k, int step) {
        const int half = step / (N / J), n0 = step % (N / J) * J;
#pragma unroll
        for (int j = 0; j < J; ++j)
            b[j] = ptx::load_shared16(k + n0 / 8 * (PANEL * DIM) + half * (PANEL * PANEL) + (n0 % 8 + j) * 512);
    }

    // first: load_k of step 0, which the caller asks for ahead of time.
    __device__ static void multiply_qk(Scores& s, const QPart (&held)[TILE.q_held ? HALVES : 1], uint32_t q, uint32_t k,
                                       const Operands& first) {
        const int32_t magic[4] = {MAGIC_BITS, MAGIC_BITS, MAGIC_BITS, MAGIC_BITS};
        Operands b[2];  // one in use, one on its way
#pragma unroll
        for (int j = 0; j < J; ++j) b[0][j] = first[j];
        QPart part;
#pragma unroll
        for (int step = 0; step < QK_STEPS; ++step) {
            const int half = step / (N / J), n0 = step % (N / J) * J;
            if (n0 == 0) part = TILE.q_held ? held[TILE.q_held ? half : 0] : load_shared_q(q, half);
            if (step + 1 < QK_STEPS) load_k(b[(step + 1) % 2], k, step + 1);
#pragma unroll
            for (int j = 0; j < J; ++j)
#pragma unroll
                for (int m = 0; m < M; ++m) {
                    const uint32_t a[4] = {part.low[m].x, part.high[m].x, part.low[m].y, part.high[m].y};
                    if (half == 0) ptx::mma_s8(s[m][n0 + j], a, b[step % 2][j].x, b[step % 2][j].y, magic);
                    else ptx::mma_s8(s[m][n0 + j], a, b[step % 2][j].x, b[step % 2][j].y, s[m][n0 + j]);
                }
#pragma unroll
            for (int j = 0; j < J; ++j)
#pragma unroll
                for (int m = 0; m < M; ++m) {
                    const uint32_t a[4] = {part.low[m].z, part.high[m].z, part.low[m].w, part.high[m].w};
                    ptx::mma_s8(s[m][n0 + j], a, b[step % 2][j].z, b[step % 2][j].w, s[m][n0 + j]);
                }
        }
    }

    // Where Q does not fit beside the rest in registers, its operands lie in shared memory, lane by lane.
    __device__ static QPart load_shared_q(uint32_t q, int half) {
        QPart part;
#pragma unroll
        for (int m = 0; m < M; ++m) {
            part.low[m] = ptx::load_shared16(q + (half * M + m) * 1024);
            part.high[m] = ptx::load_shared16(q + (half * M + m) * 1024 + 512);
        }
        return part;
    }
    __device__ static void store_shared_q(uint32_t q, const QPart& part, int half) {
#pragma unroll
        for (int m = 0; m < M; ++m) {
            ptx::store_shared16(q + (half * M + m) * 1024, part.low[m]);
            ptx::store_shared16(q + (half * M + m) * 1024 + 512, part.high[m]);
        }
    }

    // --- softmax ----------------------------------------------------------------------------------------------------------------------

    // The rows' maxima after a tile, and what earlier sums and P must be multiplied with. base: what P's exponents are taken from.
    __device__ static void raise(Turn (&turn)[M], float (&base)[M][2], Rows& rows, const Scores& s, const typename Soft::Scales& scale) {
        float tops[M][2];
        Soft::find_tops(tops, s, scale);
#pragma unroll
        for (int m = 0; m < M; ++m) {
            turn[m].moved = false;
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const float top = fmaxf(Soft::quad_max(tops[m][r]), Soft::NOTHING);
                const float old_top = rows.top[m][r], new_top = fmaxf(old_top, top);
                turn[m].shrink[r] = ptx::exp2(old_top - new_top);
                turn[m].grow[r] = Pv::P_AT_TILE ? ptx::exp2(top - new_top) : 1.0f;
                turn[m].moved |= new_top != old_top;
                base[m][r] = Pv::P_AT_TILE ? top : new_top;
                rows.top[m][r] = new_top;
                rows.total[m][r] *= turn[m].shrink[r];
            }
        }
    }

    // --- outputs --------------------------------------------------------------------------------------------------------------------

    // J columns of channels, 64 bytes of keys of each.
    static constexpr int PV_STEPS = V_DIM / 8 / J * V_ROWS;
    __device__ static void load_v(Operands& b, uint32_t v, int step) {
        const int j0 = step / V_ROWS * J, row = step % V_ROWS;
#pragma unroll
        for (int j = 0; j < J; ++j) b[j] = ptx::load_shared16(v + row * (V_DIM * PANEL) + (j0 + j) * 512);
    }

    // first: load_v of step 0; next: load_k of step 0 of the next tile.
    __device__ static void multiply_pv(Rows& rows, const Probabilities& p, const Turn (&turn)[M], uint32_t v, const Operands& first,
                                       Operands& next, uint32_t next_k) {
        if constexpr (Pv::IN_PLACE) {
#pragma unroll
            for (int m = 0; m < M; ++m)
                if (__any_sync(0xFFFFFFFFu, turn[m].moved))
#pragma unroll
                    for (int j = 0; j < V_DIM / 8; ++j) Pv::rescale(rows.acc[m][j], turn[m]);
        }
        Operands b[2];
#pragma unroll
        for (int j = 0; j < J; ++j) b[0][j] = first[j];
        typename Pv::Part part[M][J];
#pragma unroll
        for (int step = 0; step < PV_STEPS; ++step) {
            const int j0 = step / V_ROWS * J, row = step % V_ROWS;
            if (step + 1 < PV_STEPS) load_v(b[(step + 1) % 2], v, step + 1);
            else load_k(next, next_k, 0);
            if (row == 0)
#pragma unroll
                for (int m = 0; m < M; ++m)
#pragma unroll
                    for (int j = 0; j < J; ++j) Pv::begin(part[m][j], rows.acc[m][j0 + j]);
#pragma unroll
            for (int j = 0; j < J; ++j)
#pragma unroll
                for (int m = 0; m < M; ++m) {
                    const uint32_t a[4] = {p[m][0][4 * row], p[m][1][4 * row], p[m][0][4 * row + 1], p[m][1][4 * row + 1]};
                    Pv::mma(part[m][j], a, b[step % 2][j].x, b[step % 2][j].y);
                }
#pragma unroll
            for (int j = 0; j < J; ++j)
#pragma unroll
                for (int m = 0; m < M; ++m) {
                    const uint32_t a[4] = {p[m][0][4 * row + 2], p[m][1][4 * row + 2], p[m][0][4 * row + 3], p[m][1][4 * row + 3]};
                    Pv::mma(part[m][j], a, b[step % 2][j].z, b[step % 2][j].w);
                }
            if (row == V_ROWS - 1)
#pragma unroll
                for (int m = 0; m < M; ++m)
#pragma unroll
                    for (int j = 0; j < J; ++j) Pv::flush(rows.acc[m][j0 + j], part[m][j], turn[m]);
        }
    }

    // --- the kernel -----------------------------------------------------------------------------------------------------------------

    // One barrier a tile, between the maxima and the exponentials: the products of one tile run into the scores of the next.
    __device__ static void run(const Call& call, const QCodes& q, const KCodes& k, const VCodes& v, const Stats& stats,
                               const Mask& mask, const Partials& partials, const View& out, float* lse) {
        extern __shared__ __align__(128) char shared[];  // two tiles of K and V: one in use, one on its way; then Q
        const int warp = threadIdx.x / 32;
        typename Soft::Place at;
        if (!Soft::template locate<TILE.rows(), int64_t>(call, mask, warp, ptx::block_index(), at) || stats.bad[at.kv_row]) return;
        const int64_t k_row = at.kv_row * call.k_padded();
        TileCopies copies(shared, k.codes + k_row * DIM + int64_t(at.tile_begin) * K_BYTES,
                          v.codes + k_row * (V_DIM * v_bytes(MODE)) + int64_t(at.tile_begin) * V_BYTES);
        const int tiles = at.tile_end - at.tile_begin;
        copies.start(tiles > 0, false, 0);
        copies.start(tiles > 1, tiles > 0, 1);
        const uint32_t own = ptx::shared_address(shared) + lane() * 16;  // this lane's operands
        const uint32_t q_shared = own + TileCopies::SHARED_BYTES + warp * (ROWS * DIM);
        const int8_t* q_codes = q.codes + (at.q_row * call.q_padded() + at.row) * DIM;

        Rows rows;
        Soft::load_q_scales(rows, call, at, q);
        Soft::start(rows);
        QPart held[TILE.q_held ? HALVES : 1];
#pragma unroll
        for (int half = 0; half < HALVES; ++half) {
            const QPart part = load_q(q_codes, half);
            if constexpr (TILE.q_held) held[half] = part;
            else store_shared_q(q_shared, part, half);  // read back by the same lane
        }

        const float* k_scales = k.scale + at.kv_row * call.k_groups() + int64_t(at.tile_begin) * GROUPS * call.k_sub +
                                lane() % 4 * call.k_sub / 4;
        float next_k_scale[GROUPS] = {};
        const auto load_k_scale = [&](bool more) {
#pragma unroll
            for (int g = 0; g < GROUPS; ++g)
                if (more) next_k_scale[g] = k_scales[g * call.k_sub];
            k_scales += GROUPS * call.k_sub;
        };
        load_k_scale(tiles > 0);
        copies.land(0);
        __syncthreads();
        Operands k_first, v_first;
        load_k(k_first, own, 0);
        int which = 0;  // which of the two tiles in shared memory
        for (int tile = at.tile_begin; tile < at.tile_end; ++tile) {
            float k_scale[GROUPS];
#pragma unroll
            for (int g = 0; g < GROUPS; ++g) k_scale[g] = next_k_scale[g];
            load_k_scale(tile + 1 < at.tile_end);
            Scores s;
            multiply_qk(s, held, q_shared, own + which * K_BYTES, k_first);
            typename Soft::Scales scale;
            Soft::template scales<true>(scale, rows, k_scale);
            if (MASKED || tile >= at.whole_end) Soft::hide(s, at, scale, tile * KEYS, call.is_causal);
            Turn turn[M];
            float base[M][2];
            raise(turn, base, rows, s, scale);
            const typename Soft::Exponent exponent = Soft::exponent(s, base, scale, call.p_max_log2, Soft::large(scale));
            // Here V of this tile and K of the next have landed, and all are done with K of this one and V of the one before.
            copies.land(which ^ 1);
            __syncthreads();
            copies.start(tile + 2 < at.tile_end, tile + 1 < at.tile_end, which);
            const uint32_t v_here = own + TileCopies::V_OFFSET + which * V_BYTES;
            load_v(v_first, v_here, 0);
            Probabilities p;
            float sums[M][2];
            Soft::weigh(p, sums, s, exponent, base, call.p_max_log2);
#pragma unroll
            for (int m = 0; m < M; ++m)
#pragma unroll
                for (int r = 0; r < 2; ++r) rows.total[m][r] += Pv::P_AT_TILE ? sums[m][r] * turn[m].grow[r] : sums[m][r];
            which ^= 1;
            multiply_pv(rows, p, turn, v_here, v_first, k_first, own + which * K_BYTES);
        }
        // Once more, rather than to hold it in registers through the loop.
        Soft::template locate<TILE.rows(), int64_t>(call, mask, warp, ptx::block_index(), at);
        Soft::write(call, at, rows, q, partials, out, lse,
                    [&](int channel) { return Finish::of(call, stats, at.kv_row, channel, at.k.n); });
    }
};

template <Mode MODE, int DIM, int V_DIM, bool MASKED>
__global__ void __launch_bounds__(Attention<MODE, DIM, V_DIM, MASKED>::THREADS, Attention<MODE, DIM, V_DIM, MASKED>::TILE.blocks)
    attention_mma(const Call call, const QCodes q, const KCodes k, const VCodes v, const Stats stats, const Mask mask,
                  const Partials partials, const View out, float* lse) {
#ifdef __CUDA_ARCH__
    if constexpr (has_mode(MODE, __CUDA_ARCH__ / 10))
        Attention<MODE, DIM, V_DIM, MASKED>::run(call, q, k, v, stats, mask, partials, out, lse);
#endif
}

}  // namespace sage
