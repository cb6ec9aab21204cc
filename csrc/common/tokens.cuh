// The tokens of one sequence of one head, read from the caller's memory whatever its layout, 8 channels at a time.
#pragma once

#include "convert.cuh"

namespace sage {

// q, k or v as a kernel gets it.
struct Input {
    View view;
    int head_dim;
    bool wide;  // 8 channels of any token lie at a multiple of 16 bytes, so that whole words can be loaded

    static SAGE_HD Input of(const Call& call, View view) {
        const int64_t unit = call.dtype == DType::f32 ? 4 : 8;
        const bool wide = reinterpret_cast<uint64_t>(view.data) % 16 == 0 && call.head_dim % 8 == 0 &&
                          view.b % unit == 0 && view.h % unit == 0 && view.n % unit == 0;
        return {view, call.head_dim, wide};
    }
};

template <DType DTYPE> struct Tokens {
    using T = typename Raw<DTYPE>::type;
    const T* data;
    int64_t stride;  // elements from token to token
    int n;
    int head_dim;
    bool wide;

    // Row b, h; cu: of packed sequences, whose tokens all lie in batch entry 0.
    static __device__ __forceinline__ Tokens of(const Input& in, const int32_t* cu, int b, int h, int n) {
        const Span at = span(cu, b, n);
        const int64_t first = (cu ? 0 : b) * in.view.b + h * in.view.h + at.first * in.view.n;
        return {static_cast<const T*>(in.view.data) + first, in.view.n, at.n, in.head_dim, in.wide};
    }
};

// LAST: nothing reads these bytes again, so they need not stay in the L2 cache.
template <bool LAST> __device__ __forceinline__ uint4 load16(const uint4* at) { return LAST ? __ldcs(at) : __ldg(at); }

// 8 numbers as they lie in memory.
template <DType DTYPE> struct Chunk {
    using T = typename Raw<DTYPE>::type;
    static constexpr int WORDS = 2 * sizeof(T);
    uint32_t word[WORDS];

    // The first `left` of them (which may be below 0 or above 8), then zeros. WIDE: see Input.
    template <bool WIDE, bool LAST> __device__ __forceinline__ void load(const T* from, int left) {
        if constexpr (WIDE) {
#pragma unroll
            for (int i = 0; i < WORDS; i += 4) {
                const uint4 raw = left > 0 ? load16<LAST>(reinterpret_cast<const uint4*>(from) + i / 4) : uint4{0, 0, 0, 0};
                word[i] = raw.x, word[i + 1] = raw.y, word[i + 2] = raw.z, word[i + 3] = raw.w;
            }
        } else {
            constexpr int EACH = 8 / WORDS;
#pragma unroll
            for (int i = 0; i < WORDS; ++i) {
                word[i] = EACH * i < left ? __ldg(from + EACH * i) : 0;
                if (EACH == 2) word[i] |= (EACH * i + 1 < left ? uint32_t(__ldg(from + EACH * i + 1)) : 0) << 16;
            }
        }
    }
    __device__ __forceinline__ void unpack(float (&x)[8]) const {
#pragma unroll
        for (int i = 0; i < WORDS; ++i)
            if constexpr (DTYPE == DType::f32) x[i] = __uint_as_float(word[i]);
            else x[2 * i] = to_float<DTYPE>(uint16_t(word[i])), x[2 * i + 1] = to_float<DTYPE>(uint16_t(word[i] >> 16));
    }
};

// The chunks at from(i), of which left(i) channels exist. Nothing here waits for a load, so all are under way before the first
// is unpacked.
template <int N, DType DTYPE, class From, class Left>
__device__ __forceinline__ void load_last(Chunk<DTYPE> (&chunk)[N], bool wide, From from, Left left) {
    if (wide) {
#pragma unroll
        for (int i = 0; i < N; ++i) chunk[i].template load<true, true>(from(i), left(i));
    } else {
#pragma unroll
        for (int i = 0; i < N; ++i) chunk[i].template load<false, true>(from(i), left(i));
    }
}

}  // namespace sage
