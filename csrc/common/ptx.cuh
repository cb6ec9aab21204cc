// One instruction each. Where an older architecture lacks it, the same result from what it has.
#pragma once

#include "../params.h"

namespace sage::ptx {

// Read anew at every call, so that what is computed from it need not be kept in registers in between.
__device__ __forceinline__ uint32_t block_index() {
    uint32_t x;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(x));
    return x;
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 16 bytes from global to shared memory, past the registers where the architecture can.
__device__ __forceinline__ void copy16(uint32_t shared, const void* global) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
#else
    uint4 x = *static_cast<const uint4*>(global);
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
#endif
}

__device__ __forceinline__ void commit_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `pending` of the committed groups are under way.
template <int pending> __device__ __forceinline__ void wait_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#endif
}

// Plain C++ for the compiler, which may then move it between instructions that do not store.
__device__ __forceinline__ uint4 load_shared16(uint32_t shared) {
    return *static_cast<const uint4*>(__cvta_shared_to_generic(shared));
}

__device__ __forceinline__ void store_shared16(uint32_t shared, uint4 x) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}

__device__ __forceinline__ void store_shared4(uint32_t shared, int32_t x) {
    asm volatile("st.shared.s32 [%0], %1;" ::"r"(shared), "r"(x) : "memory");
}
__device__ __forceinline__ int32_t load_shared4(uint32_t shared) {
    int32_t x;
    asm volatile("ld.shared.s32 %0, [%1];" : "=r"(x) : "r"(shared) : "memory");
    return x;
}
__device__ __forceinline__ void load_shared32(float (&x)[8], uint32_t shared) {
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
        const uint4 four = load_shared16(shared + i * 4);
        x[i] = __uint_as_float(four.x), x[i + 1] = __uint_as_float(four.y);
        x[i + 2] = __uint_as_float(four.z), x[i + 3] = __uint_as_float(four.w);
    }
}

// For 9.0 and newer, down to sleep_on_barrier.
//
// A barrier in shared memory that completes a phase when `arrivals` threads and all expected bytes have come.
__device__ __forceinline__ void init_barrier(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");  // the copy engine sees it, too
}

__device__ __forceinline__ void expect_bytes(uint32_t barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void copy_bulk(uint32_t shared, const void* global, int bytes, uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared),
                 "l"(global), "r"(bytes), "r"(barrier) : "memory");
}

__device__ __forceinline__ void arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void wait_barrier(uint32_t barrier, int phase) {
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again;\n"
                 "}" ::"r"(barrier), "r"(phase) : "memory");
}

// Asks early whether the wait below would end at once...
__device__ __forceinline__ uint32_t barrier_passed(uint32_t barrier, int phase) {
    uint32_t passed;
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, done;\n"
                 "}" : "=r"(passed) : "r"(barrier), "r"(phase) : "memory");
    return passed;
}
// ... and here does nothing if so.
__device__ __forceinline__ void wait_barrier(uint32_t barrier, int phase, uint32_t passed) {
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "setp.ne.u32 done, %2, 0;\n"
                 "@done bra passed;\n"
                 "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again;\n"
                 "passed:\n"
                 "}" ::"r"(barrier), "r"(phase), "r"(passed) : "memory");
}

// The same where the wait is long: the thread sleeps for up to 10 ms at a time instead of taking issue slots.
__device__ __forceinline__ void sleep_on_barrier(uint32_t barrier, int phase) {
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1, 10000000;\n"
                 "@!done bra again;\n"
                 "}" ::"r"(barrier), "r"(phase) : "memory");
}

__device__ __forceinline__ float exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float log2(float x) {
    float y;
    asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// threadIdx.x, read anew: what is computed from it is then computed anew as well, and takes no registers until then.
__device__ __forceinline__ int thread_again() {
    int x;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
    return x;
}

// The larger of two numbers that are not negative; a NaN if either is one.
__device__ __forceinline__ float max_nan(float a, float b) {
    float y;
#if __CUDA_ARCH__ >= 800
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
#else
    y = __int_as_float(max(__float_as_int(a), __float_as_int(b)));
#endif
    return y;
}

// Byte i of the result is the byte that digit i of `select` names: 0-3 of a, 4-7 of b.
__device__ __forceinline__ uint32_t permute(uint32_t a, uint32_t b, uint32_t select) {
    return __byte_perm(a, b, select);
}

__device__ __forceinline__ float from_f16(uint16_t x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}

__device__ __forceinline__ uint16_t to_f16(float x) {
    uint16_t y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float from_bf16(uint16_t x) { return __uint_as_float(uint32_t(x) << 16); }

__device__ __forceinline__ uint32_t to_f16x2(float low, float high) {
    uint32_t y;
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
#else
    y = to_f16(low) | uint32_t(to_f16(high)) << 16;
#endif
    return y;
}

__device__ __forceinline__ uint32_t add_f16x2(uint32_t a, uint32_t b) {
    uint32_t y;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
    return y;
}

// The sum of a word's four bytes, which are signed, and of c.
__device__ __forceinline__ int32_t add_s8x4(uint32_t a, int32_t c) {
    int32_t y;
    asm("dp4a.s32.s32 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(0x01010101), "r"(c));
    return y;
}

// Four numbers as the bytes of a word, the first in the low one, rounded to the nearest integers from 0 to 255. Two instructions.
__device__ __forceinline__ uint32_t to_u8x4(const float* x) {
    uint32_t y;
    asm("{\n"
        ".reg .s32 a, b, c, d;\n"
        ".reg .b32 high;\n"
        "cvt.rni.s32.f32 a, %1;\n"
        "cvt.rni.s32.f32 b, %2;\n"
        "cvt.rni.s32.f32 c, %3;\n"
        "cvt.rni.s32.f32 d, %4;\n"
        "cvt.pack.sat.u8.s32.b32 high, d, c, 0;\n"
        "cvt.pack.sat.u8.s32.b32 %0, b, a, high;\n"
        "}" : "=r"(y) : "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]));
    return y;
}

__device__ __forceinline__ uint16_t to_bf16(float x) {
    uint32_t y;
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16x2.f32 %0, %1, %1;" : "=r"(y) : "f"(x));
#else
    const uint32_t bits = __float_as_uint(x);
    y = x != x ? 0x7FFFu : (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;  // to the nearest, ties to even
#endif
    return uint16_t(y);
}

__device__ __forceinline__ uint32_t to_bf16x2(float low, float high) {
    uint32_t y;
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
#else
    y = to_bf16(low) | uint32_t(to_bf16(high)) << 16;
#endif
    return y;
}

#if __CUDA_ARCH__ >= 890
// Two e4m3 numbers, saturated at 448.
__device__ __forceinline__ uint16_t to_e4m3x2(float low, float high) {
    uint16_t y;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(y) : "f"(high), "f"(low));
    return y;
}

// The two numbers as f16x2 (every e4m3 number is one).
__device__ __forceinline__ uint32_t from_e4m3x2(uint16_t x) {
    uint32_t y;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(y) : "h"(x));
    return y;
}
#endif

// --- matrix instructions: d = a b + c, a 16 rows, b 8 columns ------------------------------------------------------------------

// int8 x int8, 32 deep.
__device__ __forceinline__ void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const int32_t (&c)[4]) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
#else
#define SAGE_MMA_8816(half, a_reg, b_reg, from)                                                                            \
    asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0,%1}, {%2}, {%3}, {%4,%5};"                            \
                 : "=r"(d[half]), "=r"(d[half + 1]) : "r"(a_reg), "r"(b_reg), "r"(from[half]), "r"(from[half + 1]))
    SAGE_MMA_8816(0, a[0], b0, c);
    SAGE_MMA_8816(0, a[2], b1, d);
    SAGE_MMA_8816(2, a[1], b0, c);
    SAGE_MMA_8816(2, a[3], b1, d);
#undef SAGE_MMA_8816
#endif
}

// uint8 x int8, 32 deep.
__device__ __forceinline__ void mma_u8s8(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const int32_t (&c)[4]) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
#else
#define SAGE_MMA_8816(half, a_reg, b_reg, from)                                                                            \
    asm("mma.sync.aligned.m8n8k16.row.col.s32.u8.s8.s32 {%0,%1}, {%2}, {%3}, {%4,%5};"                            \
                 : "=r"(d[half]), "=r"(d[half + 1]) : "r"(a_reg), "r"(b_reg), "r"(from[half]), "r"(from[half + 1]))
    SAGE_MMA_8816(0, a[0], b0, c);
    SAGE_MMA_8816(0, a[2], b1, d);
    SAGE_MMA_8816(2, a[1], b0, c);
    SAGE_MMA_8816(2, a[3], b1, d);
#undef SAGE_MMA_8816
#endif
}

// f16 x f16 into f32, 16 deep.
__device__ __forceinline__ void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&c)[4]) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
#else
#define SAGE_MMA_1688(a_low, a_high, b_reg, from)                                                                          \
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%8,%9,%10};"          \
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                                          \
                 : "r"(a_low), "r"(a_high), "r"(b_reg), "f"(from[0]), "f"(from[1]), "f"(from[2]), "f"(from[3]))
    SAGE_MMA_1688(a[0], a[1], b0, c);
    SAGE_MMA_1688(a[2], a[3], b1, d);
#undef SAGE_MMA_1688
#endif
}

// bf16 x bf16 into f32, 16 deep.
__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&c)[4]) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
#else
    const int lane = threadIdx.x % 32, row = lane / 4 * 4, column = lane % 4 * 8;  // the first lane that has them
    for (int i = 0; i < 4; ++i) d[i] = c[i];
#pragma unroll 1
    for (int k = 0; k < 8; ++k) {  // two deep each
        uint32_t of_a[2], of_b[2];
        for (int i = 0; i < 2; ++i) {
            of_a[i] = __shfl_sync(~0u, k < 4 ? a[i] : a[2 + i], row + k % 4);
            of_b[i] = __shfl_sync(~0u, k < 4 ? b0 : b1, column + i * 4 + k % 4);
        }
        for (int i = 0; i < 4; ++i) {
            d[i] = fmaf(__uint_as_float(of_a[i / 2] << 16), __uint_as_float(of_b[i % 2] << 16), d[i]);
            d[i] = fmaf(__uint_as_float(of_a[i / 2] & 0xFFFF0000u), __uint_as_float(of_b[i % 2] & 0xFFFF0000u), d[i]);
        }
    }
#endif
}

// f16 x f16 into f16x2, 16 deep.
__device__ __forceinline__ void mma_f16(uint32_t (&d)[2], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const uint32_t (&c)[2]) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%0,%1}, {%2,%3,%4,%5}, {%6,%7}, {%8,%9};"
                 : "=r"(d[0]), "=r"(d[1])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]));
#else
#define SAGE_MMA_1688(a_low, a_high, b_reg, from)                                                                          \
    asm("mma.sync.aligned.m16n8k8.row.col.f16.f16.f16.f16 {%0,%1}, {%2,%3}, {%4}, {%5,%6};"                       \
                 : "=r"(d[0]), "=r"(d[1]) : "r"(a_low), "r"(a_high), "r"(b_reg), "r"(from[0]), "r"(from[1]))
    SAGE_MMA_1688(a[0], a[1], b0, c);
    SAGE_MMA_1688(a[2], a[3], b1, d);
#undef SAGE_MMA_1688
#endif
}

#if __CUDA_ARCH__ >= 890
// e4m3 x e4m3 into what these instructions call f32, 32 deep.
__device__ __forceinline__ void mma_e4m3(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&c)[4]) {
    asm("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

// e4m3 x e4m3 into f16x2, 32 deep (SageAttention2++).
__device__ __forceinline__ void mma_e4m3(uint32_t (&d)[2], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const uint32_t (&c)[2]) {
    asm("mma.sync.aligned.m16n8k32.row.col.f16.e4m3.e4m3.f16 {%0,%1}, {%2,%3,%4,%5}, {%6,%7}, {%8,%9};"
                 : "=r"(d[0]), "=r"(d[1])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]));
}
#endif

}  // namespace sage::ptx
