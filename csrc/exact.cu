// Host side of exact attention.

#include "check.h"
#include "exact.cuh"
#include "kernels.h"

namespace sage {

void launch_exact(const Call& call, View q, View k, View v, const Mask& mask, const int32_t* bad, View out, float* lse,
                  cudaStream_t stream) {
    const int blocks = (call.nq + ROWS - 1) / ROWS;
    const ExactJob job{call, Input::of(call, q), Input::of(call, k), Input::of(call, v), mask, bad, out, lse,
                       blocks < PROGRAMS ? blocks : PROGRAMS};
    const unsigned programs = unsigned(call.q_rows() * job.programs);
    if (call.dtype == DType::f16) exact_kernel<DType::f16><<<programs, THREADS, 0, stream>>>(job);
    else if (call.dtype == DType::bf16) exact_kernel<DType::bf16><<<programs, THREADS, 0, stream>>>(job);
    else exact_kernel<DType::f32><<<programs, THREADS, 0, stream>>>(job);
    check_launch("exact_kernel", call);
}

}  // namespace sage
