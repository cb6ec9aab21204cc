// Attention with mma.sync: INT8 Q K^T and PV in any mode, for compute capability 7.5 and newer.
//
// A block of warps shares one block of queries; every warp holds its own rows' scores, probabilities and outputs in registers,
// and all walk over tiles of keys that copies bring into shared memory ahead of time. K and V codes come in rows of 64 bytes
// (params.h) such that a tile is one stretch of memory, and the 16 bytes at lane * 16 of every 512 are the lane's part of a B
// operand for two instructions: no address arithmetic, no bank conflicts. docs/cuda.md draws it.
#pragma once

#include "common/copies.cuh"
#include "common/epilogue.cuh"
#include "common/mask.cuh"
#include "common/pv.cuh"
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
    static constexpr int N = KEYS / 8;           // columns of 8 keys
    static constexpr int GROUPS = KEYS / PANEL;  // of keys that share a K scale
    static constexpr int THREADS = TILE.warps * 32;
    static constexpr int K_BYTES = KEYS * DIM, V_BYTES = KEYS * V_DIM * v_bytes(MODE);
    using TileCopies = Copies<THREADS, K_BYTES, V_BYTES>;
    static constexpr int P_WORDS = KEYS * v_bytes(MODE) / 16;  // of a row half, in one thread
    static constexpr int V_ROWS = KEYS * v_bytes(MODE) / PANEL;  // 64-byte rows of one channel in a tile
    static constexpr int J = TILE.chains;
    using Pv = PV<MODE>;

    // A thread's scores: floats of value MAGIC + code; with a mask, real scores once hide() has been there.
    using Scores = int32_t[M][N][4];
    using Probabilities = uint32_t[M][2][P_WORDS];

    // Everything of one block that does not change from tile to tile.
    struct Place {
        Span q, k;
        int64_t q_row, kv_row;
        int head;
        int row;                   // first query of this thread's warp
        int tile_begin, tile_end;  // of the block
        int whole_end;             // tiles before it have no key that a row of this thread's warp may not see
        int split;
        Mask mask;
    };

    struct Rows {
        float top[M][2];     // largest score so far, base 2
        float total[M][2];   // this thread's part of the sum of p
        float scale[M][2];   // of Q
        typename Pv::Acc acc[M][V_DIM / 8];
    };

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

    // --- softmax --------------------------------------------------------------------------------------------------------------------

    __device__ static float quad_max(float x) {
        x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 1));
        return fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 2));
    }

    // What a code counts. Never 0, as it is where q or k is: what is hidden is -inf then, too, and -inf * 0 is not.
    __device__ static float scale_of(float q_scale, float k_scale) { return fmaxf(q_scale * k_scale, 1e-30f); }

    // -inf where a key is hidden. With a mask the codes become scores, for a mask may say -1e38.
    __device__ static void hide(Scores& s, const Place& at, const Rows& rows, const float (&k_scale)[GROUPS], int first_key, bool causal) {
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int n = 0; n < N; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int query = at.row + m * 16 + i / 2 * 8 + lane() / 4;
                    const int key = first_key + n * 8 + lane() % 4 * 2 + i % 2;
                    float x = __int_as_float(s[m][n][i]);
                    if (MASKED) {
                        x = (x - MAGIC) * scale_of(rows.scale[m][i / 2], k_scale[n / 8]);
                        if (query < at.q.n && key < at.k.n) x = masked(x, at.mask, query, key);
                    }
                    if (key >= at.k.n || (causal && key > query)) x = -INFINITY;
                    s[m][n][i] = __float_as_int(x);
                }
    }

    // The largest of a thread's scores of a row and PANEL keys. Codes are positive floats or -inf, which compare as integers.
    __device__ static float largest(const int32_t (&s)[N][4], int n0, int r) {
        int32_t code = s[n0][2 * r];
        float score = __int_as_float(code);
#pragma unroll
        for (int n = n0; n < n0 + 8; ++n) {
            code = max(max(code, s[n][2 * r]), s[n][2 * r + 1]);
            score = fmaxf(score, fmaxf(__int_as_float(s[n][2 * r]), __int_as_float(s[n][2 * r + 1])));
        }
        return MASKED ? score : __int_as_float(code);
    }

    // The maxima of a tile's rows, rounded up so that no score is above its own, and what earlier sums and P must be multiplied
    // with. base: what P's exponents are taken from.
    __device__ static void raise(Turn (&turn)[M], float (&base)[M][2], Rows& rows, const Scores& s, const float (&k_scale)[GROUPS]) {
#pragma unroll
        for (int m = 0; m < M; ++m) {
            turn[m].moved = false;
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float tile_top = -INFINITY;
#pragma unroll
                for (int g = 0; g < GROUPS; ++g) {
                    const float top = largest(s[m], 8 * g, r);
                    tile_top = fmaxf(tile_top, MASKED ? top : __fmul_ru(top - MAGIC, scale_of(rows.scale[m][r], k_scale[g])));
                }
                tile_top = quad_max(tile_top);
                const float old_top = rows.top[m][r], new_top = fmaxf(old_top, tile_top);
                const float safe_top = new_top == -INFINITY ? 0.0f : new_top;  // nothing seen yet
                turn[m].shrink[r] = ptx::exp2(old_top - safe_top);
                turn[m].grow[r] = Pv::P_AT_TILE ? ptx::exp2(tile_top - safe_top) : 1.0f;
                turn[m].moved |= new_top != old_top;
                base[m][r] = !Pv::P_AT_TILE ? safe_top : tile_top == -INFINITY ? 0.0f : tile_top;
                rows.top[m][r] = new_top;
                rows.total[m][r] *= turn[m].shrink[r];
            }
        }
    }

    // weigh's fast way rounds MAGIC * scale, which is an error of the exponent. Where it would show, the codes become scores less
    // their base instead, rounded as in raise, so that a row's largest is 0. Returns whether they did.
    __device__ static bool subtract_base(Scores& s, const Rows& rows, const float (&base)[M][2], const float (&k_scale)[GROUPS]) {
        constexpr float LARGE = 1.0f / 1024;  // the error stays below this; the scale of ordinary inputs is near 1e-4
        bool large = false;
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int g = 0; g < GROUPS; ++g)
                large |= fmaxf(rows.scale[m][0], rows.scale[m][1]) * k_scale[g] > LARGE;
        if (!__any_sync(0xFFFFFFFFu, large)) return false;
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int n = 0; n < N; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float score = __fmul_ru(__int_as_float(s[m][n][i]) - MAGIC, scale_of(rows.scale[m][i / 2], k_scale[n / 8]));
                    s[m][n][i] = __float_as_int(score - base[m][i / 2]);
                }
        return true;
    }

    // p = 2^(score - base), its sum to the rows' totals, its codes to p. Everything is rounded such that p never passes P's
    // largest, for its codes have no room above that. subtracted: by subtract_base.
    __device__ static void weigh(Probabilities& p, const Scores& s, Rows& rows, const Turn (&turn)[M], const float (&base)[M][2],
                                 const float (&k_scale)[GROUPS], float p_max_log2, bool subtracted) {
        constexpr int WORDS = P_WORDS / GROUPS, COLUMNS = 8 / WORDS;  // columns of 8 keys in one word: 1 or 2
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float sum = 0.0f;
#pragma unroll
                for (int g = 0; g < GROUPS; ++g) {
                    // x * scale + offset, where x is MAGIC + code
                    const float scale = subtracted ? 1.0f : scale_of(rows.scale[m][r], k_scale[g]);
                    const float offset = subtracted ? p_max_log2 : __fmaf_rd(-MAGIC, scale, __fsub_rd(p_max_log2, base[m][r]));
#pragma unroll
                    for (int w = g * WORDS; w < (g + 1) * WORDS; ++w) {
                        float values[2 * COLUMNS];
#pragma unroll
                        for (int i = 0; i < 2 * COLUMNS; ++i) {
                            const float x = __int_as_float(s[m][w * COLUMNS + i / 2][2 * r + i % 2]);
                            values[i] = ptx::exp2(MASKED ? x - base[m][r] + p_max_log2 : fmaf(x, scale, offset));
                            sum += values[i];
                        }
                        p[m][r][w] = Pv::pack(values);
                    }
                }
                rows.total[m][r] = Pv::P_AT_TILE ? fmaf(sum, turn[m].grow[r], rows.total[m][r]) : rows.total[m][r] + sum;
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

    // A thread's outputs of four columns are 8 neighbouring channels (params.h, channel_row).
    __device__ static void write(const Call& call, const Place& at, const Rows& rows, const Stats& stats, const QCodes& q,
                                 const Partials& partials, const View& out, float* lse) {
        float total[M][2];
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float x = rows.total[m][r];
                x += __shfl_xor_sync(0xFFFFFFFFu, x, 1);
                total[m][r] = x + __shfl_xor_sync(0xFFFFFFFFu, x, 2);
            }
#pragma unroll
        for (int group = 0; group < V_DIM / 32; ++group) {
            const int channel = group * 32 + lane() % 4 * 8;
            Finish finish;
            if (call.splits == 1) finish = Finish::of(call, stats, at.kv_row, channel, at.k.n);
#pragma unroll
            for (int m = 0; m < M; ++m)
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const int query = at.row + m * 16 + r * 8 + lane() / 4;
                    if (query >= at.q.n) continue;
                    float x[8];
#pragma unroll
                    for (int i = 0; i < 8; ++i) x[i] = Pv::value(rows.acc[m][group * 4 + i / 2], 2 * r + i % 2);
                    if (call.splits > 1) {
                        const int64_t row = (at.split * call.q_rows() + at.q_row) * call.q_padded() + query;
                        float4* to = reinterpret_cast<float4*>(partials.out + row * V_DIM + channel);
                        to[0] = make_float4(x[0], x[1], x[2], x[3]);
                        to[1] = make_float4(x[4], x[5], x[6], x[7]);
                        if (channel == 0) {
                            partials.top[row] = rows.top[m][r];
                            partials.total[row] = total[m][r];
                        }
                        continue;
                    }
                    const float inverse = total[m][r] == 0.0f ? 0.0f : 1.0f / total[m][r];
#pragma unroll
                    for (int i = 0; i < 8; ++i) x[i] = finish.apply(x[i], inverse, i);
                    const int b = at.q_row / call.heads;
                    const int64_t to = (call.cu_q ? 0 : b) * out.b + at.head * out.h + (at.q.first + query) * out.n + channel;
                    store8(call, out.data, to, channel, x);
                    if (call.return_lse && channel == 0) {
                        const float shift = q.lse_shift ? q.lse_shift[at.q_row * call.q_padded() + query] : 0.0f;
                        lse[at.q_row * call.nq + query] = log_sum_exp(call, rows.top[m][r], total[m][r], shift);
                    }
                }
        }
    }

    // --- the kernel -----------------------------------------------------------------------------------------------------------------

    // Where this block works; false if it has nothing to do.
    __device__ static bool locate(const Call& call, const Stats& stats, const Mask& mask, Place& at) {
        int64_t index = ptx::block_index();
        const int blocks = (call.nq + TILE.rows() - 1) / TILE.rows();
        int block = int(index % blocks);
        if (call.is_causal) block = blocks - 1 - block;  // the longest first
        index /= blocks;
        at.split = int(index % call.splits);
        at.q_row = index / call.splits;
        const int b = int(at.q_row / call.heads);
        at.head = int(at.q_row % call.heads);
        at.kv_row = int64_t(b) * call.kv_heads + at.head / call.group();
        at.q = span(call.cu_q, b, call.nq);
        at.k = span(call.cu_k, b, call.nk);
        const int first = block * TILE.rows();
        at.row = first + threadIdx.x / 32 * ROWS;
        if (first >= at.q.n || stats.bad[at.kv_row]) return false;
        const int stop = call.is_causal ? min(at.k.n, first + TILE.rows()) : at.k.n;
        const int tiles = (stop + KEYS - 1) / KEYS;
        const int share = (tiles + call.splits - 1) / call.splits;
        at.tile_begin = min(tiles, at.split * share);
        at.tile_end = min(tiles, at.tile_begin + share);
        at.whole_end = (call.is_causal ? min(at.k.n, at.row + 1) : at.k.n) / KEYS;
        if (MASKED) at.mask = mask_of_head(mask, b, at.head);
        return true;
    }

    // One barrier a tile, between the maxima and the exponentials: the products of one tile run into the scores of the next.
    __device__ static void run(const Call& call, const QCodes& q, const KCodes& k, const VCodes& v, const Stats& stats,
                               const Mask& mask, const Partials& partials, const View& out, float* lse) {
        extern __shared__ __align__(128) char shared[];  // two tiles of K and V: one in use, one on its way; then Q
        Place at;
        if (!locate(call, stats, mask, at)) return;
        const int64_t k_row = at.kv_row * call.k_padded();
        TileCopies copies(shared, k.codes + k_row * DIM + int64_t(at.tile_begin) * K_BYTES,
                          v.codes + k_row * (V_DIM * v_bytes(MODE)) + int64_t(at.tile_begin) * V_BYTES);
        const int tiles = at.tile_end - at.tile_begin;
        copies.start(tiles > 0, false);
        copies.start(tiles > 1, tiles > 0);
        uint32_t k_here = ptx::shared_address(shared) + lane() * 16, v_here = k_here + TileCopies::V_OFFSET;  // this lane's operands
        const uint32_t q_shared = k_here + TileCopies::SHARED_BYTES + threadIdx.x / 32 * (ROWS * DIM);
        const int8_t* q_codes = q.codes + (at.q_row * call.q_padded() + at.row) * DIM;

        Rows rows;
        const float* q_scales = q.scale + at.q_row * call.q_groups();
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int query = at.row + m * 16 + r * 8 + lane() / 4;
                rows.scale[m][r] = q_scales[query / call.q_block * call.q_sub + query % 8 * call.q_sub / 8];
                rows.top[m][r] = -INFINITY;
                rows.total[m][r] = 0.0f;
            }
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int j = 0; j < V_DIM / 8; ++j)
#pragma unroll
                for (int i = 0; i < int(sizeof(typename Pv::Acc) / 4); ++i) rows.acc[m][j][i] = 0;
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
        copies.land();
        __syncthreads();
        Operands k_first, v_first;
        load_k(k_first, k_here, 0);
        int k_step = K_BYTES, v_step = V_BYTES;  // to the other tile and back
        for (int tile = at.tile_begin; tile < at.tile_end; ++tile) {
            float k_scale[GROUPS];
#pragma unroll
            for (int g = 0; g < GROUPS; ++g) k_scale[g] = next_k_scale[g];
            load_k_scale(tile + 1 < at.tile_end);
            Scores s;
            multiply_qk(s, held, q_shared, k_here, k_first);
            if (MASKED || tile >= at.whole_end) hide(s, at, rows, k_scale, tile * KEYS, call.is_causal);
            Turn turn[M];
            float base[M][2];
            raise(turn, base, rows, s, k_scale);
            const bool subtracted = !MASKED && subtract_base(s, rows, base, k_scale);
            // Here V of this tile and K of the next have landed, and all are done with K of this one and V of the one before.
            copies.land();
            __syncthreads();
            copies.start(tile + 2 < at.tile_end, tile + 1 < at.tile_end);
            load_v(v_first, v_here, 0);
            Probabilities p;
            weigh(p, s, rows, turn, base, k_scale, call.p_max_log2, subtracted);
            k_here += k_step;
            multiply_pv(rows, p, turn, v_here, v_first, k_first, k_here);
            v_here += v_step;
            k_step = -k_step;
            v_step = -v_step;
        }
        locate(call, stats, mask, at);  // once more, rather than to hold it in registers through the loop
        write(call, at, rows, stats, q, partials, out, lse);
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
