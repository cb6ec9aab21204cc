// The PV modes: how P is packed, which instruction multiplies it with V, and what its accumulator does.
//
// A mode has, for the 16 x 8 outputs of one warp and one tile of keys:
//   Acc         what a thread keeps over all tiles
//   Part        what the matrix instructions add to during one tile; begin() sets it up, flush() adds it to Acc
//   IN_PLACE    Part is Acc itself, which rescale() multiplies first where a maximum has moved
//   pack        neighbouring probabilities to one 32-bit word of an A operand
//   mma         Part += P V, one instruction
//   P_AT_TILE   P is scaled to the tile's own maximum instead of the running one
// docs/algorithm.md explains the arithmetic. shrink[r] is 2^(old maximum - new maximum) of row half r, grow[r] is
// 2^(P's base - new maximum), and moved says whether shrink differs from 1 in any row of the warp.
#pragma once

#include "ptx.cuh"

namespace sage {

// Added to an int32 this is the bit pattern of the float MAGIC + the int32, exact for magnitudes below 2^22. Accumulators start
// at it, so that an int32 result is a float without a conversion. 128 * 255 * 127 and 256 * 127 * 127 are below 2^22.
constexpr int32_t MAGIC_BITS = 0x4B400000;
constexpr float MAGIC = 12582912.0f;

// Of one tile and one warp: what the rows are multiplied with.
struct Turn {
    float shrink[2];
    float grow[2];
    bool moved;
};

// Sums kept in place by the matrix instruction itself.
struct InPlaceF32 {
    using Acc = float[4];
    using Part = float[4];
    static constexpr bool IN_PLACE = true, P_AT_TILE = false;
    __device__ static void rescale(Acc& acc, const Turn& turn) {
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[i] *= turn.shrink[i / 2];
    }
    __device__ static void begin(Part& part, const Acc& acc) {
#pragma unroll
        for (int i = 0; i < 4; ++i) part[i] = acc[i];
    }
    __device__ static void flush(Acc& acc, const Part& part, const Turn&) {
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[i] = part[i];
    }
    __device__ static float value(const Acc& acc, int i) { return acc[i]; }
};

// Sums of one tile, then added to float32.
struct FlushF32 {
    using Acc = float[4];
    using Part = float[4];
    static constexpr bool IN_PLACE = false, P_AT_TILE = false;
    __device__ static void begin(Part& part, const Acc&) {
#pragma unroll
        for (int i = 0; i < 4; ++i) part[i] = 0.0f;
    }
    __device__ static void flush(Acc& acc, const Part& part, const Turn& turn) {
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[i] = fmaf(acc[i], turn.shrink[i / 2], part[i]);
    }
    __device__ static float value(const Acc& acc, int i) { return acc[i]; }
};

struct FlushF16 {
    using Acc = float[4];
    using Part = uint32_t[2];
    static constexpr bool IN_PLACE = false, P_AT_TILE = false;
    __device__ static void begin(Part& part, const Acc&) { part[0] = part[1] = 0; }
    __device__ static void flush(Acc& acc, const Part& part, const Turn& turn) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            acc[i] = fmaf(acc[i], turn.shrink[i / 2], ptx::from_f16(uint16_t(part[i / 2] >> i % 2 * 16)));
    }
    __device__ static float value(const Acc& acc, int i) { return acc[i]; }
};

struct InPlaceF16 {
    using Acc = uint32_t[2];
    using Part = uint32_t[2];
    static constexpr bool IN_PLACE = true, P_AT_TILE = false;
    __device__ static void rescale(Acc& acc, const Turn& turn) {
#pragma unroll
        for (int r = 0; r < 2; ++r)
            acc[r] = ptx::to_f16x2(value(acc, 2 * r) * turn.shrink[r], value(acc, 2 * r + 1) * turn.shrink[r]);
    }
    __device__ static void begin(Part& part, const Acc& acc) {
        part[0] = acc[0];
        part[1] = acc[1];
    }
    __device__ static void flush(Acc& acc, const Part& part, const Turn&) {
        acc[0] = part[0];
        acc[1] = part[1];
    }
    __device__ static float value(const Acc& acc, int i) { return ptx::from_f16(uint16_t(acc[i / 2] >> i % 2 * 16)); }
};

struct FlushInt32 {
    using Acc = float[4];
    using Part = int32_t[4];
    static constexpr bool IN_PLACE = false, P_AT_TILE = true;
    __device__ static void begin(Part& part, const Acc&) {
#pragma unroll
        for (int i = 0; i < 4; ++i) part[i] = MAGIC_BITS;
    }
    // acc * shrink + sum * grow, where the part's bits are MAGIC + sum. The rounding is below one unit of the integer sum.
    __device__ static void flush(Acc& acc, const Part& part, const Turn& turn) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float rest = fmaf(acc[i], turn.shrink[i / 2], -MAGIC * turn.grow[i / 2]);
            acc[i] = fmaf(__int_as_float(part[i]), turn.grow[i / 2], rest);
        }
    }
    __device__ static float value(const Acc& acc, int i) { return acc[i]; }
};

// P and V in fp16: a word holds two probabilities.
template <class Base> struct F16 : Base {
    __device__ static uint32_t pack(const float* p) { return ptx::to_f16x2(p[0], p[1]); }
    __device__ static void mma(typename Base::Part& part, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
        ptx::mma_f16(part, a, b0, b1, part);
    }
};

// P and V in e4m3: a word holds four probabilities.
template <class Base> struct E4M3 : Base {
#if __CUDA_ARCH__ >= 890
    __device__ static uint32_t pack(const float* p) {
        return ptx::to_e4m3x2(p[0], p[1]) | uint32_t(ptx::to_e4m3x2(p[2], p[3])) << 16;
    }
    __device__ static void mma(typename Base::Part& part, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
        ptx::mma_e4m3(part, a, b0, b1, part);
    }
#endif
};

// P as uint8, V as int8: a word holds four probabilities.
struct U8 : FlushInt32 {
    // Adding 1024 in fp16 rounds to the nearest integer and leaves it in the low byte. (Rounding to fp16 first moves a p by at
    // most 1/16, so it may decide what is within that of a half.)
    __device__ static uint32_t pack(const float* p) {
        return ptx::permute(ptx::add_f16x2(ptx::to_f16x2(p[0], p[1]), 0x64006400u), ptx::add_f16x2(ptx::to_f16x2(p[2], p[3]), 0x64006400u), 0x6420);
    }
    __device__ static void mma(Part& part, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
        ptx::mma_u8s8(part, a, b0, b1, part);
    }
};

template <Mode> struct PV;
template <> struct PV<Mode::fp16_fp32> : F16<InPlaceF32> {};
template <> struct PV<Mode::fp16_fp16_fp32> : F16<FlushF16> {};
template <> struct PV<Mode::fp16_fp16> : F16<InPlaceF16> {};
template <> struct PV<Mode::int8_int32> : U8 {};
template <> struct PV<Mode::fp8_fp32_fp32> : E4M3<FlushF32> {};
template <> struct PV<Mode::fp8_fp32_fp16> : E4M3<FlushF16> {};
template <> struct PV<Mode::fp8_fp32> : E4M3<InPlaceF32> {};

}  // namespace sage
