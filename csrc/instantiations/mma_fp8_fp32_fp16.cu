#include "instantiate.cuh"

template sage::AttentionKernel sage::attention_kernel<sage::Mode::fp8_fp32_fp16>(int v_dim, bool masked);
