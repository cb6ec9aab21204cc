// q, k and v into the codes that attention reads: one launch. docs/cuda.md, "Quantisation".
#pragma once

#include "quantize_v.cuh"

namespace sage {
namespace {  // one file includes this, and its names are that file's own

struct Int8Shared {
    uint4 matrix[32];       // what each lane has of the rotation's A (Int8Tokens)
    float mean[256];        // of the channels of k, as Int8Tokens has them: what K is reduced by, and Q's scores then lack
    uint4 signs[32];        // of the rotation: bits to flip in the chunks of a piece, those of its 4 lanes side by side
    int32_t top[TILE];      // largest magnitude of each group, as bits
    float shift[2 * TILE];  // what each token's scores lack
    int64_t base;           // number of the program's first token among those of all heads. From here on: for registers are scarce
    int kv_row;
    int count;              // of tokens from the first on that exist
};

constexpr uint32_t SIGNS = 0x80008000u;  // of a pair of numbers of 16 bits

// Numbers of the even and the odd token of a pair, joined over the 8 lanes that have channels of these tokens. Lanes with bit 4
// of their number get the odd token's.
template <class Join> __device__ __forceinline__ float join_lanes(float even, float odd, uint32_t lane, Join join) {
    const bool second = lane & 4;
    float x = join(second ? odd : even, __shfl_xor_sync(~0u, second ? even : odd, 4));
    x = join(x, __shfl_xor_sync(~0u, x, 8));
    return join(x, __shfl_xor_sync(~0u, x, 16));
}

// 4 numbers times `factor`, rounded to the nearest even, as the bytes of a word.
__device__ __forceinline__ uint32_t round_to_int8(float a, float b, float c, float d, float factor) {
    const uint32_t low = ptx::permute(__float_as_uint(fmaf(a, factor, MAGIC)), __float_as_uint(fmaf(b, factor, MAGIC)), 0x0040);
    const uint32_t high = ptx::permute(__float_as_uint(fmaf(c, factor, MAGIC)), __float_as_uint(fmaf(d, factor, MAGIC)), 0x0040);
    return ptx::permute(low, high, 0x5410);
}

// A program's tokens of Q or K. A warp takes 8 at a time, the columns of B. Lane 4 * g + t loads of token g two pieces of DIM / 8
// channels: the t-th of either half of the token. Word n of both is the B of a product, 16 deep: over those bits of a channel's
// number that are its half, its t and which of a pair it is. A is the Hadamard matrix of these bits, or the identity. The lane
// gets from it of tokens 2 * t and 2 * t + 1 the pair n of the piece that lane / 4 counts, and so all of a piece in the end: the
// rest of the rotation is within a lane.
template <DType DTYPE, int DIM, bool IS_K> struct Int8Tokens {
    static constexpr int CHUNKS = DIM / 64;                  // of 8 channels in a piece
    static constexpr int SHARE = DIM > 128 ? DIM / 128 : 1;  // warps that load the same tokens: each gets its part of every piece
    static constexpr int PAIRS = DIM / 16 / SHARE;           // of channels that a lane gets
    static constexpr int TOKENS = DIM / 2 / SHARE;           // that all warps take at a time
    using Numbers = float[PAIRS][4];                         // the even channel of both tokens, then the odd one
    const CodesJob& job;
    const Call& call;
    Int8Shared& shared;

    // What a thread takes, as numbers from the program's first token on.
    static __device__ __forceinline__ uint32_t first_token(int round, uint32_t thread) {
        return round * TOKENS + thread / 32 / SHARE * 8;
    }
    static __device__ __forceinline__ uint32_t part(uint32_t thread) { return thread / 32 % SHARE; }
    static __device__ __forceinline__ uint32_t first_channel(uint32_t thread) {
        return thread % 32 / 4 * (DIM / 8) + part(thread) * (2 * PAIRS);
    }

    // log2 of Granularity's numbers
    __device__ __forceinline__ int block() const { return 31 - __clz(IS_K ? PANEL : call.q_block); }
    __device__ __forceinline__ int sub() const { return 31 - __clz(IS_K ? call.k_sub : call.q_sub); }
    __device__ __forceinline__ uint32_t group(uint32_t local) const {
        return (local >> block() << sub()) + (local % 8 >> (3 - sub()));
    }

    // What the numbers in a lane still lack. It goes into the scales.
    __device__ __forceinline__ float factor() const {
        constexpr float NORM = DIM == 64 ? 0.125f : DIM == 128 ? 0.08838834764831845f : 0.0625f;  // DIM ** -0.5
        return (IS_K ? 1.0f : call.q_factor) * (call.rotate ? NORM : 1.0f);
    }

    // Where the codes of a token's channels from c on lie, from those of the program's first token on.
    __device__ __forceinline__ uint32_t place(uint32_t local, uint32_t c) const {
        if (DIM <= 128 && call.wgmma) return local * DIM + swizzled(c, local, DIM);
        if (!IS_K) return local * DIM + c;
        return (local / PANEL * DIM + c / PANEL * PANEL + local % PANEL) * PANEL + c % PANEL;
    }

    __device__ __forceinline__ bool shifts() const { return !IS_K && job.q_codes.lse_shift; }

    // The tokens, rotated but not normalised where the call rotates.
    __device__ __forceinline__ void multiply(uint32_t thread, Chunk<DTYPE> (&chunks)[2][CHUNKS], Numbers& x) const {
        const uint4 own = shared.matrix[thread % 32];
        const uint32_t a[4] = {own.x, own.y, own.z, own.w};
#pragma unroll
        for (int n = 0; n < PAIRS; ++n) x[n][0] = x[n][1] = x[n][2] = x[n][3] = 0.0f;
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c) {
            const int of = c % SHARE, chunk = of * (CHUNKS / SHARE) + c / SHARE;  // of the same sums one after the other
            if (SHARE > 1 && !call.rotate && of != part(thread)) continue;
            const uint32_t turn = call.rotate ? of * part(thread) * SIGNS : 0;  // the butterfly between the parts
            const uint4 low = shared.signs[chunk * 4 + thread % 4], high = shared.signs[(CHUNKS + chunk) * 4 + thread % 4];
            const uint32_t signs[2][4] = {{low.x, low.y, low.z, low.w}, {high.x, high.y, high.z, high.w}};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float (&sum)[4] = x[c / SHARE * 4 + i];
#pragma unroll
                for (int more = DTYPE == DType::f32 ? 3 : 1; more; --more) {
                    const uint32_t b0 = take_pair(chunks[0][chunk], i) ^ signs[0][i] ^ turn;
                    const uint32_t b1 = take_pair(chunks[1][chunk], i) ^ signs[1][i] ^ turn;
                    if constexpr (DTYPE == DType::f16) ptx::mma_f16(sum, a, b0, b1, sum);
                    else ptx::mma_bf16(sum, a, b0, b1, sum);
                }
            }
        }
        if (!call.rotate) return;
#pragma unroll
        for (int width = 1; width < PAIRS; width *= 2)
#pragma unroll
            for (int n = 0; n < PAIRS; ++n)
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    if (!(n & width)) {
                        const float a = x[n][j], b = x[n + width][j];
                        x[n][j] = a + b, x[n + width][j] = a - b;
                    }
    }

    // Takes the mean off K, or sums what that took from Q's scores.
    __device__ __forceinline__ void use_mean(int round, uint32_t thread, Numbers& x) const {
        if (!IS_K && !shifts()) return;
        float dot[2] = {};
        const float* mean = shared.mean + first_channel(thread);
#pragma unroll
        for (int n = 0; n < PAIRS; n += 2) {
            const float4 four = *reinterpret_cast<const float4*>(mean + 2 * n);
            const float of[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                float& number = x[n + j / 4][j % 4];
                if constexpr (IS_K) number -= of[j / 2];
                else dot[j % 2] = fmaf(number, of[j / 2], dot[j % 2]);
            }
        }
        if constexpr (!IS_K) {
            const uint32_t lane = thread % 32;
            const float sum = join_lanes(dot[0], dot[1], lane, [](float a, float b) { return a + b; });
            if (lane < 8) atomicAdd(shared.shift + first_token(round, thread) + lane % 4 * 2 + lane / 4, sum);
        }
    }

    // Adds the tokens to the largest magnitudes of their groups; a NaN counts as the largest.
    __device__ __forceinline__ void find_top(int round, uint32_t thread, const Numbers& x) const {
        float tops[2] = {};
#pragma unroll
        for (int n = 0; n < PAIRS; ++n)
#pragma unroll
            for (int j = 0; j < 4; ++j) tops[j % 2] = ptx::max_nan(tops[j % 2], fabsf(x[n][j]));
        const uint32_t lane = thread % 32;
        const float top = join_lanes(tops[0], tops[1], lane, [](float a, float b) { return ptx::max_nan(a, b); });
        const uint32_t local = first_token(round, thread) + lane % 4 * 2 + lane / 4;
        if (lane >= 8 || (IS_K && int(local) >= shared.count)) return;  // Q's tokens beyond the end are zeros
        atomicMax(shared.top + group(local), __float_as_int(top));
        if (!IS_K && !(top * fabsf(factor()) < LARGEST)) job.stats.bad[shared.kv_row] = 1;  // K: stats_kernel has looked
    }

    // The scale of a group.
    __device__ __forceinline__ void store_scale(uint32_t at) const {
        const float top = __int_as_float(shared.top[at]) * fabsf(factor());
        float* scale = (IS_K ? job.k_codes.scale : job.q_codes.scale) + (shared.base >> block() << sub());
        scale[at] = top > TINY ? __fdiv_rn(top, 127.0f) : 0.0f;
        if (IS_K) atomicMax(job.stats.k_top + shared.kv_row, __float_as_int(scale[at]));
    }

    __device__ __forceinline__ void store_codes(int round, uint32_t thread, const Numbers& x) const {
        int8_t* codes = (IS_K ? job.k_codes.codes : job.q_codes.codes) + shared.base * DIM;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const uint32_t local = first_token(round, thread) + thread % 4 * 2 + j;
            const float top = __int_as_float(shared.top[group(local)]);
            const bool any = top * fabsf(factor()) > TINY && (!IS_K || int(local) < shared.count);
            // by way of top / 127, whose reciprocal is no subnormal number
            const float inverse = any ? ptx::reciprocal(top * copysignf(1.0f / 127.0f, factor())) : 0.0f;
            uint32_t words[PAIRS / 2];
#pragma unroll
            for (int n = 0; n < PAIRS; n += 2)
                words[n / 2] = round_to_int8(x[n][j], x[n][2 + j], x[n + 1][j], x[n + 1][2 + j], inverse);
            int8_t* to = codes + place(local, first_channel(thread));
            if constexpr (PAIRS == 8) *reinterpret_cast<uint4*>(to) = {words[0], words[1], words[2], words[3]};
            else *reinterpret_cast<uint2*>(to) = {words[0], words[1]};
        }
    }
};

__device__ __forceinline__ uint32_t sign_bit(uint32_t channel) { return channel * HASH & 0x80000000u; }

// K's mean as Int8Tokens has its tokens, by one warp: channel i * 32 + lane is number i of a lane. Q's is divided by what two
// vectors without the rotation's norm gain.
template <int DIM, bool IS_K> __device__ __forceinline__ void load_mean(const CodesJob& job, int kv_row, Int8Shared& shared) {
    constexpr int EACH = DIM / 32;
    const uint32_t lane = threadIdx.x % 32;
    const float* mean = job.stats.k_mean + int64_t(kv_row) * DIM + lane;
    float x[EACH];
#pragma unroll
    for (int i = 0; i < EACH; ++i) x[i] = __ldg(mean + i * 32);
    if (job.call.rotate) {
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            x[i] = __uint_as_float(__float_as_uint(x[i]) ^ sign_bit(i * 32 + lane));
#pragma unroll
            for (int width = 1; width < 32; width *= 2)
                x[i] = fmaf(lane & width ? -1.0f : 1.0f, x[i], __shfl_xor_sync(~0u, x[i], width));
        }
#pragma unroll
        for (int width = 1; width < EACH; width *= 2)
#pragma unroll
            for (int i = 0; i < EACH; ++i)
                if (!(i & width)) {
                    const float a = x[i], b = x[i + width];
                    x[i] = a + b, x[i + width] = a - b;
                }
        if (!IS_K)
#pragma unroll
            for (int i = 0; i < EACH; ++i) x[i] *= 1.0f / DIM;
    }
#pragma unroll
    for (int i = 0; i < EACH; ++i) shared.mean[i * 32 + lane] = x[i];
}

// A lane's part of the Hadamard matrix or the identity: rows lane / 4 and 8 more, columns 2 * (lane % 4), 1 more, and 8 more each.
template <DType DTYPE> __device__ __forceinline__ uint4 matrix_of(bool rotate, uint32_t lane) {
    if (!rotate) return identity<DTYPE>(lane);
    constexpr uint32_t ODD = 0x80000000u;
    const uint32_t row = lane / 4, both = row & lane & 3;
    const uint32_t low = ONES<DTYPE> ^ ((both ^ both >> 1) & 1) * SIGNS, high = low ^ row / 4 * SIGNS;
    return {low, low ^ ODD, high, high ^ ODD};
}

template <DType DTYPE, int DIM, bool IS_K>
__device__ __forceinline__ void set_up(const CodesJob& job, int row, int first, int n, Int8Shared& shared) {
    constexpr int CHUNKS = DIM / 64;
    const Call& call = job.call;
    const int kv_row = IS_K ? row : row / job.group;
    const uint32_t thread = threadIdx.x;
    if (thread == 0) {
        shared.base = int64_t(row) * (IS_K ? call.k_padded() : call.q_padded()) + first;
        shared.kv_row = kv_row;
        shared.count = n - first;
    }
    if (thread < 32) shared.matrix[thread] = matrix_of<DTYPE>(call.rotate, thread);
    if (thread < TILE) shared.top[thread] = 0;
    if (thread < 2 * TILE) shared.shift[thread] = 0.0f;
    if (thread < DIM / 2) {  // the two channels of a word
        const uint32_t chunk = thread / 16, first = chunk / CHUNKS * (DIM / 2) + chunk % CHUNKS * 8;
        const uint32_t channel = first + thread / 4 % 4 * (DIM / 8) + thread % 4 * 2;
        const uint32_t signs = sign_bit(channel) >> 16 | sign_bit(channel + 1);
        reinterpret_cast<uint32_t*>(shared.signs)[thread] = call.rotate ? signs : 0;
    }
    if (thread >= program_threads(DIM) - 32 && (IS_K || job.q_codes.lse_shift)) load_mean<DIM, IS_K>(job, kv_row, shared);
}

// Tokens first .. first + PASSES * TILE of Q or K, which are whole groups.
template <DType DTYPE, int DIM, int PASSES, bool IS_K>
__device__ __forceinline__ void quantize_int8(const CodesJob& job, int row, int first, Int8Shared& shared) {
    using Part = Int8Tokens<DTYPE, DIM, IS_K>;
    constexpr int ROUNDS = PASSES * TILE / Part::TOKENS;
    const Call& call = job.call;
    const Divider& heads = IS_K ? job.kv_heads : job.heads;
    const int b = row / heads, h = row % heads;
    const auto in = Tokens<DTYPE>::of(IS_K ? job.k : job.q, IS_K ? call.cu_k : call.cu_q, b, h, IS_K ? call.nk : call.nq);
    if (first / BLOCK * BLOCK >= in.n) return;
    constexpr int AHEAD = DTYPE == DType::f32 && DIM == 256 ? 1 : ROUNDS;  // rounds whose tokens the registers hold
    Chunk<DTYPE> chunks[ROUNDS][2][Part::CHUNKS];
    const auto load = [&](int round) {
        const uint32_t thread = threadIdx.x;
        const int token = first + Part::first_token(round, thread) + thread % 32 / 4, channel = thread % 4 * (DIM / 8);
        const auto* from = in.data + token * in.stride + channel;
        const int left = token < in.n ? in.head_dim - channel : 0;
#pragma unroll
        for (int half = 0; half < DIM; half += DIM / 2)
            load_last(chunks[round][half > 0], in.wide, [&](int i) { return from + half + i * 8; },
                      [&](int i) { return left - half - i * 8; });
    };
#pragma unroll
    for (int round = 0; round < AHEAD; ++round) load(round);
    set_up<DTYPE, DIM, IS_K>(job, row, first, in.n, shared);
    __syncthreads();
    const Part part{job, call, shared};
    typename Part::Numbers x[ROUNDS];
#pragma unroll
    for (int round = 0; round < ROUNDS; ++round) {
        const uint32_t thread = ptx::thread_again();
        if (round >= AHEAD) load(round);
        part.multiply(thread, chunks[round], x[round]);
        part.use_mean(round, thread, x[round]);
        part.find_top(round, thread, x[round]);
    }
    __syncthreads();
    const uint32_t thread = ptx::thread_again();
    if (thread < PASSES * TILE >> part.block() << part.sub()) part.store_scale(thread);
    if (part.shifts() && thread < PASSES * TILE)
        job.q_codes.lse_shift[shared.base + thread] = shared.shift[thread] * call.sm_scale;
#pragma unroll
    for (int round = 0; round < ROUNDS; ++round) part.store_codes(round, thread, x[round]);
}

// Programs on a multiprocessor: what the registers allow without spills.
SAGE_HD constexpr int resident(DType dtype, int dim, int passes) {
    const int programs = (dtype == DType::f32 ? 384 : 512) / dim / passes;
    return programs > 0 ? programs : 1;
}

template <DType DTYPE, int DIM, int PASSES>
__global__ void __launch_bounds__(program_threads(DIM), resident(DTYPE, DIM, PASSES))
    quantize_kernel(const __grid_constant__ CodesJob job) {
    __shared__ Int8Shared shared;
    const int program = blockIdx.x;
    if (program >= job.kv_programs) {
        const int unit = program - job.kv_programs;
        quantize_int8<DTYPE, DIM, PASSES, false>(job, unit / job.q_units, unit % job.q_units * (PASSES * TILE), shared);
        return;
    }
    // from the end: of what stats_kernel read, the L2 cache holds the last
    const int unit = job.kv_units - 1 - program / job.per_unit, role = program % job.per_unit;
    const int row = unit / job.k_units, first = unit % job.k_units * (PASSES * TILE);
    const int v_first = first + (role - job.k_per_unit) * TILE;
    if (role < job.k_per_unit) quantize_int8<DTYPE, DIM, PASSES, true>(job, row, first, shared);
    else if (p_type(job.call.mode) == PType::f16) quantize_v<DTYPE, DIM, PType::f16>(job, row, v_first);
    else if (p_type(job.call.mode) == PType::u8) quantize_v<DTYPE, DIM, PType::u8>(job, row, v_first);
    else quantize_v<DTYPE, DIM, PType::e4m3>(job, row, v_first);
}

}  // namespace
}  // namespace sage
