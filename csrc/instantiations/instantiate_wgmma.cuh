// One mode's kernels with wgmma: three head_dims, with and without a mask.
#pragma once

#include "../attention_kernels.h"
#include "../attention_wgmma.cuh"

namespace sage {

template <Mode MODE, int DIM, int V_DIM, bool MASKED> Launch launch_of() {
    using Kernel = WgmmaAttention<MODE, DIM, V_DIM, MASKED>;
    return {reinterpret_cast<const void*>(&attention_wgmma<MODE, DIM, V_DIM, MASKED>), Kernel::ROWS, Kernel::THREADS,
            Kernel::SHARED_BYTES};
}

template <Mode MODE, int DIM, int V_DIM> Launch launch_of(bool masked) {
    return masked ? launch_of<MODE, DIM, V_DIM, true>() : launch_of<MODE, DIM, V_DIM, false>();
}

template <Mode MODE> Launch wgmma_kernel(int v_dim, bool masked) {
    return v_dim == 64 ? launch_of<MODE, 64, 64>(masked) : v_dim == 96 ? launch_of<MODE, 128, 96>(masked)
                                                                       : launch_of<MODE, 128, 128>(masked);
}

}  // namespace sage
