#include "instantiate_wgmma.cuh"

template sage::Launch sage::wgmma_kernel<sage::Mode::fp16_fp32>(int v_dim, bool masked);
