// From sums to what the caller gets: out = acc / total * v_scale + what V smoothing puts back.
#pragma once

#include "convert.cuh"

namespace sage {

// What a channel of V counts, and what is put back. n: keys of this sequence.
__device__ __forceinline__ float2 finish_of(const Call& call, const Stats& stats, int64_t kv_row, int channel, int n) {
    const int64_t at = kv_row * call.dim + channel;
    const float scale = stats.v_scale[at];
    const float mean_of_codes = float(stats.v_sums[at]) * (code_unit(call.mode) / n);
    return {scale, call.smooth_v ? stats.v_mean[at] - mean_of_codes * scale : 0.0f};
}

// What a head's outputs need at the end, for 8 neighbouring channels.
struct Finish {
    float scale[8];
    float put_back[8];

    // channel: the first of the 8.
    __device__ static Finish of(const Call& call, const Stats& stats, int64_t kv_row, int channel, int n) {
        Finish f;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const float2 one = finish_of(call, stats, kv_row, channel + i, n);
            f.scale[i] = one.x, f.put_back[i] = one.y;
        }
        return f;
    }

    // acc * inverse is the mean of V's codes; inverse 0 stands for a query that saw no key, whose output is 0.
    __device__ float apply(float acc, float inverse, int i) const {
        return inverse == 0.0f ? 0.0f : fmaf(acc * inverse, scale[i], put_back[i]);
    }
};

// 8 channels of one output row. Rows are ours, so 16-byte stores are aligned wherever head_dim is a multiple of 8.
template <DType DTYPE> __device__ __forceinline__ void store8(void* data, int64_t at, const float (&x)[8]) {
    if constexpr (DTYPE == DType::f32) {
        float4* to = reinterpret_cast<float4*>(static_cast<float*>(data) + at);
        to[0] = make_float4(x[0], x[1], x[2], x[3]);
        to[1] = make_float4(x[4], x[5], x[6], x[7]);
    } else {
        uint32_t w[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
            w[i] = DTYPE == DType::f16 ? ptx::to_f16x2(x[2 * i], x[2 * i + 1]) : ptx::to_bf16x2(x[2 * i], x[2 * i + 1]);
        // The compiler takes some of these apart, into four stores each, if it may.
        asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(static_cast<uint16_t*>(data) + at), "r"(w[0]), "r"(w[1]),
                     "r"(w[2]), "r"(w[3]) : "memory");
    }
}

// Those of them that there are.
__device__ __forceinline__ void store_up_to_8(const Call& call, void* data, int64_t at, int channel, const float (&x)[8]) {
    if (call.head_dim % 8 == 0) {
        if (channel >= call.head_dim) return;
        if (call.dtype == DType::f32) store8<DType::f32>(data, at, x);
        else if (call.dtype == DType::f16) store8<DType::f16>(data, at, x);
        else store8<DType::bf16>(data, at, x);
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i)
            if (channel + i < call.head_dim) store_float(data, at + i, x[i], call.dtype);
    }
}

// Natural log of the sum over keys, from the largest score and the total, both in base 2.
__device__ __forceinline__ float log_sum_exp(const Call& call, float top, float total, float shift) {
    return total == 0.0f ? -INFINITY : (top + ptx::log2(total) - call.p_max_log2) * (1.0f / LOG2E) + shift;
}

}  // namespace sage
