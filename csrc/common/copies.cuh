// Tiles of K and V on their way from global to shared memory, two buffers of them. One instruction of one thread moves a whole
// stretch where the architecture has bulk copies (9.0 and newer); before that every thread moves 16 bytes at a time.
#pragma once

#include "../tiles.h"
#include "ptx.cuh"

namespace sage {

template <int THREADS, int K_BYTES, int V_BYTES> struct Copies {
    static constexpr int TILE_BYTES = K_BYTES + V_BYTES;
#ifdef __CUDA_ARCH__
    static constexpr int SHARED_BYTES = 2 * TILE_BYTES + copy_barriers(__CUDA_ARCH__ / 10);
#endif

    uint32_t shared;
    const char *k, *v;  // of the next tile
    int stage = 0, phase = 0;  // of the tile that is waited for next

#if __CUDA_ARCH__ >= 900
    __device__ Copies(void* to, const void* k_from, const void* v_from)
        : shared(ptx::shared_address(to)), k(static_cast<const char*>(k_from)), v(static_cast<const char*>(v_from)) {
        if (threadIdx.x == 0) {
            ptx::init_barrier(barrier(0), 1);
            ptx::init_barrier(barrier(1), 1);
        }
        __syncthreads();
    }
    __device__ uint32_t barrier(int stage) const { return shared + 2 * TILE_BYTES + stage * 8; }

    __device__ void start(int to_stage) {
        if (threadIdx.x != 0) return;
        const uint32_t to = shared + to_stage * TILE_BYTES;
        ptx::expect_bytes(barrier(to_stage), TILE_BYTES);
        ptx::copy_bulk(to, k, K_BYTES, barrier(to_stage));
        ptx::copy_bulk(to + K_BYTES, v, V_BYTES, barrier(to_stage));
        k += K_BYTES;
        v += V_BYTES;
    }
    __device__ void land() { ptx::wait_barrier(barrier(stage), phase); }
#else
    __device__ Copies(void* to, const void* k_from, const void* v_from)
        : shared(ptx::shared_address(to) + threadIdx.x * 16), k(static_cast<const char*>(k_from) + threadIdx.x * 16),
          v(static_cast<const char*>(v_from) + threadIdx.x * 16) {}

    template <int BYTES> __device__ static void copy(uint32_t to, const char* from) {
#pragma unroll
        for (int at = 0; at < BYTES; at += THREADS * 16)
            if (at + THREADS * 16 <= BYTES || at + int(threadIdx.x) * 16 < BYTES) ptx::copy16(to + at, from + at);
    }
    __device__ void start(int to_stage) {
        const uint32_t to = shared + to_stage * TILE_BYTES;
        copy<K_BYTES>(to, k);
        copy<V_BYTES>(to + K_BYTES, v);
        k += K_BYTES;
        v += V_BYTES;
        ptx::commit_copies();
    }
    __device__ void land() { ptx::wait_copies<0>(); }
#endif

    __device__ void start_first() { start(0); }
    // The next tile is there for all threads, and they are done with the one before, into whose place the one after may come.
    __device__ void next(bool more) {
        land();
        __syncthreads();
        if (more) start(stage ^ 1);
        phase ^= stage;
        stage ^= 1;
    }
};

}  // namespace sage
