// Warpgroup matrix instructions (9.0a): d += a b for 64 rows, the work of 128 threads at once and in the background.
//
// An operand in shared memory is named by a descriptor: rows of 64 or 128 bytes, swizzled (params.h, swizzled). Adding STEP to
// a descriptor goes 32 bytes along the rows. The accumulators of a warp's thread are those of mma.sync, 8 columns after another.
#pragma once

#include "ptx.cuh"

namespace sage::wgmma {

constexpr int STEP = 32 / 16;

// Registers that the compiler has written are ready for the instructions that follow.
__device__ __forceinline__ void fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most `pending` of the committed groups are under way.
template <int pending> __device__ __forceinline__ void wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory"); }
// Tells the compiler that the registers have changed, which it cannot know: the instructions ran in the background.
__device__ __forceinline__ void changed(float& x) { asm volatile("" : "+f"(x)::"memory"); }
__device__ __forceinline__ void changed(int32_t& x) { asm volatile("" : "+r"(x)::"memory"); }
__device__ __forceinline__ void changed(uint32_t& x) { asm volatile("" : "+r"(x)::"memory"); }
template <class T, int N> __device__ __forceinline__ void changed(T (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) changed(x[i]);
}

// The half of a descriptor that differs from one operand to another; the address is a multiple of 1024.
__device__ __forceinline__ uint32_t descriptor(uint32_t shared) { return shared >> 4 | 1 << 16; }
// All of it. ROW_BYTES: of a row of the operand, 64 or 128, which is its swizzle as well.
template <int ROW_BYTES> __device__ __forceinline__ uint64_t whole(uint32_t descriptor) {
    constexpr uint64_t SWIZZLE = ROW_BYTES == 128 ? 1 : 2, NEXT_8_ROWS = 8 * ROW_BYTES / 16;
    return descriptor | (NEXT_8_ROWS | SWIZZLE << 30) << 32;
}

// The text of an instruction names its registers by number: COUNT accumulators first, the other operands from COUNT on.
#define SAGE_NAMES_8(a, b, c, d, e, f, g, h) "%" #a ", %" #b ", %" #c ", %" #d ", %" #e ", %" #f ", %" #g ", %" #h
#define SAGE_NAMES_16 SAGE_NAMES_8(0, 1, 2, 3, 4, 5, 6, 7) ", " SAGE_NAMES_8(8, 9, 10, 11, 12, 13, 14, 15)
#define SAGE_NAMES_24 SAGE_NAMES_16 ", " SAGE_NAMES_8(16, 17, 18, 19, 20, 21, 22, 23)
#define SAGE_NAMES_32 SAGE_NAMES_24 ", " SAGE_NAMES_8(24, 25, 26, 27, 28, 29, 30, 31)
#define SAGE_NAMES_48 SAGE_NAMES_32 ", " SAGE_NAMES_8(32, 33, 34, 35, 36, 37, 38, 39) ", " SAGE_NAMES_8(40, 41, 42, 43, 44, 45, 46, 47)
#define SAGE_NAMES_64 SAGE_NAMES_48 ", " SAGE_NAMES_8(48, 49, 50, 51, 52, 53, 54, 55) ", " SAGE_NAMES_8(56, 57, 58, 59, 60, 61, 62, 63)
#define SAGE_REGISTERS_8(as, i) \
    as(d[i]), as(d[i + 1]), as(d[i + 2]), as(d[i + 3]), as(d[i + 4]), as(d[i + 5]), as(d[i + 6]), as(d[i + 7])
#define SAGE_REGISTERS_16(as) SAGE_REGISTERS_8(as, 0), SAGE_REGISTERS_8(as, 8)
#define SAGE_REGISTERS_24(as) SAGE_REGISTERS_16(as), SAGE_REGISTERS_8(as, 16)
#define SAGE_REGISTERS_32(as) SAGE_REGISTERS_24(as), SAGE_REGISTERS_8(as, 24)
#define SAGE_REGISTERS_48(as) SAGE_REGISTERS_32(as), SAGE_REGISTERS_8(as, 32), SAGE_REGISTERS_8(as, 40)
#define SAGE_REGISTERS_64(as) SAGE_REGISTERS_48(as), SAGE_REGISTERS_8(as, 48), SAGE_REGISTERS_8(as, 56)

// a in registers; `add` false: d = a b.
#define SAGE_WGMMA(COUNT, as, instruction, scales, a0, a1, a2, a3, b0, p)                                                       \
    asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, %" #p ", 0;\nwgmma.mma_async.sync.aligned." instruction               \
                 " {" SAGE_NAMES_##COUNT "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b0 ", adds" scales ";\n}"              \
                 : SAGE_REGISTERS_##COUNT(as) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)))
#define SAGE_WGMMA_16(as, instruction, scales) SAGE_WGMMA(16, as, instruction, scales, 16, 17, 18, 19, 20, 21)
#define SAGE_WGMMA_24(as, instruction, scales) SAGE_WGMMA(24, as, instruction, scales, 24, 25, 26, 27, 28, 29)
#define SAGE_WGMMA_32(as, instruction, scales) SAGE_WGMMA(32, as, instruction, scales, 32, 33, 34, 35, 36, 37)
#define SAGE_WGMMA_48(as, instruction, scales) SAGE_WGMMA(48, as, instruction, scales, 48, 49, 50, 51, 52, 53)
#define SAGE_WGMMA_64(as, instruction, scales) SAGE_WGMMA(64, as, instruction, scales, 64, 65, 66, 67, 68, 69)

// int8 x int8, 32 deep, 128 columns; both in shared memory.
__device__ __forceinline__ void mma_s8(int32_t (&d)[64], uint64_t a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {" SAGE_NAMES_64 "}, %64, %65, 1;"
                 : SAGE_REGISTERS_64("+r") : "l"(a), "l"(b));
}

// uint8 x int8, 32 deep.
__device__ __forceinline__ void mma_u8s8(int32_t (&d)[32], const uint32_t (&a)[4], uint64_t b, bool add) {
    SAGE_WGMMA_32("+r", "m64n64k32.s32.u8.s8", "");
}
__device__ __forceinline__ void mma_u8s8(int32_t (&d)[48], const uint32_t (&a)[4], uint64_t b, bool add) {
    SAGE_WGMMA_48("+r", "m64n96k32.s32.u8.s8", "");
}
__device__ __forceinline__ void mma_u8s8(int32_t (&d)[64], const uint32_t (&a)[4], uint64_t b, bool add) {
    SAGE_WGMMA_64("+r", "m64n128k32.s32.u8.s8", "");
}

// fp16 x fp16 into f32, 16 deep.
__device__ __forceinline__ void mma_f16(float (&d)[32], const uint32_t (&a)[4], uint64_t b, bool add) {
    SAGE_WGMMA_32("+f", "m64n64k16.f32.f16.f16", ", 1, 1, 0");
}
__device__ __forceinline__ void mma_f16(float (&d)[48], const uint32_t (&a)[4], uint64_t b, bool add) {
    SAGE_WGMMA_48("+f", "m64n96k16.f32.f16.f16", ", 1, 1, 0");
}
__device__ __forceinline__ void mma_f16(float (&d)[64], const uint32_t (&a)[4], uint64_t b, bool add) {
    SAGE_WGMMA_64("+f", "m64n128k16.f32.f16.f16", ", 1, 1, 0");
}

// e4m3 x e4m3, 32 deep, into f32, or into f16x2.
__device__ __forceinline__ void mma_e4m3(float (&d)[32], const uint32_t (&a)[4], uint64_t b, bool add) {
    SAGE_WGMMA_32("+f", "m64n64k32.f32.e4m3.e4m3", ", 1, 1");
}
__device__ __forceinline__ void mma_e4m3(float (&d)[48], const uint32_t (&a)[4], uint64_t b, bool add) {
    SAGE_WGMMA_48("+f", "m64n96k32.f32.e4m3.e4m3", ", 1, 1");
}
__device__ __forceinline__ void mma_e4m3(float (&d)[64], const uint32_t (&a)[4], uint64_t b, bool add) {
    SAGE_WGMMA_64("+f", "m64n128k32.f32.e4m3.e4m3", ", 1, 1");
}
__device__ __forceinline__ void mma_e4m3(uint32_t (&d)[16], const uint32_t (&a)[4], uint64_t b, bool add) {
    SAGE_WGMMA_16("+r", "m64n64k32.f16.e4m3.e4m3", ", 1, 1");
}
__device__ __forceinline__ void mma_e4m3(uint32_t (&d)[24], const uint32_t (&a)[4], uint64_t b, bool add) {
    SAGE_WGMMA_24("+r", "m64n96k32.f16.e4m3.e4m3", ", 1, 1");
}
__device__ __forceinline__ void mma_e4m3(uint32_t (&d)[32], const uint32_t (&a)[4], uint64_t b, bool add) {
    SAGE_WGMMA_32("+r", "m64n128k32.f16.e4m3.e4m3", ", 1, 1");
}

}  // namespace sage::wgmma
