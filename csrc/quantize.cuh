// q, k and v into the codes that attention reads: one launch. docs/cuda.md, "Quantisation".
#pragma once

#include "quantize_v.cuh"

namespace sage {
namespace {  // one file includes this, and its names are that file's own

struct Int8Shared {
    float mean[256];    // of the channels of k: what K is reduced by, and Q's scores then lack; signs as the rotation has them
    uint32_t signs[8];  // of each lane of a token, as Chunk::flip takes them
    int32_t top[TILE];  // largest magnitude of each group, as bits
    int64_t base;       // number of the program's first token among those of all heads. From here on: for registers are scarce
    int kv_row;
    int count;          // of tokens from the first on that exist
};

// The Hadamard transform of a token that LANES neighbouring lanes hold: chunk i of a lane is channels (i * LANES + lane) * 8 and
// on. In the order of widths 1, 2, 4, ... of quantize.rotate, for the same bits as there.
template <int LANES> __device__ __forceinline__ void transform(float (&x)[4][8], int lane) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int width = 1; width < 8; width *= 2)
#pragma unroll
            for (int j = 0; j < 8; ++j)
                if (!(j & width)) {
                    const float a = x[i][j], b = x[i][j + width];
                    x[i][j] = a + b, x[i][j + width] = a - b;
                }
#pragma unroll
        for (int width = 1; width < LANES; width *= 2) {
            const float sign = lane & width ? -1.0f : 1.0f;
#pragma unroll
            for (int j = 0; j < 8; ++j) x[i][j] = fmaf(sign, x[i][j], __shfl_xor_sync(~0u, x[i][j], width));
        }
    }
    constexpr float NORM = LANES == 2 ? 0.125f : LANES == 4 ? 0.08838834764831845f : 0.0625f;  // dim ** -0.5
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        const float a = x[0][j] + x[1][j], b = x[0][j] - x[1][j], c = x[2][j] + x[3][j], d = x[2][j] - x[3][j];
        x[0][j] = (a + c) * NORM, x[1][j] = (b + d) * NORM, x[2][j] = (a - c) * NORM, x[3][j] = (b - d) * NORM;
    }
}

// 4 numbers times `factor`, rounded to the nearest even, as the bytes of a word. The product is rounded first, as in the oracle.
__device__ __forceinline__ uint32_t round_to_int8(const float (&x)[8], int first, float factor) {
    uint32_t bits[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) bits[j] = __float_as_uint(__fadd_rn(__fmul_rn(x[first + j], factor), MAGIC));
    return ptx::permute(ptx::permute(bits[0], bits[1], 0x0040), ptx::permute(bits[2], bits[3], 0x0040), 0x5410);
}

// A program's tokens of Q or K. DIM / 32 neighbouring lanes hold a token, 32 channels each, as rotate() has them.
template <DType DTYPE, int DIM, bool IS_K> struct Int8Tokens {
    static constexpr int LANES = DIM / 32;
    const CodesJob& job;
    const Call& call;
    const Int8Shared& shared;

    // log2 of Granularity's numbers
    __device__ __forceinline__ int block() const { return 31 - __clz(IS_K ? PANEL : call.q_block); }
    __device__ __forceinline__ int sub() const { return 31 - __clz(IS_K ? call.k_sub : call.q_sub); }
    __device__ __forceinline__ int group(int local) const { return (local >> block() << sub()) + (local % 8 >> (3 - sub())); }
    static __device__ __forceinline__ int channel(int i, int lane) { return (i * LANES + lane) * 8; }

    // Where the codes of a token's channels from c on lie, from those of the program's first token on.
    __device__ __forceinline__ int place(int local, int c) const {
        if (DIM <= 128 && call.wgmma) return local * DIM + swizzled(c, local, DIM);
        if (!IS_K) return local * DIM + c;
        return (local / PANEL * DIM + c / PANEL * PANEL + local % PANEL) * PANEL + c % PANEL;
    }

    __device__ __forceinline__ bool shifts() const { return !IS_K && job.q_codes.lse_shift; }

    // What smoothing K took from this token's scores.
    __device__ __forceinline__ void store_lse_shift(int local, int lane, const float (&x)[4][8]) const {
        float dot = 0.0f;
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int j = 0; j < 8; ++j) dot = fmaf(x[i][j], shared.mean[channel(i, lane) + j], dot);
#pragma unroll
        for (int width = 1; width < LANES; width *= 2) dot += __shfl_xor_sync(~0u, dot, width);
        if (lane == 0) job.q_codes.lse_shift[shared.base + local] = dot * call.sm_scale;
    }

    // Makes of `chunks` what is to be rounded. Returns the largest magnitude among the token's; a NaN counts as the largest.
    __device__ __forceinline__ float prepare(int local, int lane, Chunk<DTYPE> (&chunks)[4], float (&x)[4][8]) const {
        if (call.rotate) {
#pragma unroll
            for (int i = 0; i < 4; ++i) chunks[i].flip(shared.signs[lane], 4 * i);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) chunks[i].unpack(x[i]);
        if (shifts()) store_lse_shift(local, lane, x);
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int j = 0; j < 8; ++j)
                if constexpr (IS_K) x[i][j] -= shared.mean[channel(i, lane) + j];
                else x[i][j] = __fmul_rn(x[i][j], call.q_factor);  // not fused with the sums that follow
        if (call.rotate) transform<LANES>(x, lane);
        float top = 0.0f;
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int j = 0; j < 8; ++j) top = ptx::max_nan(top, fabsf(x[i][j]));
#pragma unroll
        for (int width = 1; width < LANES; width *= 2) top = ptx::max_nan(top, __shfl_xor_sync(~0u, top, width));
        return local < shared.count ? top : 0.0f;
    }

    // Two neighbouring lanes exchange chunks, so that each stores 16 bytes at a time.
    __device__ __forceinline__ void store(int local, int lane, const float (&x)[4][8]) const {
        const float top = __int_as_float(shared.top[group(local)]);
        const float inverse = top > TINY && local < shared.count ? __fdiv_rn(127.0f, top) : 0.0f;
        const bool odd = lane % 2;
        int8_t* codes = (IS_K ? job.k_codes.codes : job.q_codes.codes) + shared.base * DIM;
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
            uint32_t own[2], got[2];
#pragma unroll
            for (int word = 0; word < 2; ++word) {
                const uint32_t first = round_to_int8(x[i], word * 4, inverse);
                const uint32_t second = round_to_int8(x[i + 1], word * 4, inverse);
                own[word] = odd ? second : first;
                got[word] = __shfl_xor_sync(~0u, odd ? first : second, 1);
            }
            *reinterpret_cast<uint4*>(codes + place(local, channel(i + odd, lane - odd))) =
                odd ? uint4{got[0], got[1], own[0], own[1]} : uint4{own[0], own[1], got[0], got[1]};
        }
    }
};

template <int DIM, bool IS_K>
__device__ __forceinline__ void set_up(const CodesJob& job, int row, int first, int n, Int8Shared& shared) {
    constexpr int LANES = DIM / 32;
    const Call& call = job.call;
    const int thread = threadIdx.x, warp = thread / 32, kv_row = IS_K ? row : row / job.group;
    if (thread == 0) {
        shared.base = int64_t(row) * (IS_K ? call.k_padded() : call.q_padded()) + first;
        shared.kv_row = kv_row;
        shared.count = n - first;
    }
    if (thread < TILE) shared.top[thread] = 0;
    if (thread < DIM) {
        if (IS_K || job.q_codes.lse_shift) {
            const uint32_t mean = __float_as_uint(__ldg(job.stats.k_mean + int64_t(kv_row) * DIM + thread));
            shared.mean[thread] = __uint_as_float(call.rotate ? mean ^ (thread * HASH & 0x80000000u) : mean);
        }
        const uint32_t channel = thread % 16 / 4 * (LANES * 8) + warp * 8 + thread % 4 * 2 + thread % 32 / 16;
        const uint32_t signs = __ballot_sync(~0u, channel * HASH >> 31);
        if (thread % 32 == 0) shared.signs[warp] = signs;
    }
}

// Tokens first .. first + PASSES * TILE of Q or K, which are whole groups.
template <DType DTYPE, int DIM, int PASSES, bool IS_K>
__device__ __forceinline__ void quantize_int8(const CodesJob& job, int row, int first, Int8Shared& shared) {
    using Part = Int8Tokens<DTYPE, DIM, IS_K>;
    constexpr int LANES = Part::LANES;
    const Call& call = job.call;
    const Divider& heads = IS_K ? job.kv_heads : job.heads;
    const int b = row / heads, h = row % heads;
    const auto in = Tokens<DTYPE>::of(IS_K ? job.k : job.q, IS_K ? call.cu_k : call.cu_q, b, h, IS_K ? call.nk : call.nq);
    if (first / BLOCK * BLOCK >= in.n) return;
    Chunk<DTYPE> chunks[PASSES][4];
#pragma unroll
    for (int pass = 0; pass < PASSES; ++pass) {
        const int token = first + pass * TILE + threadIdx.x / LANES, channel = Part::channel(0, threadIdx.x % LANES);
        load_last(chunks[pass], in.wide, in.data + token * in.stride + channel, LANES * 8,
                  [&](int i) { return token < in.n ? in.head_dim - channel - i * LANES * 8 : 0; });
    }
    set_up<DIM, IS_K>(job, row, first, in.n, shared);
    __syncthreads();
    const Part part{job, call, shared};
    float x[PASSES][4][8];
#pragma unroll
    for (int pass = 0; pass < PASSES; ++pass) {
        const int thread = ptx::thread_again(), local = pass * TILE + thread / LANES, lane = thread % LANES;
        const float top = part.prepare(local, lane, chunks[pass], x[pass]);
        if (lane == 0) {
            atomicMax(shared.top + part.group(local), __float_as_int(top));
            if (!IS_K && !(top < LARGEST)) job.stats.bad[shared.kv_row] = 1;  // K has been looked at by stats_kernel
        }
    }
    __syncthreads();
    const int thread = ptx::thread_again();
    if (thread < PASSES * TILE >> part.block() << part.sub()) {
        const float top = __int_as_float(shared.top[thread]);
        float* scale = (IS_K ? job.k_codes.scale : job.q_codes.scale) + (shared.base >> part.block() << part.sub());
        scale[thread] = top > TINY ? __fdiv_rn(top, 127.0f) : 0.0f;
        if (IS_K) atomicMax(job.stats.k_top + shared.kv_row, __float_as_int(scale[thread]));
    }
#pragma unroll
    for (int pass = 0; pass < PASSES; ++pass) part.store(pass * TILE + thread / LANES, thread % LANES, x[pass]);
}

// Programs on a multiprocessor: what the registers allow without spills.
SAGE_HD constexpr int resident(DType dtype, int dim, int passes) {
    const int programs = (dtype == DType::f32 ? 384 : 512) / dim / passes;
    return programs > 0 ? programs : 1;
}

template <DType DTYPE, int DIM, int PASSES>
__global__ void __launch_bounds__(program_threads(DIM), resident(DTYPE, DIM, PASSES))
    quantize_kernel(const __grid_constant__ CodesJob job) {
    __shared__ union {
        Int8Shared int8;
        VShared<DIM> v;
    } shared;
    const int program = blockIdx.x;
    if (program >= job.kv_programs) {
        const int unit = program - job.kv_programs;
        quantize_int8<DTYPE, DIM, PASSES, false>(job, unit / job.q_units, unit % job.q_units * (PASSES * TILE), shared.int8);
        return;
    }
    // from the end: of what stats_kernel read, the L2 cache holds the last
    const int unit = job.kv_units - 1 - program / job.per_unit, role = program % job.per_unit;
    const int row = unit / job.k_units, first = unit % job.k_units * (PASSES * TILE);
    const int v_first = first + (role - job.k_per_unit) * TILE;
    if (role < job.k_per_unit) quantize_int8<DTYPE, DIM, PASSES, true>(job, row, first, shared.int8);
    else if (p_type(job.call.mode) == PType::f16) quantize_v<DTYPE, DIM, PType::f16>(job, row, v_first, shared.v);
    else if (p_type(job.call.mode) == PType::u8) quantize_v<DTYPE, DIM, PType::u8>(job, row, v_first, shared.v);
    else quantize_v<DTYPE, DIM, PType::e4m3>(job, row, v_first, shared.v);
}

}  // namespace
}  // namespace sage
