// The kernels by mode: each mode's are compiled in files of their own (instantiations/), so that they build in parallel.
#pragma once

#include "params.h"

namespace sage {

// v_dim 64, 96, 128 or 256 decides dim as well: 96 goes with 128, the others with themselves.
template <Mode MODE> const void* mma_kernel(int v_dim, bool masked);

// How a kernel is launched.
struct Launch {
    const void* function;
    int rows;  // queries of a block
    int threads;
    int shared_bytes;
};

// For the modes of has_wgmma, v_dim up to 128.
template <Mode MODE> Launch wgmma_kernel(int v_dim, bool masked);

}  // namespace sage
