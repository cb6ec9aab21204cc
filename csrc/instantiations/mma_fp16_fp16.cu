#include "instantiate_mma.cuh"

template const void* sage::mma_kernel<sage::Mode::fp16_fp16>(int v_dim, bool masked);
