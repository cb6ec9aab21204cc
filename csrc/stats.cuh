// What must be known of k and v before they are quantised: one launch (stats.cu). docs/cuda.md, "Quantisation".
#pragma once

#include "common/tokens.cuh"

namespace sage {
namespace {  // one file includes this, and its names are that file's own

constexpr int THREADS = 256;

// Each program looks at `chunk` tokens of k and of v of one kv head.
struct StatsJob {
    Call call;
    Input k, v;
    Stats stats;
    int chunks, chunk;
};

// What a thread knows of its 8 channels.
struct Tally {
    float sum[8], low[8], high[8];

    // A NaN or an inf reaches the sum, whatever the comparisons make of it.
    __device__ __forceinline__ bool ordinary() const {
        bool all = true;
#pragma unroll
        for (int j = 0; j < 8; ++j) all = all && fabsf(sum[j]) < INFINITY && low[j] > -LARGEST && high[j] < LARGEST;
        return all;
    }
};

// Tokens first, first + step, ... below in.n.
template <bool WIDE, DType DTYPE>
__device__ __forceinline__ Tally tally(const Tokens<DTYPE>& in, int first, int step, int channel) {
    constexpr int AHEAD = !WIDE ? 1 : DTYPE == DType::f32 ? 2 : 4;  // tokens on their way
    Tally all;
#pragma unroll
    for (int j = 0; j < 8; ++j) all.sum[j] = 0.0f, all.low[j] = INFINITY, all.high[j] = -INFINITY;
    const auto* from = in.data + first * in.stride + channel;
    const int64_t stride = step * in.stride;
    for (int token = first; token < in.n; token += AHEAD * step, from += AHEAD * stride) {
        Chunk<DTYPE> chunk[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; ++i)
            chunk[i].template load<WIDE, false>(from + i * stride, token + i * step < in.n ? in.head_dim - channel : 0);
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            if (token + i * step >= in.n) break;  // the zeros there are no values of low and high
            float x[8];
            chunk[i].unpack(x);
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                all.sum[j] += x[j];
                all.low[j] = fminf(all.low[j], x[j]);
                all.high[j] = fmaxf(all.high[j], x[j]);
            }
        }
    }
    return all;
}

// Joins two partial results; kind as in Stats::partial: sum of k, sum of v, smallest v, largest v.
__device__ __forceinline__ float join(int kind, float a, float b) {
    return kind < 2 ? a + b : kind == 2 ? fminf(a, b) : fmaxf(a, b);
}

__device__ __forceinline__ float scale_of_v(const Call& call, float top) {
    if (!(top > TINY)) return 0.0f;
    const float scale = __fdiv_rn(top, call.v_max);
    if (p_type(call.mode) != PType::f16) return scale;
    // up to a power of two, so that scaling costs no bits: any bit of the mantissa carries into the exponent
    return __uint_as_float((__float_as_uint(scale) + 0x7FFFFFu) & 0x7F800000u);
}

// The last program of a head to finish joins what all have left. In a fixed order, so that two runs give the same bits.
__device__ __forceinline__ void finish(const StatsJob& job, int64_t row, int n, float* shared) {
    const Call& call = job.call;
    const int groups = THREADS / call.dim, group = threadIdx.x / call.dim, column = threadIdx.x % call.dim * 4;
    const int kind = column / call.dim, used = (n + job.chunk - 1) / job.chunk;
    const float none = kind < 2 ? 0.0f : kind == 2 ? INFINITY : -INFINITY;
    float4 all{none, none, none, none};
    const float* from = job.stats.partial + row * job.chunks * 4 * call.dim + column;
    constexpr int BATCH = 8;  // loads under way
    for (int first = group; first < used; first += BATCH * groups) {
        float4 x[BATCH];  // past the L1, which other programs' results do not reach
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            const int part = min(first + i * groups, used - 1);
            x[i] = __ldcg(reinterpret_cast<const float4*>(from + int64_t(part) * 4 * call.dim));
        }
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            if (first + i * groups >= used) break;
            all.x = join(kind, all.x, x[i].x), all.y = join(kind, all.y, x[i].y);
            all.z = join(kind, all.z, x[i].z), all.w = join(kind, all.w, x[i].w);
        }
    }
    reinterpret_cast<float4*>(shared)[threadIdx.x] = all;  // [groups, 4, dim]
    __syncthreads();
    if (int(threadIdx.x) >= call.dim) return;
    float total[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        total[k] = shared[k * call.dim + threadIdx.x];
        for (int g = 1; g < groups; ++g) total[k] = join(k, total[k], shared[(g * 4 + k) * call.dim + threadIdx.x]);
    }
    const int64_t at = row * call.dim + threadIdx.x;
    const float k_mean = call.smooth_k && n > 0 ? __fdiv_rn(total[0], n) : 0.0f;
    const float v_mean = call.smooth_v && n > 0 ? __fdiv_rn(total[1], n) : 0.0f;
    if (!(fabsf(k_mean) < INFINITY && fabsf(v_mean) < INFINITY)) job.stats.bad[row] = 1;  // each is ordinary, their sum is not
    const float top = n > 0 ? fmaxf(fabsf(total[3] - v_mean), fabsf(total[2] - v_mean)) : 0.0f;
    job.stats.k_mean[at] = k_mean;
    job.stats.v_mean[at] = v_mean;
    const float scale = scale_of_v(call, top);
    job.stats.v_scale[at] = scale;
    job.stats.v_inverse[at] = scale > 0.0f ? __frcp_rn(scale) : 0.0f;
}

template <DType DTYPE>
__global__ void __launch_bounds__(THREADS, DTYPE == DType::f32 ? 3 : 4) stats_kernel(const __grid_constant__ StatsJob job) {
    __shared__ __align__(16) float shared[4][THREADS * 8];  // [kind, tokens at a time, dim]
    __shared__ int kv_row;  // here, for registers are scarce
    __shared__ bool last;
    const Call& call = job.call;
    const int row = blockIdx.x / job.chunks, part = blockIdx.x % job.chunks, b = row / call.kv_heads, h = row % call.kv_heads;
    if (threadIdx.x == 0) kv_row = row;
    const int lanes = call.dim / 8, step = THREADS / lanes, channel = threadIdx.x % lanes * 8;
    auto k = Tokens<DTYPE>::of(job.k, call.cu_k, b, h, call.nk), v = Tokens<DTYPE>::of(job.v, call.cu_k, b, h, call.nk);
    const int n = k.n, start = part * job.chunk, first = start + threadIdx.x / lanes;
    k.n = v.n = min(n, start + job.chunk);

    float* own = &shared[0][threadIdx.x * 8];
    const Tally keys = k.wide ? tally<true>(k, first, step, channel) : tally<false>(k, first, step, channel);
    const bool keys_ordinary = keys.ordinary();
#pragma unroll
    for (int j = 0; j < 8; ++j) own[j] = keys.sum[j];
    const Tally values = v.wide ? tally<true>(v, first, step, channel) : tally<false>(v, first, step, channel);
    if (!keys_ordinary || !values.ordinary()) job.stats.bad[blockIdx.x / job.chunks] = 1;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        own[1 * THREADS * 8 + j] = values.sum[j];
        own[2 * THREADS * 8 + j] = values.low[j];
        own[3 * THREADS * 8 + j] = values.high[j];
    }
    __syncthreads();
    float* partial = job.stats.partial + int64_t(blockIdx.x) * 4 * call.dim;
    for (int column = threadIdx.x; column < 4 * call.dim; column += THREADS) {
        const int kind = column / call.dim;
        const float* from = &shared[kind][column % call.dim];
        float all = from[0];
        for (int i = 1; i < step; ++i) all = join(kind, all, from[i * call.dim]);
        partial[column] = all;
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicAdd(job.stats.arrived + kv_row, 1) == job.chunks - 1;
    __syncthreads();
    if (!last) return;
    __threadfence();
    finish(job, kv_row, span(call.cu_k, kv_row / call.kv_heads, call.nk).n, shared[0]);
}

}  // namespace
}  // namespace sage
