// The four steps of a call, in order. Each only launches, on `stream` of the current device.
#pragma once

#include <cuda_runtime.h>

#include "params.h"

namespace sage {

// Means of k and v, scale of v, and which heads are to be computed exactly: into `stats`.
void launch_stats(const Call&, View k, View v, const Stats&, cudaStream_t);

// Which of q, k and v to quantise in this launch.
enum Parts : int { PART_Q = 1, PART_K = 2, PART_V = 4 };
void launch_quantize(const Call&, int parts, View q, View k, View v, const Stats&, const QCodes&, const KCodes&,
                     const VCodes&, cudaStream_t);

// Unquantised float32 attention for the heads flagged in stats.bad; returns at once for all others.
void launch_exact(const Call&, View q, View k, View v, const Mask&, const int32_t* bad, View out, float* lse, cudaStream_t);

// Quantised attention for the others, and, if call.splits > 1, the combination of the parts.
void launch_attention(const Call&, const QCodes&, const KCodes&, const VCodes&, const Stats&, const Mask&, const Partials&,
                      View out, float* lse, cudaStream_t);

// Keys that share one flush of the accumulator (and, in int8 PV, one scale of P).
// arch: compute capability of the compiled code times ten.
int key_tile(Mode, int dim, int v_dim, int arch);
// How many parts the keys should be shared out to so that `multiprocessors` have work.
int choose_splits(const Call&, int multiprocessors, int arch);

}  // namespace sage
