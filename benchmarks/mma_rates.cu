// How fast mma.sync can be, and whether other instructions run beside it: the floor of every loop built on it.
#include "../csrc/common/ptx.cuh"

namespace ptx = sage::ptx;

// CHAINS independent sums a warp; after every matrix instruction FMAS multiply-adds.
template <int KIND, int CHAINS, int FMAS> __global__ void rate(long long* out, int turns) {
    const long long begin = clock64();
    const uint32_t a[4] = {threadIdx.x, 1, 2, 3};
    int32_t s[CHAINS][4] = {};
    float f[CHAINS][4] = {}, x[8] = {};
    uint32_t h[CHAINS][2] = {};
    for (int turn = 0; turn < turns; ++turn)
#pragma unroll
        for (int c = 0; c < CHAINS; ++c) {
            if (KIND == 0) ptx::mma_s8(s[c], a, c, 5, s[c]);
            if (KIND == 1) ptx::mma_f16(f[c], a, c, 5, f[c]);
            if (KIND == 2) ptx::mma_f16(h[c], a, c, 5, h[c]);
#pragma unroll
            for (int i = 0; i < FMAS; ++i) asm volatile("fma.rn.f32 %0, %0, %0, %0;" : "+f"(x[i]));
        }
    float sum = 0.0f;
    for (int c = 0; c < CHAINS; ++c)
        for (int i = 0; i < 4; ++i) sum += s[c][i] + f[c][i] + h[c][i % 2];
    for (float value : x) sum += value;
    if (sum == 12345.0f) out[1] = 1;  // never: so that nothing is left out
    if (blockIdx.x == 0 && threadIdx.x == 0) out[0] = clock64() - begin;
}

extern "C" int run(int kind, int fmas, int blocks, int threads, int turns, long long* out) {
    if (kind == 0 && fmas == 0) rate<0, 4, 0><<<blocks, threads>>>(out, turns);
    else if (kind == 0 && fmas == 4) rate<0, 4, 4><<<blocks, threads>>>(out, turns);
    else if (kind == 0 && fmas == 8) rate<0, 4, 8><<<blocks, threads>>>(out, turns);
    else if (kind == 1 && fmas == 0) rate<1, 4, 0><<<blocks, threads>>>(out, turns);
    else if (kind == 2 && fmas == 0) rate<2, 4, 0><<<blocks, threads>>>(out, turns);
    else if (kind == 2 && fmas == 4) rate<2, 4, 4><<<blocks, threads>>>(out, turns);
    else if (kind == 2 && fmas == 8) rate<2, 4, 8><<<blocks, threads>>>(out, turns);
    else return 1;
    return cudaGetLastError();
}
