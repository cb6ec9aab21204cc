#include "instantiate.cuh"

template sage::AttentionKernel sage::attention_kernel<sage::Mode::int8_int32>(int v_dim, bool masked);
