// Host side: errors that name the kernel and the shape, and the caller's device while a call lasts.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "params.h"

namespace sage {

inline std::string describe(const Call& c) {
    auto text = [](int n) { return std::to_string(n); };
    return "q [" + text(c.batch) + ", " + text(c.heads) + ", " + text(c.nq) + ", " + text(c.head_dim) + "], k and v [" +
           text(c.batch) + ", " + text(c.kv_heads) + ", " + text(c.nk) + ", " + text(c.head_dim) + "]";
}

inline void check(cudaError_t error, const char* what, const Call& call) {
    if (error != cudaSuccess)
        throw std::runtime_error(std::string(what) + " failed for " + describe(call) + ": " + cudaGetErrorName(error) + ", " +
                                 cudaGetErrorString(error));
}

// After a launch: its own error, not one that came later.
inline void check_launch(const char* kernel, const Call& call) { check(cudaGetLastError(), kernel, call); }

class DeviceGuard {
   public:
    DeviceGuard(int device, const Call& call) {
        check(cudaGetDevice(&before_), "cudaGetDevice", call);
        if (device != before_) check(cudaSetDevice(device), "cudaSetDevice", call);
        changed_ = device != before_;
    }
    ~DeviceGuard() {
        if (changed_) cudaSetDevice(before_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

   private:
    int before_ = 0;
    bool changed_ = false;
};

}  // namespace sage
