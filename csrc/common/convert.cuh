// Numbers of q, k, v, out and masks by their runtime type.
#pragma once

#include "ptx.cuh"

namespace sage {

// A 16-bit or 32-bit number of the type DTYPE, as raw bits in memory.
template <DType DTYPE> struct Raw { using type = uint16_t; };
template <> struct Raw<DType::f32> { using type = uint32_t; };

template <DType DTYPE> __device__ __forceinline__ float to_float(typename Raw<DTYPE>::type x) {
    if constexpr (DTYPE == DType::f16) return ptx::from_f16(x);
    else if constexpr (DTYPE == DType::bf16) return ptx::from_bf16(x);
    else return __uint_as_float(x);
}

template <DType DTYPE> __device__ __forceinline__ typename Raw<DTYPE>::type from_float(float x) {
    if constexpr (DTYPE == DType::f16) return ptx::to_f16(x);
    else if constexpr (DTYPE == DType::bf16) return ptx::to_bf16(x);
    else return __float_as_uint(x);
}

// Element `i` of an array of type `dtype`.
__device__ __forceinline__ float load_float(const void* data, int64_t i, DType dtype) {
    if (dtype == DType::f32) return static_cast<const float*>(data)[i];
    const uint16_t x = static_cast<const uint16_t*>(data)[i];
    return dtype == DType::f16 ? ptx::from_f16(x) : ptx::from_bf16(x);
}

__device__ __forceinline__ void store_float(void* data, int64_t i, float x, DType dtype) {
    if (dtype == DType::f32) static_cast<float*>(data)[i] = x;
    else static_cast<uint16_t*>(data)[i] = dtype == DType::f16 ? ptx::to_f16(x) : ptx::to_bf16(x);
}

}  // namespace sage
