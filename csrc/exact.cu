// Host side of exact attention.

#include <algorithm>

#include "check.h"
#include "exact.cuh"
#include "kernels.h"

namespace sage {

void launch_exact(const Call& call, View q, View k, View v, const Mask& mask, const int32_t* bad, View out, float* lse,
                  cudaStream_t stream) {
    const int blocks = (call.nq + ROWS - 1) / ROWS, shares = std::min(blocks, MOST_SHARES);
    const ExactJob job{call, Input::of(call, q), Input::of(call, k), Input::of(call, v), mask, bad, out, lse, shares, call.q_rows() * shares};
    const unsigned programs = unsigned(std::min<int64_t>(job.all_shares, MOST_PROGRAMS));
    if (call.dtype == DType::f16) exact_kernel<DType::f16><<<programs, THREADS, 0, stream>>>(job);
    else if (call.dtype == DType::bf16) exact_kernel<DType::bf16><<<programs, THREADS, 0, stream>>>(job);
    else exact_kernel<DType::f32><<<programs, THREADS, 0, stream>>>(job);
    check_launch("exact_kernel", call);
}

}  // namespace sage
