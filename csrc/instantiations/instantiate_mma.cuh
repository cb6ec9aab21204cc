// One mode's kernels with mma.sync: four head_dims, with and without a mask.
#pragma once

#include "../attention_kernels.h"
#include "../attention_mma.cuh"

namespace sage {

template <Mode MODE, int DIM, int V_DIM> const void* pick(bool masked) {
    return masked ? reinterpret_cast<const void*>(&attention_mma<MODE, DIM, V_DIM, true>)
                  : reinterpret_cast<const void*>(&attention_mma<MODE, DIM, V_DIM, false>);
}

template <Mode MODE> const void* mma_kernel(int v_dim, bool masked) {
    switch (v_dim) {
        case 64: return pick<MODE, 64, 64>(masked);
        case 96: return pick<MODE, 128, 96>(masked);
        case 128: return pick<MODE, 128, 128>(masked);
        default: return pick<MODE, 256, 256>(masked);
    }
}

}  // namespace sage
