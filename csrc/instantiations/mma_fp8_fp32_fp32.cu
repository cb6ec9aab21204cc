#include "instantiate_mma.cuh"

template const void* sage::mma_kernel<sage::Mode::fp8_fp32_fp32>(int v_dim, bool masked);
