#include "instantiate_wgmma.cuh"

template sage::Launch sage::wgmma_kernel<sage::Mode::fp8_fp32_fp16>(int v_dim, bool masked);
