#include "instantiate_mma.cuh"

template const void* sage::mma_kernel<sage::Mode::int8_int32>(int v_dim, bool masked);
