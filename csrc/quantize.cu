// Host side of quantisation: which kernel, on how many programs.

#include "check.h"
#include "kernels.h"
#include "quantize.cuh"

namespace sage {
namespace {

template <DType DTYPE, int DIM, int PASSES> void launch(CodesJob& job, int parts, cudaStream_t stream) {
    const Call& call = job.call;
    const int q_units = call.q_padded() / (PASSES * TILE), k_units = call.k_padded() / (PASSES * TILE);
    job.k_per_unit = parts & PART_K ? 1 : 0;
    const int per_unit = job.k_per_unit + (parts & PART_V ? PASSES : 0);
    job.kv_units = int(call.kv_rows() * k_units), job.kv_programs = job.kv_units * per_unit;
    job.per_unit = Divider::of(per_unit ? per_unit : 1), job.q_units = Divider::of(q_units), job.k_units = Divider::of(k_units);
    job.heads = Divider::of(call.heads), job.kv_heads = Divider::of(call.kv_heads), job.group = Divider::of(call.group());
    const int64_t programs = job.kv_programs + (parts & PART_Q ? call.q_rows() * q_units : 0);
    if (programs > 0) quantize_kernel<DTYPE, DIM, PASSES><<<unsigned(programs), program_threads(DIM), 0, stream>>>(job);
}

template <DType DTYPE, int DIM> void launch(CodesJob& job, int parts, cudaStream_t stream) {
    // a group of 128 tokens takes the registers of two passes
    if (parts & PART_Q && job.call.q_block > TILE) launch<DTYPE, DIM, 2>(job, parts, stream);
    else launch<DTYPE, DIM, 1>(job, parts, stream);
}

template <DType DTYPE> void launch(CodesJob& job, int parts, cudaStream_t stream) {
    if (job.call.dim == 64) launch<DTYPE, 64>(job, parts, stream);
    else if (job.call.dim == 128) launch<DTYPE, 128>(job, parts, stream);
    else launch<DTYPE, 256>(job, parts, stream);
}

}  // namespace

void launch_quantize(const Call& call, int parts, View q, View k, View v, const Stats& stats, const QCodes& q_codes,
                     const KCodes& k_codes, const VCodes& v_codes, cudaStream_t stream) {
    CodesJob job{call, Input::of(call, q), Input::of(call, k), Input::of(call, v), stats, q_codes, k_codes, v_codes};
    if (call.dtype == DType::f16) launch<DType::f16>(job, parts, stream);
    else if (call.dtype == DType::bf16) launch<DType::bf16>(job, parts, stream);
    else launch<DType::f32>(job, parts, stream);
    check_launch("quantize_kernel", call);
}

}  // namespace sage
