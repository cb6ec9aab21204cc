// Host side of the statistics of k and v.

#include "check.h"
#include "kernels.h"
#include "stats.cuh"

namespace sage {

void launch_stats(const Call& call, View k, View v, const Stats& stats, cudaStream_t stream) {
    check(cudaMemsetAsync(stats.bad, 0, stats.zeroed, stream), "cudaMemsetAsync", call);
    const int chunks = call.chunks(), blocks = (call.nk + PANEL - 1) / PANEL;
    const StatsJob job{call, Input::of(call, k), Input::of(call, v), stats, chunks, (blocks + chunks - 1) / chunks * PANEL};
    const unsigned programs = unsigned(call.kv_rows() * chunks);
    if (call.dtype == DType::f16) stats_kernel<DType::f16><<<programs, THREADS, 0, stream>>>(job);
    else if (call.dtype == DType::bf16) stats_kernel<DType::bf16><<<programs, THREADS, 0, stream>>>(job);
    else stats_kernel<DType::f32><<<programs, THREADS, 0, stream>>>(job);
    check_launch("stats_kernel", call);
}

}  // namespace sage
