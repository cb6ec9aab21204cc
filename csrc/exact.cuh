// Unquantised float32 attention for the heads whose q, k or v holds a NaN, an inf or a huge number; returns at once for all
// others. docs/algorithm.md says why: a NaN or inf is to stand exactly where exact attention has it, so no matrix unit.
#pragma once

#include "common/mask.cuh"
#include "common/tokens.cuh"

namespace sage {
namespace {  // one file includes this, and its names are that file's own

constexpr int THREADS = 256;
constexpr int ROWS = 32;     // queries and keys at a time; a thread has two of each, 16 apart
constexpr int SLICE = 64;    // channels of K or V in shared memory at a time; a thread sums 4 of each slice for its two queries
constexpr int SLICES = 4;    // of the largest head_dim
constexpr int PAD = 4;       // floats after a row, so that 8 rows read at once lie in different banks
constexpr int MOST_SHARES = 16;     // of a head's queries
constexpr int MOST_PROGRAMS = 128;  // of a launch, whose programs mostly find nothing to do: no more than run at once

struct ExactJob {
    Call call;
    Input q, k, v;
    Mask mask;
    const int32_t* bad;
    View out;
    float* lse;
    int shares;          // of a head's queries
    int64_t all_shares;  // of all heads
};

struct Shared {
    float q[ROWS][SLICES * SLICE + PAD];
    float kv[ROWS][SLICE + PAD];
    float p[ROWS][ROWS + PAD];
    uint32_t seen[ROWS];  // bit n: the query sees key n of the tile
};

// What a thread knows of its queries y and y + 16 (y = thread / 16); of the channels, those at 4 * (thread % 16) of each slice.
struct Rows {
    float top[2], total[2];
    float acc[2][SLICES][4];
    uint32_t up[2], down[2];  // bit 4 * slice + i: the query sees a +inf or NaN (-inf or NaN) in that channel
};

// Tokens first .. first + ROWS, channels channel .. channel + SLICE, times `scale`, into shared memory, zeros where there are
// none. True if this thread met a NaN or an inf.
template <DType DTYPE, int WIDTH>
__device__ __forceinline__ bool stage(const Tokens<DTYPE>& in, int first, int channel, float (&to)[ROWS][WIDTH], int column,
                                      float scale = 1.0f) {
    const int c = threadIdx.x % SLICE;
    bool odd = false;
#pragma unroll
    for (int i = 0; i < ROWS * SLICE / THREADS; ++i) {
        const int row = threadIdx.x / SLICE + i * (THREADS / SLICE);
        const bool inside = first + row < in.n && channel + c < in.head_dim;
        const float x = inside ? to_float<DTYPE>(__ldg(in.data + (first + row) * in.stride + channel + c)) : 0.0f;
        to[row][column + c] = x * scale;
        odd = odd || !(fabsf(x) < INFINITY);
    }
    return odd;
}

__device__ __forceinline__ float4 read4(const float* at) { return *reinterpret_cast<const float4*>(at); }

// q . k of the thread's queries, which are scaled, and the keys x and x + 16, x = thread % 16.
template <DType DTYPE> __device__ __forceinline__ void dot(Shared& s, const Tokens<DTYPE>& k, int first, float (&score)[2][2]) {
    const int x = threadIdx.x % 16, y = threadIdx.x / 16;
    for (int channel = 0; channel < k.head_dim; channel += SLICE) {
        __syncthreads();
        stage(k, first, channel, s.kv, 0);
        __syncthreads();
#pragma unroll 4
        for (int c = 0; c < SLICE; c += 4) {
            const float4 q[2] = {read4(&s.q[y][channel + c]), read4(&s.q[y + 16][channel + c])};
            const float4 keys[2] = {read4(&s.kv[x][c]), read4(&s.kv[x + 16][c])};
#pragma unroll
            for (int i = 0; i < 2; ++i)
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    score[i][j] = fmaf(q[i].x, keys[j].x, score[i][j]);
                    score[i][j] = fmaf(q[i].y, keys[j].y, score[i][j]);
                    score[i][j] = fmaf(q[i].z, keys[j].z, score[i][j]);
                    score[i][j] = fmaf(q[i].w, keys[j].w, score[i][j]);
                }
        }
    }
}

// The online softmax of one tile: scores (base 2) become weights in shared memory. `visible`: see attend().
__device__ __forceinline__ void weigh(Shared& s, Rows& rows, const float (&score)[2][2], const bool (&visible)[2][2]) {
    const int lane = threadIdx.x % 32, x = threadIdx.x % 16, y = threadIdx.x / 16;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        // fmaxf passes over a NaN; it comes out all the same, as a weight
        float top = fmaxf(rows.top[i], fmaxf(score[i][0], score[i][1]));
#pragma unroll
        for (int width = 1; width < 16; width *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, width));
        const float base = top == -INFINITY ? 0.0f : top;
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const float p = visible[i][j] ? exp2f(score[i][j] - base) * EXACT_P_MAX : 0.0f;
            s.p[y + 16 * i][x + 16 * j] = p;
            sum += p;
        }
#pragma unroll
        for (int width = 1; width < 16; width *= 2) sum += __shfl_xor_sync(~0u, sum, width);
        const uint32_t low = __ballot_sync(~0u, visible[i][0]), high = __ballot_sync(~0u, visible[i][1]);
        const int shift = lane / 16 * 16;  // a warp holds two rows
        if (x == 0) s.seen[y + 16 * i] = (low >> shift & 0xFFFFu) | (high >> shift & 0xFFFFu) << 16;
        const float shrink = exp2f(rows.top[i] - base);
        rows.total[i] = rows.total[i] * shrink + sum;
        rows.top[i] = top;
#pragma unroll
        for (int slice = 0; slice < SLICES; ++slice)
#pragma unroll
            for (int c = 0; c < 4; ++c) rows.acc[i][slice][c] *= shrink;
    }
}

// Notes which queries see a NaN or an inf in the staged slice of V, and puts zeros in their place.
__device__ __forceinline__ void take_out(Shared& s, Rows& rows, int slice) {
    const int x = threadIdx.x % 16, y = threadIdx.x / 16;
    const uint32_t seen[2] = {s.seen[y], s.seen[y + 16]};
    for (int n = 0; n < ROWS; ++n)
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            const float v = s.kv[n][4 * x + c];
            const uint32_t up = v == INFINITY || v != v, down = v == -INFINITY || v != v;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                rows.up[i] |= (seen[i] >> n & up) << (4 * slice + c);
                rows.down[i] |= (seen[i] >> n & down) << (4 * slice + c);
            }
        }
    __syncthreads();
    for (int i = threadIdx.x; i < ROWS * SLICE; i += THREADS) {
        float& v = s.kv[i / SLICE][i % SLICE];
        if (!(fabsf(v) < INFINITY)) v = 0.0f;
    }
    __syncthreads();
}

template <DType DTYPE> __device__ __forceinline__ void add_values(Shared& s, const Tokens<DTYPE>& v, int first, Rows& rows) {
    const int x = threadIdx.x % 16, y = threadIdx.x / 16;
#pragma unroll
    for (int slice = 0; slice < SLICES; ++slice) {
        if (slice * SLICE >= v.head_dim) break;
        __syncthreads();
        const bool odd = stage(v, first, slice * SLICE, s.kv, 0);
        if (__syncthreads_or(odd)) take_out(s, rows, slice);
        for (int n = 0; n < ROWS; n += 4) {
            const float4 p[2] = {read4(&s.p[y][n]), read4(&s.p[y + 16][n])};
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const float4 values = read4(&s.kv[n + j][4 * x]);
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const float weight = j == 0 ? p[i].x : j == 1 ? p[i].y : j == 2 ? p[i].z : p[i].w;
                    rows.acc[i][slice][0] = fmaf(weight, values.x, rows.acc[i][slice][0]);
                    rows.acc[i][slice][1] = fmaf(weight, values.y, rows.acc[i][slice][1]);
                    rows.acc[i][slice][2] = fmaf(weight, values.z, rows.acc[i][slice][2]);
                    rows.acc[i][slice][3] = fmaf(weight, values.w, rows.acc[i][slice][3]);
                }
            }
        }
    }
}

// All keys for the queries from `first` on, which lie in shared memory.
template <DType DTYPE>
__device__ __forceinline__ void attend(const ExactJob& job, Shared& s, const Tokens<DTYPE>& k, const Tokens<DTYPE>& v,
                                       const Mask& mask, int first, int nq, Rows& rows) {
    const int x = threadIdx.x % 16, y = threadIdx.x / 16;
    const int stop = job.call.is_causal ? min(k.n, first + ROWS) : k.n;
    for (int start = 0; start < stop; start += ROWS) {
        float score[2][2] = {};
        dot(s, k, start, score);
        bool visible[2][2];
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const int m = first + y + 16 * i, n = start + x + 16 * j;
                const bool exists = m < nq && n < k.n && (!job.call.is_causal || n <= m);
                // the mask alone, for a score of -inf may be a visible one
                const float bias = exists ? masked(0.0f, mask, m, n) : -INFINITY;
                visible[i][j] = bias != -INFINITY;
                score[i][j] = visible[i][j] ? score[i][j] * LOG2E + bias : -INFINITY;
            }
        weigh(s, rows, score, visible);
        add_values(s, v, start, rows);
    }
}

template <DType DTYPE>
__device__ __forceinline__ void store(const ExactJob& job, const Rows& rows, int row, int64_t out, int first, int nq) {
    const int x = threadIdx.x % 16, y = threadIdx.x / 16;
    using T = typename Raw<DTYPE>::type;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int m = first + y + 16 * i;
        if (m >= nq) continue;
        const bool empty = rows.total[i] == 0.0f;
#pragma unroll
        for (int slice = 0; slice < SLICES; ++slice)
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                const int channel = slice * SLICE + 4 * x + c, bit = 4 * slice + c;
                if (channel >= job.call.head_dim) continue;
                float value = rows.acc[i][slice][c] / rows.total[i];
                if (rows.up[i] >> bit & 1) value += INFINITY;
                if (rows.down[i] >> bit & 1) value -= INFINITY;
                static_cast<T*>(job.out.data)[out + m * job.out.n + channel] = from_float<DTYPE>(empty ? 0.0f : value);
            }
        if (x == 0 && job.call.return_lse)
            job.lse[int64_t(row) * job.call.nq + m] =
                empty ? -INFINITY : (rows.top[i] + log2f(rows.total[i] / EXACT_P_MAX)) / LOG2E;
    }
}

// Blocks share, share + shares, ... of a head's queries.
template <DType DTYPE> __device__ __forceinline__ void attend_share(const ExactJob& job, Shared& s, int row, int share) {
    const Call& call = job.call;
    const int b = row / call.heads, h = row % call.heads, kv_head = h / call.group();
    const auto q = Tokens<DTYPE>::of(job.q, call.cu_q, b, h, call.nq);
    const auto k = Tokens<DTYPE>::of(job.k, call.cu_k, b, kv_head, call.nk);
    const auto v = Tokens<DTYPE>::of(job.v, call.cu_k, b, kv_head, call.nk);
    const Mask mask = mask_of_head(job.mask, b, h);
    const int64_t out = (call.cu_q ? 0 : b) * job.out.b + h * job.out.h + span(call.cu_q, b, call.nq).first * job.out.n;
    for (int first = share * ROWS; first < q.n; first += job.shares * ROWS) {
        __syncthreads();
        // scaled before and not after q . k, which may be larger than a float can be where the score is not
        for (int channel = 0; channel < q.head_dim; channel += SLICE) stage(q, first, channel, s.q, channel, call.sm_scale);
        Rows rows{};
        rows.top[0] = rows.top[1] = -INFINITY;
        attend(job, s, k, v, mask, first, q.n, rows);
        store<DTYPE>(job, rows, row, out, first, q.n);
    }
}

template <DType DTYPE> __global__ void __launch_bounds__(THREADS, 1) exact_kernel(const __grid_constant__ ExactJob job) {
    __shared__ __align__(16) Shared s;
    const Call& call = job.call;
    const auto bad = [&](int64_t share) {
        const int64_t row = share / job.shares;
        return job.bad[row / call.heads * call.kv_heads + row % call.heads / call.group()];
    };
    const int64_t step = gridDim.x;
    int any = 0;
    for (int64_t share = blockIdx.x + threadIdx.x * step; share < job.all_shares; share += THREADS * step) any |= bad(share);
    if (!__syncthreads_or(any)) return;
    for (int64_t share = blockIdx.x; share < job.all_shares; share += step)
        if (bad(share)) attend_share<DTYPE>(job, s, int(share / job.shares), int(share % job.shares));
}

}  // namespace
}  // namespace sage
