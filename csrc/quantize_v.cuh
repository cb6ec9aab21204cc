// V's part of quantize.cuh: 64 tokens are rounded, turned about in shared memory, and stored by channel.
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

template <int DIM> struct VShared {
    uint4 codes[TILE * DIM / 8];  // [64 keys, DIM], of 1 or 2 bytes, in the order of v_cell
    int64_t base;                 // number of the tile's first token among those of all heads,
    int row;                      // and of the head: here, for registers are scarce
};

template <int BYTES> struct Unsigned { using type = uint8_t; };
template <> struct Unsigned<2> { using type = uint16_t; };

// Where in shared memory the codes of 8 channels of a key lie, in units of 8 codes: moved about so that neither the rows
// written nor the columns read meet in a bank.
template <int DIM, int BYTES> __device__ __forceinline__ int v_cell(int key, int chunk) {
    return (key * (DIM / 8) + chunk) ^ (BYTES == 1 ? key / 2 % 4 | key / 16 % 4 << 2 : key / 2 % 2 | key / 8 % 4 << 1);
}

// Two codes of V, the first in the low bytes. TYPE: of the P that V's type belongs to.
template <PType TYPE> __device__ __forceinline__ uint32_t round_v(float a, float b) {
    if constexpr (TYPE == PType::f16) {
        return ptx::to_f16x2(a, b);
    } else if constexpr (TYPE == PType::u8) {
        // below 127.5 in magnitude, by the choice of scale
        return ptx::permute(__float_as_uint(a + MAGIC), __float_as_uint(b + MAGIC), 0x0040) & 0xFFFFu;
    } else {
#if __CUDA_ARCH__ >= 890
        return ptx::to_e4m3x2(a, b);
#else
        return 0;  // no attention kernel of these modes is compiled for such an architecture
#endif
    }
}

// A code in units of code_unit.
template <PType TYPE> __device__ __forceinline__ int32_t units_of_v(uint32_t code) {
    if constexpr (TYPE == PType::f16) return int32_t(ptx::from_f16(uint16_t(code)) * 0x1p24f);
    if constexpr (TYPE == PType::u8) return int8_t(code);
#if __CUDA_ARCH__ >= 890
    return int32_t(ptx::from_f16(uint16_t(ptx::from_e4m3x2(uint16_t(code)))) * 0x1p9f);
#else
    return 0;
#endif
}

// Rounds 64 tokens of V, 4 a thread, into shared memory.
template <DType DTYPE, int DIM, PType TYPE>
__device__ __forceinline__ void round_v_tile(const CodesJob& job, const Tokens<DTYPE>& in, int row, int first,
                                             VShared<DIM>& shared) {
    constexpr int BYTES = TYPE == PType::f16 ? 2 : 1;
    const int chunk = threadIdx.x % (DIM / 8), own = threadIdx.x / (DIM / 8), channel = chunk * 8;
    float mean[8], inverse[8];
    Chunk<DTYPE> chunks[4];
    load8(job.stats.v_mean + int64_t(row) * DIM + channel, mean);
    load8(job.stats.v_inverse + int64_t(row) * DIM + channel, inverse);
    load_last(chunks, in.wide, in.data + (first + own) * in.stride + channel, 16 * in.stride,
              [&](int i) { return first + own + 16 * i < in.n ? in.head_dim - channel : 0; });
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float x[8];
        chunks[i].unpack(x);
        uint32_t pairs[4];
#pragma unroll
        for (int j = 0; j < 8; j += 2) {
            const float a = __fmul_rn(x[j] - mean[j], inverse[j]), b = __fmul_rn(x[j + 1] - mean[j + 1], inverse[j + 1]);
            const uint32_t pair = round_v<TYPE>(a, b);
            pairs[j / 2] = first + own + 16 * i < in.n ? pair : 0;
        }
        const int cell = v_cell<DIM, BYTES>(own + 16 * i, chunk);
        if constexpr (BYTES == 2) reinterpret_cast<uint4*>(shared.codes)[cell] = {pairs[0], pairs[1], pairs[2], pairs[3]};
        else reinterpret_cast<uint2*>(shared.codes)[cell] = {pairs[0] | pairs[1] << 16, pairs[2] | pairs[3] << 16};
    }
}

// Each thread sums one channel over half of the tile's keys. Integers, so that any order gives the same bits.
template <int DIM, PType TYPE> __device__ __forceinline__ void sum_v_tile(const CodesJob& job, const VShared<DIM>& shared) {
    constexpr int BYTES = TYPE == PType::f16 ? 2 : 1;
    using Code = typename Unsigned<BYTES>::type;
    const int channel = threadIdx.x % DIM, half = threadIdx.x / DIM * (TILE / 2);
    int32_t sum = 0;
#pragma unroll 8
    for (int key = half; key < half + TILE / 2; ++key) {
        const Code code = reinterpret_cast<const Code*>(shared.codes)[v_cell<DIM, BYTES>(key, channel / 8) * 8 + channel % 8];
        sum += units_of_v<TYPE>(code);
    }
    auto* total = reinterpret_cast<unsigned long long*>(job.stats.v_sums + int64_t(shared.row) * DIM + channel);
    atomicAdd(total, static_cast<unsigned long long>(int64_t(sum)));
}

// The 4 bytes that a channel has of a thread's keys, for 8 channels from chunk * 8 on.
template <int DIM, int BYTES>
__device__ __forceinline__ void gather_v(const VShared<DIM>& shared, int key, int chunk, uint32_t (&words)[8]) {
    if constexpr (BYTES == 2) {
        const uint4* cells = reinterpret_cast<const uint4*>(shared.codes);
        const uint4 a = cells[v_cell<DIM, BYTES>(key, chunk)], b = cells[v_cell<DIM, BYTES>(key + 1, chunk)];
        words[0] = ptx::permute(a.x, b.x, 0x5410), words[1] = ptx::permute(a.x, b.x, 0x7632);
        words[2] = ptx::permute(a.y, b.y, 0x5410), words[3] = ptx::permute(a.y, b.y, 0x7632);
        words[4] = ptx::permute(a.z, b.z, 0x5410), words[5] = ptx::permute(a.z, b.z, 0x7632);
        words[6] = ptx::permute(a.w, b.w, 0x5410), words[7] = ptx::permute(a.w, b.w, 0x7632);
    } else {
        const uint2* cells = reinterpret_cast<const uint2*>(shared.codes);
        const uint2 a = cells[v_cell<DIM, BYTES>(key, chunk)], b = cells[v_cell<DIM, BYTES>(key + 1, chunk)];
        const uint2 c = cells[v_cell<DIM, BYTES>(key + 8, chunk)], d = cells[v_cell<DIM, BYTES>(key + 9, chunk)];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint32_t ka = half ? a.y : a.x, kb = half ? b.y : b.x, kc = half ? c.y : c.x, kd = half ? d.y : d.x;
#pragma unroll
            for (int pair = 0; pair < 2; ++pair) {
                const uint32_t select = pair ? 0x7362 : 0x5140;
                const uint32_t ab = ptx::permute(ka, kb, select), cd = ptx::permute(kc, kd, select);
                words[4 * half + 2 * pair] = ptx::permute(ab, cd, 0x5410);
                words[4 * half + 2 * pair + 1] = ptx::permute(ab, cd, 0x7632);
            }
        }
    }
}

// 64 tokens of V. 16 lanes write the 64 bytes that a channel has of 64 (1 byte) or 32 (2 bytes) keys: a row, or half of wgmma's.
template <DType DTYPE, int DIM, PType TYPE>
__device__ __forceinline__ void quantize_v(const CodesJob& job, int row, int first, VShared<DIM>& shared) {
    const Call& call = job.call;
    const auto in = Tokens<DTYPE>::of(job.v, call.cu_k, row / job.kv_heads, row % job.kv_heads, call.nk);
    if (first / BLOCK * BLOCK >= in.n) return;
    if (threadIdx.x == 0) shared.row = row, shared.base = int64_t(row) * call.k_padded() + first;
    round_v_tile<DTYPE, DIM, TYPE>(job, in, row, first, shared);
    __syncthreads();
    if (call.smooth_v) sum_v_tile<DIM, TYPE>(job, shared);
    const int thread = ptx::thread_again(), word = thread % 16, chunk = thread / 16;
    if (chunk * 8 >= call.v_dim) return;
    constexpr int BYTES = TYPE == PType::f16 ? 2 : 1, ROWS = BYTES;  // rows of 64 bytes that the tokens of a tile fill
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        uint32_t words[8];
        const int key = (BYTES == 2 ? 32 * i + word % 4 * 8 : word % 4 * 16) + word / 4 * 2;  // the inverse of key_position
        gather_v<DIM, BYTES>(shared, key, chunk, words);
        const int64_t stretch = shared.base / TILE * ROWS + i;
        const int first_row = channel_row(chunk * 8);  // channel_row of a chunk and within it add up
        uint32_t* codes = reinterpret_cast<uint32_t*>(job.v_codes.codes);
        if (DIM <= 128 && call.wgmma) {
            const int at = int(stretch % 2) * PANEL + (word % 4 * 4 + word / 4) * 4;
            codes += (stretch / 2 * call.v_dim + first_row) * (WGMMA_PANEL / 4);
            uint32_t* const of_parity[2] = {codes + swizzled(at, first_row, WGMMA_PANEL) / 4,
                                            codes + swizzled(at, first_row + 1, WGMMA_PANEL) / 4};
#pragma unroll
            for (int j = 0; j < 8; ++j) of_parity[j % 2][channel_row(j) * (WGMMA_PANEL / 4)] = words[j];
        } else {
            codes += (stretch * call.v_dim + first_row) * (PANEL / 4) + word;
#pragma unroll
            for (int j = 0; j < 8; ++j) codes[channel_row(j) * (PANEL / 4)] = words[j];
        }
    }
}

}  // namespace sage
