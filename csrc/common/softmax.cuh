// What attention_mma and attention_wgmma share: a thread's scores, their online softmax, and the way out.
//
// In both a warp owns rows of 16 queries, and a thread has, of rows lane / 4 and lane / 4 + 8, the columns lane % 4 * 2 and the
// one after it of every 8: that is how the matrix instructions hand out their results.
#pragma once

#include "epilogue.cuh"
#include "mask.cuh"
#include "pv.cuh"

namespace sage {

// M: 16-row tiles of a warp. KEYS: of a tile. CHAINS: in which a row's maximum is sought, each of which waits for itself alone.
template <Mode MODE, int M, int KEYS, int V_DIM, bool MASKED, int CHAINS> struct Softmax {
    static constexpr int N = KEYS / 8;           // columns of 8 keys
    static constexpr int GROUPS = KEYS / PANEL;  // of keys that share a K scale
    static constexpr int P_WORDS = KEYS * v_bytes(MODE) / 16;  // of a row half, in one thread
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

    // Nothing seen yet.
    __device__ static void start(Rows& rows, const Call& call, const Place& at, const QCodes& q) {
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
    }

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
        int32_t code[2] = {s[n0][2 * r], s[n0 + 1][2 * r]};
        float score = __int_as_float(code[0]);
#pragma unroll
        for (int n = n0; n < n0 + 8; ++n) {
            code[n % CHAINS] = max(max(code[n % CHAINS], s[n][2 * r]), s[n][2 * r + 1]);
            score = fmaxf(score, fmaxf(__int_as_float(s[n][2 * r]), __int_as_float(s[n][2 * r + 1])));
        }
        return MASKED ? score : __int_as_float(max(code[0], code[CHAINS - 1]));
    }

    // The largest score of each row of a tile, rounded up so that none is above it.
    __device__ static void find_tops(float (&tops)[M][2], const Rows& rows, const Scores& s, const float (&k_scale)[GROUPS]) {
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float top = -INFINITY;
#pragma unroll
                for (int g = 0; g < GROUPS; ++g) {
                    const float one = largest(s[m], 8 * g, r);
                    top = fmaxf(top, MASKED ? one : __fmul_ru(one - MAGIC, scale_of(rows.scale[m][r], k_scale[g])));
                }
                tops[m][r] = quad_max(top);
            }
    }

    // p = 2^(x * scale + offset) for x = MAGIC + code.
    struct Exponent {
        float scale[M][2][GROUPS], offset[M][2][GROUPS];
    };

    // Whether codes count so much that the rounding of an exponent's offset would show.
    __device__ static bool large(const Rows& rows, const float (&k_scale)[GROUPS]) {
        constexpr float LARGE = 1.0f / 1024;  // of a scale: MAGIC * scale is then exact to 2^-10; ordinary inputs have some 1e-4
        bool large = false;
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int r = 0; r < 2; ++r)
#pragma unroll
                for (int g = 0; g < GROUPS; ++g) large |= scale_of(rows.scale[m][r], k_scale[g]) > LARGE;
        return !MASKED && __any_sync(0xFFFFFFFFu, large);
    }

    // base: of each row, what is taken from its scores. Everything is rounded such that p never passes P's largest, for its codes
    // have no room above that. Where `large`, the codes become scores less their base, rounded as in find_tops, so that a row's
    // largest is 0. With a mask all of them are scores, and weigh() subtracts.
    __device__ static Exponent exponent(Scores& s, const Rows& rows, const float (&base)[M][2], const float (&k_scale)[GROUPS],
                                        float p_max_log2, bool large) {
        Exponent e;
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int r = 0; r < 2; ++r)
#pragma unroll
                for (int g = 0; g < GROUPS; ++g) {
                    const float scale = scale_of(rows.scale[m][r], k_scale[g]);
                    e.scale[m][r][g] = scale;
                    e.offset[m][r][g] = __fmaf_rd(-MAGIC, scale, __fsub_rd(p_max_log2, base[m][r]));
                }
        if (!large) return e;
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int n = 0; n < N; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float score = __fmul_ru(__int_as_float(s[m][n][i]) - MAGIC, e.scale[m][i / 2][n / 8]);
                    s[m][n][i] = __float_as_int(score - base[m][i / 2]);
                }
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int r = 0; r < 2; ++r)
#pragma unroll
                for (int g = 0; g < GROUPS; ++g) e.scale[m][r][g] = 1.0f, e.offset[m][r][g] = p_max_log2;
        return e;
    }

    // The codes of p, and this thread's sums of it.
    __device__ static void weigh(Probabilities& p, float (&sums)[M][2], const Scores& s, const Exponent& e, const float (&base)[M][2],
                                 float p_max_log2) {
        constexpr int WORDS = P_WORDS / GROUPS, COLUMNS = 8 / WORDS;  // columns of 8 keys in one word: 1 or 2
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float sum = 0.0f;
#pragma unroll
                for (int w = 0; w < P_WORDS; ++w) {
                    const int g = w / WORDS;
                    float values[2 * COLUMNS];
#pragma unroll
                    for (int i = 0; i < 2 * COLUMNS; ++i) {
                        const float x = __int_as_float(s[m][w * COLUMNS + i / 2][2 * r + i % 2]);
                        values[i] = ptx::exp2(MASKED ? x - base[m][r] + p_max_log2 : fmaf(x, e.scale[m][r][g], e.offset[m][r][g]));
                        sum += values[i];
                    }
                    p[m][r][w] = Pv::pack(values);
                }
                sums[m][r] = sum;
            }
    }

    // A thread's outputs of four columns are 8 neighbouring channels (params.h, channel_row). finish_of(channel): their Finish.
    template <class FinishOf>
    __device__ static void write(const Call& call, const Place& at, const Rows& rows, const QCodes& q, const Partials& partials,
                                 const View& out, float* lse, const FinishOf& finish_of) {
        const int b = int(uint32_t(at.q_row) / uint32_t(call.heads));
        float total[M][2], inverse[M][2];
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float x = rows.total[m][r];
                x += __shfl_xor_sync(0xFFFFFFFFu, x, 1);
                total[m][r] = x + __shfl_xor_sync(0xFFFFFFFFu, x, 2);
                inverse[m][r] = total[m][r] == 0.0f ? 0.0f : ptx::reciprocal(total[m][r]);
            }
#pragma unroll
        for (int group = 0; group < V_DIM / 32; ++group) {
            const int channel = group * 32 + lane() % 4 * 8;
            Finish finish;
            if (call.splits == 1) finish = finish_of(channel);
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
#pragma unroll
                    for (int i = 0; i < 8; ++i) x[i] = finish.apply(x[i], inverse[m][r], i);
                    const int64_t to = (call.cu_q ? 0 : b) * out.b + at.head * out.h + (at.q.first + query) * out.n + channel;
                    store8(call, out.data, to, channel, x);
                    if (call.return_lse && channel == 0) {
                        const float shift = q.lse_shift ? q.lse_shift[at.q_row * call.q_padded() + query] : 0.0f;
                        lse[at.q_row * call.nq + query] = log_sum_exp(call, rows.top[m][r], total[m][r], shift);
                    }
                }
        }
    }

    // Where this block of ROWS queries works, and its warp; false if it has no queries. Index: 32 bits divide faster, but what the
    // compiler computes for it of the divisors it likes to hold in registers, which who calls this twice cannot spare.
    template <int ROWS, class Index> __device__ static bool locate(const Call& call, const Mask& mask, int warp, Place& at) {
        Index index = ptx::block_index();
        const Index blocks = (call.nq + ROWS - 1) / ROWS;
        int block = int(index % blocks);
        if (call.is_causal) block = int(blocks) - 1 - block;  // the longest first
        index /= blocks;
        at.split = int(index % Index(call.splits));
        const Index q_row = index / Index(call.splits);
        at.q_row = q_row;
        const int b = int(q_row / Index(call.heads));
        at.head = int(q_row % Index(call.heads));
        at.kv_row = int64_t(b) * call.kv_heads + at.head / call.group();
        at.q = span(call.cu_q, b, call.nq);
        at.k = span(call.cu_k, b, call.nk);
        const int first = block * ROWS;
        at.row = first + warp * (16 * M);
        if (first >= at.q.n) return false;
        const int stop = call.is_causal ? min(at.k.n, first + ROWS) : at.k.n;
        const int tiles = (stop + KEYS - 1) / KEYS;
        const int share = (tiles + call.splits - 1) / call.splits;
        at.tile_begin = min(tiles, at.split * share);
        at.tile_end = min(tiles, at.tile_begin + share);
        at.whole_end = (call.is_causal ? min(at.k.n, at.row + 1) : at.k.n) / KEYS;
        if (MASKED) at.mask = mask_of_head(mask, b, at.head);
        return true;
    }
};

}  // namespace sage
