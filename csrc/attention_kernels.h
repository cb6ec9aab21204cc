// The kernels by mode: each mode's are compiled in a file of their own (instantiations/), so that they build in parallel.
#pragma once

#include "params.h"

namespace sage {

struct AttentionKernel {
    const void* function;
    bool masked;
};

// v_dim 64, 96, 128 or 256 decides dim as well: 96 goes with 128, the others with themselves.
template <Mode MODE> AttentionKernel attention_kernel(int v_dim, bool masked);

}  // namespace sage
