#include "instantiate.cuh"

template sage::AttentionKernel sage::attention_kernel<sage::Mode::fp16_fp16_fp32>(int v_dim, bool masked);
