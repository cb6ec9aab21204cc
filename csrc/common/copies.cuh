// Tiles of K and V on their way from global to shared memory: two of K, two of V. One instruction of one thread moves a whole
// tile where the architecture has bulk copies (9.0 and newer); before that every thread moves 16 bytes at a time.
//
// start() asks for the next tile of K, of V or of both; land() waits, for the calling thread, until what the oldest start() asked
// for has arrived. At most two are under way.
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
    uint32_t k_to, v_to;       // where they go: offsets within the two tiles, 0 or one tile
    uint32_t shared;
    int asked = 0, landed = 0, phase = 0;  // two barriers by turns, and the phase of their turn

#if __CUDA_ARCH__ >= 900
    __device__ Copies(void* to, const void* k_from, const void* v_from)
        : k(static_cast<const char*>(k_from)), v(static_cast<const char*>(v_from)), k_to(0), v_to(0), shared(ptx::shared_address(to)) {
        if (threadIdx.x == 0) {
            ptx::init_barrier(barrier(0), 1);
            ptx::init_barrier(barrier(1), 1);
        }
        __syncthreads();
    }
    __device__ uint32_t barrier(int turn) const { return shared + 2 * (K_BYTES + V_BYTES) + turn * 8; }

    __device__ void start(bool with_k, bool with_v) {
        if (threadIdx.x == 0) {
            ptx::expect_bytes(barrier(asked), (with_k ? K_BYTES : 0) + (with_v ? V_BYTES : 0));
            if (with_k) {
                ptx::copy_bulk(shared + k_to, k, K_BYTES, barrier(asked));
                k += K_BYTES;
                k_to ^= K_BYTES;
            }
            if (with_v) {
                ptx::copy_bulk(shared + V_OFFSET + v_to, v, V_BYTES, barrier(asked));
                v += V_BYTES;
                v_to ^= V_BYTES;
            }
        }
        asked ^= 1;
    }
    __device__ void land() {
        ptx::wait_barrier(barrier(landed), phase);
        phase ^= landed;
        landed ^= 1;
    }
#else
    __device__ Copies(void* to, const void* k_from, const void* v_from)
        : k(static_cast<const char*>(k_from) + threadIdx.x * 16), v(static_cast<const char*>(v_from) + threadIdx.x * 16), k_to(0),
          v_to(0), shared(ptx::shared_address(to) + threadIdx.x * 16) {}

    template <int BYTES> __device__ static void copy(uint32_t to, const char* from) {
#pragma unroll
        for (int at = 0; at < BYTES; at += THREADS * 16)
            if (at + THREADS * 16 <= BYTES || at + int(threadIdx.x) * 16 < BYTES) ptx::copy16(to + at, from + at);
    }
    __device__ void start(bool with_k, bool with_v) {
        if (with_k) {
            copy<K_BYTES>(shared + k_to, k);
            k += K_BYTES;
            k_to ^= K_BYTES;
        }
        if (with_v) {
            copy<V_BYTES>(shared + V_OFFSET + v_to, v);
            v += V_BYTES;
            v_to ^= V_BYTES;
        }
        ptx::commit_copies();
    }
    __device__ void land() { ptx::wait_copies<0>(); }
#endif
};

}  // namespace sage
