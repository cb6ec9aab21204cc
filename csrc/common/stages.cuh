// Where in shared memory attention_wgmma's copies go, and the barriers by which its warps wait for each other.
#pragma once

#include "ptx.cuh"

namespace sage {

// What the copies bring, block after block without a pause: at each turn K of the next tile and V of the one before it, and with
// the first tile of a block its Q. Stages go round, and so do Q's places, of which as many may be in use.
template <int Q_BYTES, int K_BYTES, int V_BYTES> struct Stages {
    static constexpr int COUNT = 3;
    static constexpr int BRIEFS = 2;  // what the helpers have ready (WgmmaAttention::help): of this block and the next
    static constexpr int BYTES = COUNT * (Q_BYTES + K_BYTES + V_BYTES);
    static constexpr int BARRIERS = 3 * COUNT + 2 * BRIEFS, BARRIER_BYTES = (BARRIERS * 8 + 15) / 16 * 16;
    uint32_t shared;  // Q's places, K's and V's stages, then the barriers

    __device__ uint32_t q(int place) const { return shared + place * Q_BYTES; }
    __device__ uint32_t k(int stage) const { return shared + COUNT * Q_BYTES + stage * K_BYTES; }
    __device__ uint32_t v(int stage) const { return shared + COUNT * (Q_BYTES + K_BYTES) + stage * V_BYTES; }
    __device__ uint32_t full(int stage) const { return shared + BYTES + stage * 8; }
    __device__ uint32_t k_free(int stage) const { return full(COUNT + stage); }
    __device__ uint32_t v_free(int stage) const { return full(2 * COUNT + stage); }
    __device__ uint32_t brief_ready(int which) const { return full(3 * COUNT + which); }
    __device__ uint32_t brief_free(int which) const { return full(3 * COUNT + BRIEFS + which); }

    __device__ void init(int warpgroups, int helpers) const {
        for (int stage = 0; stage < COUNT; ++stage) {
            ptx::init_barrier(full(stage), 1);
            ptx::init_barrier(k_free(stage), warpgroups);
            ptx::init_barrier(v_free(stage), warpgroups);
        }
        for (int which = 0; which < BRIEFS; ++which) {
            ptx::init_barrier(brief_ready(which), helpers);
            ptx::init_barrier(brief_free(which), warpgroups * 128);
        }
    }
};

}  // namespace sage
