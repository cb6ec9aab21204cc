// Host side of the attention step: which kernel, on which grid.
#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>

#include "attention_kernels.h"
#include "check.h"
#include "combine.cuh"
#include "kernels.h"
#include "tiles.h"

namespace sage {
namespace {

constexpr int MAX_DEVICES = 64;

const void* find_mma(const Call& c, bool masked) {
    switch (c.mode) {
        case Mode::fp16_fp32: return mma_kernel<Mode::fp16_fp32>(c.v_dim, masked);
        case Mode::fp16_fp16_fp32: return mma_kernel<Mode::fp16_fp16_fp32>(c.v_dim, masked);
        case Mode::fp16_fp16: return mma_kernel<Mode::fp16_fp16>(c.v_dim, masked);
        case Mode::int8_int32: return mma_kernel<Mode::int8_int32>(c.v_dim, masked);
        case Mode::fp8_fp32_fp32: return mma_kernel<Mode::fp8_fp32_fp32>(c.v_dim, masked);
        case Mode::fp8_fp32_fp16: return mma_kernel<Mode::fp8_fp32_fp16>(c.v_dim, masked);
        case Mode::fp8_fp32: return mma_kernel<Mode::fp8_fp32>(c.v_dim, masked);
        default: throw std::invalid_argument("mode is not one of the PV modes");
    }
}

Launch find_wgmma(const Call& c, bool masked) {
    switch (c.mode) {
        case Mode::fp16_fp32: return wgmma_kernel<Mode::fp16_fp32>(c.v_dim, masked);
        case Mode::int8_int32: return wgmma_kernel<Mode::int8_int32>(c.v_dim, masked);
        case Mode::fp8_fp32_fp32: return wgmma_kernel<Mode::fp8_fp32_fp32>(c.v_dim, masked);
        case Mode::fp8_fp32_fp16: return wgmma_kernel<Mode::fp8_fp32_fp16>(c.v_dim, masked);
        case Mode::fp8_fp32: return wgmma_kernel<Mode::fp8_fp32>(c.v_dim, masked);
        default: throw std::invalid_argument("mode is not one of those that wgmma has");
    }
}

// How mma.sync's tile for an architecture is launched.
Launch launch_of(const void* kernel, const Call& c, int arch) {
    const Tile tile = tile_for(c.mode, c.dim, c.v_dim, arch);
    return {kernel, tile.rows(), tile.threads(), tile.shared_bytes(c.mode, c.dim, c.v_dim, arch)};
}

// The kernel of a call on the current device, which may use all the shared memory it asks for from then on. What that takes is
// asked once for every kernel and device: the architecture that the code running there was compiled for, times ten.
Launch find_kernel(const Call& c, bool masked) {
    static std::atomic<int> known[2][int(Mode::count)][4][2][MAX_DEVICES];
    int device = 0;
    check(cudaGetDevice(&device), "cudaGetDevice", c);
    if (device >= MAX_DEVICES) throw std::invalid_argument("device is " + std::to_string(device) + "; at most 63 is supported");
    const int size = c.v_dim == 64 ? 0 : c.v_dim == 96 ? 1 : c.v_dim == 128 ? 2 : 3;
    std::atomic<int>& asked = known[c.wgmma][int(c.mode)][size][masked][device];
    Launch launch = c.wgmma ? find_wgmma(c, masked) : Launch{find_mma(c, masked), 0, 0, 0};
    int arch = asked.load();
    const bool first = arch == 0;
    if (first) {
        cudaFuncAttributes attributes;
        check(cudaFuncGetAttributes(&attributes, launch.function), "attention", c);
        arch = attributes.ptxVersion;
    }
    if (!c.wgmma) launch = launch_of(launch.function, c, arch);
    if (first) {
        check(cudaFuncSetAttribute(launch.function, cudaFuncAttributeMaxDynamicSharedMemorySize, launch.shared_bytes), "attention", c);
        asked.store(arch);
    }
    return launch;
}

unsigned multiprocessors(const Call& c) {
    static std::atomic<int> known[MAX_DEVICES];
    int device = 0;
    check(cudaGetDevice(&device), "cudaGetDevice", c);
    int count = known[device].load();  // find_kernel has looked whether there is a place for this device
    if (count == 0) {
        check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute", c);
        known[device].store(count);
    }
    return unsigned(count);
}

// A grid's first axis holds up to 2^31 - 1 blocks.
unsigned grid(int64_t blocks, const Call& c) {
    if (blocks > 0x7FFFFFFF) throw std::invalid_argument("the call has too many blocks for one launch: " + describe(c));
    return unsigned(blocks);
}

}  // namespace

int key_tile(Mode mode, int dim, int v_dim, int arch) { return tile_for(mode, dim, v_dim, arch).keys; }

int choose_splits(const Call& c, int multiprocessors, int arch) {
    const Tile tile = c.wgmma ? Tile{1, WGMMA_ROWS / 16, WGMMA_KEYS, 1, 1, false} : tile_for(c.mode, c.dim, c.v_dim, arch);
    const int64_t blocks = c.q_rows() * ((c.nq + tile.rows() - 1) / tile.rows());
    const int64_t wanted = int64_t(multiprocessors) * tile.blocks / blocks;  // at least a whole share of the card each
    const int64_t most = c.nk / (SPLIT_TILES * tile.keys);
    const int64_t splits = wanted < most ? wanted : most;
    return splits < 1 ? 1 : splits > USUAL_SPLITS ? USUAL_SPLITS : int(splits);
}

void launch_attention(const Call& c, const QCodes& q, const KCodes& k, const VCodes& v, const Stats& stats, const Mask& mask,
                      const Partials& partials, View out, float* lse, cudaStream_t stream) {
    const Launch kernel = find_kernel(c, mask.kind != MaskKind::none);
    unsigned blocks = grid(c.q_rows() * c.splits * ((c.nq + kernel.rows - 1) / kernel.rows), c);
    // attention_wgmma's stay on their multiprocessor and take one query block after another; not with a mask (there), and not where
    // some of these may have no keys or how they differ in length is not known.
    const bool stay = c.wgmma && !c.cu_q && c.splits == 1 && mask.kind == MaskKind::none;
    if (stay) blocks = std::min(blocks, multiprocessors(c));
    void* arguments[] = {const_cast<Call*>(&c), const_cast<QCodes*>(&q), const_cast<KCodes*>(&k), const_cast<VCodes*>(&v),
                         const_cast<Stats*>(&stats), const_cast<Mask*>(&mask), const_cast<Partials*>(&partials), &out, &lse};
    check(cudaLaunchKernel(kernel.function, dim3(blocks), dim3(kernel.threads), arguments, kernel.shared_bytes, stream),
          c.wgmma ? "attention_wgmma" : "attention_mma", c);
    if (c.splits > 1) {
        const int64_t threads = c.q_rows() * c.nq * (c.v_dim / COMBINE_CHANNELS);
        const unsigned programs = grid((threads + COMBINE_THREADS - 1) / COMBINE_THREADS, c);
        combine<<<programs, COMBINE_THREADS, 0, stream>>>(c, q, stats, partials, out, lse);
        check_launch("combine", c);
    }
}

}  // namespace sage
