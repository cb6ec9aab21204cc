// The causal rule and the caller's mask on one score.
#pragma once

#include "convert.cuh"

namespace sage {

// The mask of one (batch, head): the base pointer moved, strides kept.
__device__ __forceinline__ Mask mask_of_head(Mask mask, int b, int h) {
    const int64_t bytes = mask.kind == MaskKind::boolean ? 1 : mask.kind == MaskKind::f32 ? 4 : 2;
    mask.data = static_cast<const char*>(mask.data) + (b * mask.b + h * mask.h) * bytes;
    return mask;
}

// score (base 2) with the mask added, or -inf where query m may not see key n. The caller has checked that m and n exist.
__device__ __forceinline__ float masked(float score, const Mask& mask, int m, int n) {
    if (mask.kind == MaskKind::none) return score;
    const int64_t at = m * mask.q + n * mask.k;
    if (mask.kind == MaskKind::boolean) return static_cast<const uint8_t*>(mask.data)[at] ? score : -INFINITY;
    const DType dtype = mask.kind == MaskKind::f16 ? DType::f16 : mask.kind == MaskKind::bf16 ? DType::bf16 : DType::f32;
    const float bias = load_float(mask.data, at, dtype);
    if (bias == -INFINITY) return -INFINITY;
    // a finite value, such as a dtype's smallest, must not become an inf in base 2; NaN and inf stay what they are
    const float near = fabsf(bias) < INFINITY ? fminf(fmaxf(bias, -MASK_LIMIT), MASK_LIMIT) : bias;
    return score + near * LOG2E;
}

}  // namespace sage
