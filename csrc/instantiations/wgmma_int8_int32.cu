#include "instantiate_wgmma.cuh"

template sage::Launch sage::wgmma_kernel<sage::Mode::int8_int32>(int v_dim, bool masked);
