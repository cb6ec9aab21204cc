// What attention_mma and attention_wgmma share: a thread's scores, their online softmax, and the way out.
//
// In both a warp owns rows of 16 queries, and a thread has, of rows lane / 4 and lane / 4 + 8, the columns lane % 4 * 2 and the
// one after it of every 8: that is how the matrix instructions hand out their results.
#pragma once

#include "epilogue.cuh"
#include "mask.cuh"
#include "pv.cuh"

namespace sage {

// M: 16-row tiles of a warp. KEYS: of a tile. WGMMA: for attention_wgmma, which has other registers to spare.
template <Mode MODE, int M, int KEYS, int V_DIM, bool MASKED, bool WGMMA> struct Softmax {
    static constexpr int N = KEYS / 8;           // columns of 8 keys
    static constexpr int GROUPS = KEYS / PANEL;  // of keys that share a K scale
    static constexpr int P_WORDS = KEYS * v_bytes(MODE) / 16;  // of a row half, in one thread
    // Chains in which a row's maximum is sought, each of which waits for itself alone: as many as are faster.
    static constexpr bool TWO_CHAINS = (MODE == Mode::int8_int32 && V_DIM > 64) || MODE == Mode::fp8_fp32_fp16 || MODE == Mode::fp8_fp32;
    static constexpr int CHAINS = WGMMA && TWO_CHAINS ? 2 : 1;
    using Pv = PV<MODE>;

    // A thread's scores: floats of value MAGIC + code; with a mask, real scores once hide() has been there.
    using Scores = int32_t[M][N][4];
    using Probabilities = uint32_t[M][2][P_WORDS];

    // Everything of one block that does not change from tile to tile.
    struct Place {
        Span q, k;
        int64_t q_row, kv_row;
        int head;
        int first;                 // query of the block
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

    // Of a query.
    __device__ static float q_scale(const Call& call, const Place& at, const QCodes& q, int query) {
        const int block = 31 - __clz(call.q_block), sub = 31 - __clz(call.q_sub);  // both are powers of two
        return q.scale[at.q_row * (call.q_padded() >> block << sub) + (query >> block << sub) + (query % 8 << sub >> 3)];
    }

    // Below every score: where a row's maximum starts. Finite, so that it can be subtracted.
    static constexpr float NOTHING = -3.4e38f;

    __device__ static void load_q_scales(Rows& rows, const Call& call, const Place& at, const QCodes& q) {
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int r = 0; r < 2; ++r) rows.scale[m][r] = q_scale(call, at, q, at.row + m * 16 + r * 8 + lane() / 4);
    }

    // Nothing seen yet.
    __device__ static void start(Rows& rows) {
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                rows.top[m][r] = NOTHING;
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

    // What the codes of a tile count: 0 where q or k is 0, unless some of them are hidden: -inf * 0 is not -inf.
    using Scales = float[M][2][GROUPS];
    template <bool HIDE> __device__ static void scales(Scales& scale, const Rows& rows, const float (&k_scale)[GROUPS]) {
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int r = 0; r < 2; ++r)
#pragma unroll
                for (int g = 0; g < GROUPS; ++g) {
                    scale[m][r][g] = rows.scale[m][r] * k_scale[g];
                    if (HIDE) scale[m][r][g] = fmaxf(scale[m][r][g], 1e-30f);
                }
    }

    // -inf where a key is hidden. With a mask the codes become scores, for a mask may say -1e38.
    __device__ static void hide(Scores& s, const Place& at, const Scales& scale, int first_key, bool causal) {
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
                        x = (x - MAGIC) * scale[m][i / 2][n / 8];
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

    // The largest of a thread's scores of each row of a tile, rounded up so that none is above it; quad_max makes it the row's.
    __device__ static void find_tops(float (&tops)[M][2], const Scores& s, const Scales& scale) {
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float top;
#pragma unroll
                for (int g = 0; g < GROUPS; ++g) {
                    float one = largest(s[m], 8 * g, r);
                    if (!MASKED) one = __fmul_ru(one - MAGIC, scale[m][r][g]);
                    top = g == 0 ? one : fmaxf(top, one);
                }
                tops[m][r] = top;
            }
    }

    // p = 2^(x * scale + offset) for x = MAGIC + code.
    struct Exponent {
        Scales scale, offset;
    };

    // Of a scale: up to it the rounding of an exponent's offset lowers P by less than a sixty-fourth of an octave. Ordinary inputs have
    // some 1e-4.
    static constexpr float LARGE = 1.0f / 64;
    __device__ static bool large(const Scales& scale) {
        bool large = false;
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int r = 0; r < 2; ++r)
#pragma unroll
                for (int g = 0; g < GROUPS; ++g) large |= scale[m][r][g] > LARGE;
        return !MASKED && __any_sync(0xFFFFFFFFu, large);
    }

    // base: of each row, what is taken from its scores. Everything is rounded such that p never passes P's largest, for its codes
    // have no room above that. Where `large`, the codes become scores less their base, rounded as in find_tops, so that a row's
    // largest is 0. With a mask all of them are scores, and weigh() subtracts.
    __device__ static Exponent exponent(Scores& s, const float (&base)[M][2], const Scales& scale, float p_max_log2, bool large) {
        Exponent e;
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int r = 0; r < 2; ++r)
#pragma unroll
                for (int g = 0; g < GROUPS; ++g) {
                    e.scale[m][r][g] = scale[m][r][g];
                    e.offset[m][r][g] = __fmaf_rd(-MAGIC, scale[m][r][g], __fsub_rd(p_max_log2, base[m][r]));
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

    // For attention_wgmma 8-bit codes by another conversion than pv.cuh's, which is faster there (docs/hopper.md): attention_mma then
    // spills, and on other cards it was not measured.
    __device__ static uint32_t pack(const float* p) {
        if constexpr (WGMMA && p_type(MODE) == PType::u8) return ptx::to_u8x4(p);
        else return Pv::pack(p);
    }

    // Words FROM to TO of the codes of p, and this thread's sums of it, which begin at word 0.
    template <int FROM = 0, int TO = P_WORDS>
    __device__ static void weigh(Probabilities& p, float (&sums)[M][2], const Scores& s, const Exponent& e, const float (&base)[M][2],
                                 float p_max_log2) {
        constexpr int WORDS = P_WORDS / GROUPS, COLUMNS = 8 / WORDS;  // columns of 8 keys in one word: 1 or 2
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float sum = FROM > 0 ? sums[m][r] : 0.0f;
#pragma unroll
                for (int w = FROM; w < TO; ++w) {
                    const int g = w / WORDS;
                    float values[2 * COLUMNS];
#pragma unroll
                    for (int i = 0; i < 2 * COLUMNS; ++i) {
                        const float x = __int_as_float(s[m][w * COLUMNS + i / 2][2 * r + i % 2]);
                        values[i] = ptx::exp2(MASKED ? x - base[m][r] + p_max_log2 : fmaf(x, e.scale[m][r][g], e.offset[m][r][g]));
                        sum = w + i == 0 ? values[i] : sum + values[i];
                    }
                    p[m][r][w] = pack(values);
                }
                sums[m][r] = sum;
            }
    }

    // A thread's outputs of four columns are 8 neighbouring channels (params.h, channel_row). finish_of(channel): their Finish.
    template <class FinishOf>
    __device__ static void write(const Call& call, const Place& at, const Rows& rows, const QCodes& q, const Partials& partials,
                                 const View& out, float* lse, const FinishOf& finish_of) {
        const int b = call.batch > 1 ? int(uint32_t(at.q_row) / uint32_t(call.heads)) : 0;
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
        const int first = lane() % 4 * 8;  // of this thread's channels: 8 of every 32
        if (call.splits > 1) {
#pragma unroll
            for (int m = 0; m < M; ++m)
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const int query = at.row + m * 16 + r * 8 + lane() / 4;
                    if (query >= at.q.n) continue;
                    const int64_t row = (at.split * call.q_rows() + at.q_row) * call.q_padded() + query;
                    float4* to = reinterpret_cast<float4*>(partials.out + row * V_DIM + first);
#pragma unroll
                    for (int j = 0; j < V_DIM / 8; j += 2)
                        to[j / 4 * 8 + j % 4 / 2] = make_float4(Pv::value(rows.acc[m][j], 2 * r), Pv::value(rows.acc[m][j], 2 * r + 1),
                                                                Pv::value(rows.acc[m][j + 1], 2 * r), Pv::value(rows.acc[m][j + 1], 2 * r + 1));
                    if (first == 0) {
                        partials.top[row] = rows.top[m][r];
                        partials.total[row] = total[m][r];
                    }
                }
            return;
        }
        int64_t to[M][2];
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int query = at.row + m * 16 + r * 8 + lane() / 4;
                to[m][r] = (call.cu_q ? 0 : b) * out.b + at.head * out.h + (at.q.first + query) * out.n + first;
                if (call.return_lse && first == 0 && query < at.q.n) {
                    const float shift = q.lse_shift ? q.lse_shift[at.q_row * call.q_padded() + query] : 0.0f;
                    lse[at.q_row * call.nq + query] = log_sum_exp(call, rows.top[m][r], total[m][r], shift);
                }
            }
        const auto store_all = [&](const auto& store) {
#pragma unroll
            for (int group = 0; group < V_DIM / 32; ++group) {
                const Finish finish = finish_of(group * 32 + first);
#pragma unroll
                for (int m = 0; m < M; ++m)
#pragma unroll
                    for (int r = 0; r < 2; ++r) {
                        float x[8];
#pragma unroll
                        for (int i = 0; i < 8; ++i)
                            x[i] = finish.apply(Pv::value(rows.acc[m][group * 4 + i / 2], 2 * r + i % 2), inverse[m][r], i);
                        store(to[m][r] + group * 32, at.row + m * 16 + r * 8 + lane() / 4, group * 32 + first, x);
                    }
            }
        };
        // Where nothing is to be left out, and every query has seen a key, as mostly, nothing is asked between the stores.
        bool whole = at.row + 16 * M <= at.q.n && call.head_dim == V_DIM;
#pragma unroll
        for (int m = 0; m < M; ++m) whole &= inverse[m][0] != 0.0f && inverse[m][1] != 0.0f;
        if (whole && call.dtype == DType::bf16)
            store_all([&](int64_t to, int, int, const float (&x)[8]) { store8<DType::bf16>(out.data, to, x); });
        else if (whole && call.dtype == DType::f16)
            store_all([&](int64_t to, int, int, const float (&x)[8]) { store8<DType::f16>(out.data, to, x); });
        else
            store_all([&](int64_t to, int query, int channel, const float (&x)[8]) {
                if (query < at.q.n) store_up_to_8(call, out.data, to, channel, x);
            });
    }

    // Where this block of ROWS queries works, and its warp; false if it has no queries. Causal blocks differ in length: the longest of a
    // head comes first, or with `snake` in every other head the shortest, so that who takes every so many gets as much as others.
    // Index: 32 bits divide faster, and not at all by 1; but what the compiler computes for that it likes to hold in registers, which
    // who calls this twice cannot spare.
    template <int ROWS, class Index>
    __device__ static bool locate(const Call& call, const Mask& mask, int warp, Index index, Place& at, bool snake = false) {
        constexpr bool FAST = sizeof(Index) == 4;
        const Index blocks = (call.nq + ROWS - 1) / ROWS;
        int block = int(index % blocks);
        index /= blocks;
        if (call.is_causal && !(snake && index % 2)) block = int(blocks) - 1 - block;
        const bool whole = FAST && call.splits == 1, one = FAST && call.batch == 1, own = FAST && call.heads == call.kv_heads;
        at.split = whole ? 0 : int(index % Index(call.splits));
        const Index q_row = whole ? index : index / Index(call.splits);
        at.q_row = q_row;
        const int b = one ? 0 : int(q_row / Index(call.heads));
        at.head = one ? int(q_row) : int(q_row % Index(call.heads));
        at.kv_row = int64_t(b) * call.kv_heads + (own ? at.head : at.head / call.group());
        at.q = span(call.cu_q, b, call.nq);
        at.k = span(call.cu_k, b, call.nk);
        at.first = block * ROWS;
        at.row = at.first + warp * (16 * M);
        if (at.first >= at.q.n) return false;
        const int stop = call.is_causal ? min(at.k.n, at.first + ROWS) : at.k.n;
        const int tiles = (stop + KEYS - 1) / KEYS;
        const int share = whole ? tiles : (tiles + call.splits - 1) / call.splits;
        at.tile_begin = min(tiles, at.split * share);
        at.tile_end = min(tiles, at.tile_begin + share);
        at.whole_end = (call.is_causal ? min(at.k.n, at.row + 1) : at.k.n) / KEYS;
        if (MASKED) at.mask = mask_of_head(mask, b, at.head);
        return true;
    }
};

}  // namespace sage
