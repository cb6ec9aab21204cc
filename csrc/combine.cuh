// The kernel that brings the parts of a split query block together.
#pragma once

#include "common/epilogue.cuh"

namespace sage {
namespace {  // one file includes this, and its names are that file's own

constexpr int COMBINE_THREADS = 256;
constexpr int COMBINE_CHANNELS = 8;  // of a thread

// One thread takes 8 channels of one query: the parts' sums, each brought to the largest maximum.
__global__ void combine(const Call c, const QCodes q, const Stats stats, const Partials parts, const View out, float* lse) {
    const int lanes = c.v_dim / COMBINE_CHANNELS;
    const int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    const int channel = int(index % lanes) * COMBINE_CHANNELS;
    const int query = int(index / lanes % c.nq);
    const int64_t q_row = index / lanes / c.nq;
    if (q_row >= c.q_rows()) return;
    const int b = int(q_row / c.heads), head = int(q_row % c.heads);
    const int64_t kv_row = int64_t(b) * c.kv_heads + head / c.group();
    const Span tokens = span(c.cu_q, b, c.nq);
    if (query >= tokens.n || stats.bad[kv_row]) return;

    const int64_t first = q_row * c.q_padded() + query, step = c.q_rows() * c.q_padded();
    float top = parts.top[first];
    for (int s = 0; s < c.splits; ++s) top = fmaxf(top, parts.top[first + s * step]);
    float total = 0.0f, x[8] = {};
    for (int s = 0; s < c.splits; ++s) {
        const int64_t row = first + s * step;
        const float weight = ptx::exp2(parts.top[row] - top);
        total = fmaf(parts.total[row], weight, total);
        for (int i = 0; i < 8; ++i) x[i] = fmaf(parts.out[row * c.v_dim + channel + i], weight, x[i]);
    }
    const Finish finish = Finish::of(c, stats, kv_row, channel, span(c.cu_k, b, c.nk).n);
    const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
    for (int i = 0; i < 8; ++i) x[i] = finish.apply(x[i], inverse, i);
    store_up_to_8(c, out.data, (c.cu_q ? 0 : b) * out.b + head * out.h + (tokens.first + query) * out.n + channel, channel, x);
    if (c.return_lse && channel == 0)
        lse[q_row * c.nq + query] = log_sum_exp(c, top, total, q.lse_shift ? q.lse_shift[first] : 0.0f);
}

}  // namespace
}  // namespace sage
