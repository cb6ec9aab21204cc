// Tiles of K and V on their way from global to shared memory: two of K, two of V. One instruction of one thread moves a whole
// tile where the architecture has bulk copies (9.0 and newer); before that every thread moves 16 bytes at a time.
//
// start() asks for the next tile of K, of V or of both, K's to place `which` (0 and 1 by turns) and V's to the other; land() waits,
// for the calling thread, until what the oldest start(), that of `which`, asked for has arrived. At most two are under way.
#pragma once

#include "../tiles.h"
#include "ptx.cuh"

namespace sage {

template <int THREADS, int K_BYTES, int V_BYTES> struct Copies {
#ifdef __CUDA_ARCH__
    static constexpr int SHARED_BYTES = 2 * (K_BYTES + V_BYTES) + copy_barriers(__CUDA_ARCH__ / 10);
#endif
    static constexpr int V_OFFSET = 2 * K_BYTES;  // of the tiles of V in shared memory

    const char *k, *v;         // the next tiles in global memory
    uint32_t shared;
    int phase = 0;  // of the two barriers, by turns

#if __CUDA_ARCH__ >= 900
    __device__ Copies(void* to, const void* k_from, const void* v_from)
        : k(static_cast<const char*>(k_from)), v(static_cast<const char*>(v_from)), shared(ptx::shared_address(to)) {
        if (threadIdx.x == 0) {
            ptx::init_barrier(barrier(0), 1);
            ptx::init_barrier(barrier(1), 1);
        }
        __syncthreads();
    }
    __device__ uint32_t barrier(int turn) const { return shared + 2 * (K_BYTES + V_BYTES) + turn * 8; }

    __device__ void start(bool with_k, bool with_v, int which) {
        if (threadIdx.x == 0) {
            ptx::expect_bytes(barrier(which), (with_k ? K_BYTES : 0) + (with_v ? V_BYTES : 0));
            if (with_k) {
                ptx::copy_bulk(shared + which * K_BYTES, k, K_BYTES, barrier(which));
                k += K_BYTES;
            }
            if (with_v) {
                ptx::copy_bulk(shared + V_OFFSET + (which ^ 1) * V_BYTES, v, V_BYTES, barrier(which));
                v += V_BYTES;
            }
        }
    }
    __device__ void land(int which) {
        ptx::wait_barrier(barrier(which), phase);
        phase ^= which;
    }
#else
    __device__ Copies(void* to, const void* k_from, const void* v_from)
        : k(static_cast<const char*>(k_from) + threadIdx.x * 16), v(static_cast<const char*>(v_from) + threadIdx.x * 16),
          shared(ptx::shared_address(to) + threadIdx.x * 16) {}

    template <int BYTES> __device__ static void copy(uint32_t to, const char* from) {
#pragma unroll
        for (int at = 0; at < BYTES; at += THREADS * 16)
            if (at + THREADS * 16 <= BYTES || at + int(threadIdx.x) * 16 < BYTES) ptx::copy16(to + at, from + at);
    }
    __device__ void start(bool with_k, bool with_v, int which) {
        if (with_k) {
            copy<K_BYTES>(shared + which * K_BYTES, k);
            k += K_BYTES;
        }
        if (with_v) {
            copy<V_BYTES>(shared + V_OFFSET + (which ^ 1) * V_BYTES, v);
            v += V_BYTES;
        }
        ptx::commit_copies();
    }
    __device__ void land(int) { ptx::wait_copies<0>(); }
#endif
};

}  // namespace sage
