// How the work of attention_mma is cut, by mode, head_dim and architecture. docs/cuda.md lists what else was tried.
#pragma once

#include "params.h"

namespace sage {

// Bytes of shared memory that common/copies.cuh needs beside the tiles.
SAGE_HD constexpr int copy_barriers(int arch) { return arch >= 90 ? 16 : 0; }

struct Tile {
    int m_tiles;  // of 16 queries, in a warp
    int warps;
    int keys;     // in a tile; a flush of the accumulator comes after each
    int blocks;   // on a multiprocessor
    int chains;   // columns of 8 that are multiplied at a time: independent chains of instructions
    bool q_held;  // Q in registers, else in shared memory

    SAGE_HD constexpr int rows() const { return 16 * m_tiles * warps; }
    SAGE_HD constexpr int threads() const { return 32 * warps; }
    // Two tiles of K and V, and Q where it lies there.
    SAGE_HD constexpr int shared_bytes(Mode mode, int dim, int v_dim, int arch) const {
        return 2 * keys * (dim + v_dim * v_bytes(mode)) + copy_barriers(arch) + (q_held ? 0 : rows() * dim);
    }
};

// arch: compute capability times ten, of the code and not of the device. 8.6, 8.9 and 12.0 have 100 KB of shared memory on a
// multiprocessor, 7.5 has 64. Two blocks of 4 warps beat one of 8 wherever they fit: they do not wait at the same barrier.
SAGE_HD constexpr Tile tile_for(Mode mode, int dim, int v_dim, int arch) {
#ifdef SAGE_TUNE_TILE
    return Tile{SAGE_TUNE_TILE};
#endif
    const bool roomy = arch == 80 || arch == 90 || arch == 100;
    const bool int8 = mode == Mode::int8_int32, fp8 = p_type(mode) == PType::e4m3;
    if (dim == 256) {  // more registers than there are: these tiles spill least. Q in shared memory where it fits beside
        if (roomy) return {1, 4, 64, 2, 2, true};
        return {1, 8, 64, 1, 2, v_bytes(mode) == 2 || arch < 120};
    }
    if (dim == 64) {
        const bool unpacked = fp8 && (arch == 90 || arch == 100);  // to fp16 first, which takes the third block's registers
        return int8 ? Tile{1, 4, 128, 2, 4, true} : Tile{1, 4, 64, unpacked ? 2 : 3, 4, true};
    }
    if (int8 && !roomy) return {1, 8, 128, 1, 4, true};
    if (int8 && arch <= 90) return {1, 4, 128, 2, 4, true};  // on 10.0 this one spills
    // 128 keys: fewer barriers, and nothing to flush; two blocks of them take 192 KB
    if (mode == Mode::fp16_fp32 && roomy && arch >= 90) return {1, 4, 128, 2, 4, true};
    return {1, 4, 64, 2, 4, true};
}

// attention_wgmma: two warpgroups of 64 queries each, one block on a multiprocessor.
constexpr int WGMMA_ROWS = 128;

// choose_splits: fewer tiles a part cost more than they gain; as many parts as it makes at most.
constexpr int SPLIT_TILES = 4, USUAL_SPLITS = 32;

}  // namespace sage
