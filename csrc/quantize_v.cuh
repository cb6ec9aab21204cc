// V's part of quantize.cuh, and what both parts need. Matrix instructions turn 64 tokens about, which are rounded and stored by
// channel.
#pragma once

#include "common/tokens.cuh"

namespace sage {

constexpr int TILE = 64;              // tokens that a program turns into codes at a time
SAGE_HD constexpr int program_threads(int dim) { return 2 * dim; }  // 32 numbers each
constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23: added, it leaves a number rounded to nearest even in the low bits

// Division of numbers below 2^31 by multiplication: a program has little to do but its indices.
struct Divider {
    uint32_t divisor, factor, shift;

    static SAGE_HD Divider of(int64_t divisor) {
        uint32_t shift = 0;
        while (int64_t(1) << shift < divisor) ++shift;
        return {uint32_t(divisor), uint32_t((((uint64_t(1) << shift) - divisor) << 32) / divisor + 1), shift};
    }
    friend __device__ __forceinline__ int operator/(int n, const Divider& d) { return (__umulhi(n, d.factor) + n) >> d.shift; }
    friend __device__ __forceinline__ int operator%(int n, const Divider& d) { return n - n / d * int(d.divisor); }
};

// Programs 0 .. kv_programs: for each unit of PASSES * TILE tokens first K (if asked), then V. After them Q, one for each unit.
struct CodesJob {
    Call call;
    Input q, k, v;
    Stats stats;
    QCodes q_codes;
    KCodes k_codes;
    VCodes v_codes;
    int kv_programs, kv_units, k_per_unit;  // k_per_unit: programs of a unit that are for K
    Divider per_unit;                       // programs of a unit of K and V
    Divider q_units, k_units;               // units of a head
    Divider heads, kv_heads, group;
};

// The pair i of numbers as an operand. Of floats it is their top 16 bits, which they then lose: three such pairs add up to them.
template <DType DTYPE> __device__ __forceinline__ uint32_t take_pair(Chunk<DTYPE>& chunk, int i) {
    if constexpr (DTYPE == DType::f32) {
        uint32_t* const two = chunk.word + 2 * i;
        const uint32_t pair = ptx::permute(two[0], two[1], 0x7632);
#pragma unroll
        for (int j = 0; j < 2; ++j)
            two[j] = __float_as_uint(__uint_as_float(two[j]) - __uint_as_float(two[j] & 0xFFFF0000u));
        return pair;
    } else {
        return chunk.word[i];
    }
}

template <DType DTYPE> constexpr uint32_t ONES = DTYPE == DType::f16 ? 0x3C003C00u : 0x3F803F80u;  // two of them

// A lane's part of a matrix A that is the identity but for the order of its rows: row g takes column 2 * g, and row 8 + g
// the one after that.
template <DType DTYPE> __device__ __forceinline__ uint4 identity(uint32_t lane) {
    const uint32_t row = lane / 4, one = row % 4 == lane % 4 ? ONES<DTYPE> & 0xFFFFu : 0;
    const uint32_t low = row < 4 ? one : 0, high = row < 4 ? 0 : one;
    return {low, low << 16, high, high << 16};
}

// Two codes of V as the low bytes of a word, the first in the lowest. TYPE: of the P that V's type belongs to.
template <PType TYPE> __device__ __forceinline__ uint32_t round_v(float a, float b) {
    if constexpr (TYPE == PType::f16) {
        return ptx::to_f16x2(a, b);
    } else if constexpr (TYPE == PType::u8) {
        return ptx::permute(__float_as_uint(a + MAGIC), __float_as_uint(b + MAGIC), 0x0040);  // below 127.5, by the choice of scale
    } else {
#if __CUDA_ARCH__ >= 890
        return ptx::to_e4m3x2(a, b);
#else
        return 0;  // no attention kernel of these modes is compiled for such an architecture
#endif
    }
}

// The sum of 8 codes in units of code_unit. Integers, so that any order gives the same bits.
template <PType TYPE, int WORDS> __device__ __forceinline__ int32_t sum_of_codes(const uint32_t (&words)[WORDS]) {
    if constexpr (TYPE == PType::u8) {
        return ptx::add_s8x4(words[0], ptx::add_s8x4(words[1], 0));
    } else if constexpr (TYPE == PType::f16) {
        int32_t sum = 0;
#pragma unroll
        for (int i = 0; i < WORDS; ++i)
            sum += int32_t(ptx::from_f16(uint16_t(words[i])) * 0x1p24f) + int32_t(ptx::from_f16(uint16_t(words[i] >> 16)) * 0x1p24f);
        return sum;
    } else {
        float sum = 0.0f;  // exact: of at most 8 * 448 / 2^-9 units
#if __CUDA_ARCH__ >= 890
#pragma unroll
        for (int i = 0; i < 2 * WORDS; ++i) {
            const uint32_t two = ptx::from_e4m3x2(uint16_t(words[i / 2] >> i % 2 * 16));
            sum += ptx::from_f16(uint16_t(two)) + ptx::from_f16(uint16_t(two >> 16));
        }
#endif
        return int32_t(sum * 0x1p9f);
    }
}

// Which of 64 keys has place `at` among a channel's codes: the inverse of key_position and wgmma_key_position. It gives the bits
// of `at` new places, so keys of two numbers that share no bits add up.
template <int BYTES> __device__ __forceinline__ int key_at(bool wgmma, int at) {
    constexpr int KEYS = 64 / BYTES, EACH = KEYS / 4;  // in a row, and of them a thread's
    if (!wgmma) return at / KEYS * KEYS + at % KEYS / EACH * 2 + at % EACH / 2 * 8 + at % 2;
    return BYTES == 2 ? at : at / 16 * 16 + at / 4 % 4 * 2 + at / 2 % 2 * 8 + at % 2;
}

// 64 tokens of V. A warp takes 32 of them and of these 32 channels, 8 tokens at a time: they are the columns of B, words as loaded,
// and A is the identity, so a lane gets 4 channels of two tokens. Which tokens those are is chosen so that the lane's 8 codes of a
// channel lie side by side, and those of its quad fill 32 or 64 bytes: no code passes through shared memory.
template <DType DTYPE, int DIM, PType TYPE>
__device__ __forceinline__ void quantize_v(const CodesJob& job, int row, int first) {
    constexpr int BYTES = TYPE == PType::f16 ? 2 : 1, WORDS = 2 * BYTES, GROUPS = DIM / 32;
    const Call& call = job.call;
    const auto in = Tokens<DTYPE>::of(job.v, call.cu_k, row / job.kv_heads, row % job.kv_heads, call.nk);
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int group = warp % GROUPS * 32, half = warp / GROUPS * 32;  // the warp's first channel, and its first place
    if (first / BLOCK * BLOCK >= in.n || group >= call.v_dim) return;
    const bool wgmma = DIM <= 128 && call.wgmma;

    Chunk<DTYPE> chunks[4];
    const int loaded = first + key_at<BYTES>(wgmma, half + lane / 8 * 8 + lane / 4 % 2), channel = group + lane % 4 * 8;
    const auto* from = in.data + loaded * in.stride + channel;
    load_last(chunks, in.wide, [&](int i) { return from + key_at<BYTES>(wgmma, 2 * i) * in.stride; },
              [&](int i) { return loaded + key_at<BYTES>(wgmma, 2 * i) < in.n ? in.head_dim - channel : 0; });

    // the first of the lane's 4 channels; the others come 1, 4 and 5 after it
    const int64_t own = int64_t(row) * DIM + group + lane / 4 % 4 * 8 + lane / 16 * 2;
    float mean[4], inverse[4];
#pragma unroll
    for (int c = 0; c < 4; c += 2) {
        const float2 means = __ldg(reinterpret_cast<const float2*>(job.stats.v_mean + own + 2 * c));
        const float2 inverses = __ldg(reinterpret_cast<const float2*>(job.stats.v_inverse + own + 2 * c));
        mean[c] = means.x, mean[c + 1] = means.y, inverse[c] = inverses.x, inverse[c + 1] = inverses.y;
    }
    const uint4 one = identity<DTYPE>(lane);
    const uint32_t a[4] = {one.x, one.y, one.z, one.w};
    uint32_t words[4][WORDS];  // of each channel
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float x[4][2] = {};  // of each channel two tokens
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
            float d[4] = {};
#pragma unroll
            for (int more = DTYPE == DType::f32 ? 3 : 1; more; --more) {
                const uint32_t b0 = take_pair(chunks[i], 2 * pair), b1 = take_pair(chunks[i], 2 * pair + 1);
                if constexpr (DTYPE == DType::f16) ptx::mma_f16(d, a, b0, b1, d);
                else ptx::mma_bf16(d, a, b0, b1, d);
            }
            x[2 * pair][0] = d[0], x[2 * pair][1] = d[1], x[2 * pair + 1][0] = d[2], x[2 * pair + 1][1] = d[3];
        }
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            const uint32_t two = round_v<TYPE>(__fmul_rn(x[c][0] - mean[c], inverse[c]), __fmul_rn(x[c][1] - mean[c], inverse[c]));
            if constexpr (BYTES == 2) words[c][i] = two;
            else words[c][i / 2] = i % 2 ? ptx::permute(words[c][i / 2], two, 0x5410) : two;
        }
    }

    const int place = half + lane % 4 * 8;  // of the lane's codes
    if (first + TILE > in.n) {  // tokens beyond the end are zeros, whatever the mean is
        const int left = in.n - first - key_at<BYTES>(wgmma, place);
#pragma unroll
        for (int i = 0; i < 8; ++i)
            if (key_at<BYTES>(wgmma, i) >= left)
#pragma unroll
                for (int c = 0; c < 4; ++c) words[c][i * BYTES / 4] &= ~(((1u << 8 * BYTES) - 1) << (i * BYTES % 4 * 8));
    }

    if (call.smooth_v) {
        // the lanes of a quad have the same channels: each gets the sum of one
        int32_t sums[4];
#pragma unroll
        for (int c = 0; c < 4; ++c) sums[c] = sum_of_codes<TYPE>(words[c]);
#pragma unroll
        for (int width = 2; width; width /= 2)
#pragma unroll
            for (int c = 0; c < width; ++c) {
                const bool second = lane & width;
                const int32_t other = __shfl_xor_sync(~0u, second ? sums[c] : sums[c + width], width);
                sums[c] = (second ? sums[c + width] : sums[c]) + other;
            }
        // and the two halves of the tokens meet in shared memory, as each addition to the head's sums takes the L2 cache time
        __shared__ int32_t of_others[DIM];
        const int mine = group + lane / 4 % 4 * 8 + lane / 16 * 2 + lane % 4 + (lane & 2);
        if (half) of_others[mine] = sums[0];
        __syncthreads();
        auto* total = reinterpret_cast<unsigned long long*>(job.stats.v_sums + int64_t(row) * DIM + mine);
        if (!half) atomicAdd(total, static_cast<unsigned long long>(int64_t(sums[0] + of_others[mine])));
    }

    const int log2_of_row = wgmma ? 7 : 6;
    // of 64 bytes each, that the channel has of all heads before the one with these codes
    const uint32_t pieces = (row * (call.k_padded() / TILE) + first / TILE) * BYTES + place * BYTES / PANEL;
    const int at = pieces * PANEL % (1u << log2_of_row) + place * BYTES % PANEL;
    const int first_row = lane / 16 * 8 + lane / 4 % 4 * 2;  // channel_row, after that of the group
    const int64_t rows = int64_t(pieces >> (log2_of_row - 6)) * call.v_dim + group + first_row;
    uint8_t* const to = job.v_codes.codes + (rows << log2_of_row);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
        const int next = channel_row(c + (c & 2));
        uint8_t* const codes = to + (next << log2_of_row) + (wgmma ? swizzled(at, first_row + next, WGMMA_PANEL) : at);
        if constexpr (BYTES == 2) *reinterpret_cast<uint4*>(codes) = {words[c][0], words[c][1], words[c][2], words[c][3]};
        else *reinterpret_cast<uint2*>(codes) = {words[c][0], words[c][1]};
    }
}

}  // namespace sage
