// What one call is, and where everything it needs lies in the memory that Python allocated for it.
//
// Device code includes this file too, so it holds plain structs and nothing of the standard library.
#pragma once

#ifdef __CUDACC_RTC__
using int8_t = signed char;
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;
#define INFINITY __int_as_float(0x7F800000)  // of math.h, as are the types of cstdint
#else
#include <cstdint>
#endif

#ifdef __CUDACC__
#define SAGE_HD __host__ __device__ __forceinline__
#else
#define SAGE_HD inline
#endif

namespace sage {

// The same numbers as sage_kernels/quantize.py; tests/test_build.py compares them.
constexpr float LARGEST = 1e36f;     // a head that holds a larger magnitude, a NaN or an inf is computed exactly
constexpr float TINY = 1e-35f;       // a group whose largest magnitude is below this is all zeros
constexpr float LOG2E = 1.4426950408889634f;
constexpr float MASK_LIMIT = 2e38f;  // of a finite additive mask, whose values are multiplied by LOG2E
constexpr float EXACT_P_MAX = 0x1p-32f;  // P's factor in exact attention: 2^31 values of any size then add up to a float
constexpr uint32_t HASH = 0x9E3779B1u;  // the sign of channel c in the rotation is the top bit of c * HASH
constexpr int BLOCK = 128;           // tokens are padded to a multiple of this
constexpr int PANEL = 64;            // K and V codes come in rows of this many bytes; also the keys of one K scale
constexpr int WGMMA_KEYS = 128;      // in a tile of attention_wgmma
constexpr int WGMMA_PANEL = 128;     // for wgmma, V codes come in rows of this many bytes
constexpr int STATS_PROGRAMS = 512;  // share the statistics: so many fill a GPU at once
constexpr int SCRATCH_ALIGNMENT = 256;    // bytes
constexpr int MOST_SPLITS = 1024;         // of a query block's keys
constexpr double MOST_ELEMENTS = 0x1p48;  // of one tensor: more than any memory holds, and sizes of it fit in 64 bits

enum class DType : int { f16, bf16, f32 };

// In the order of config.PV_MODES.
enum class Mode : int {
    fp16_fp32, fp16_fp16_fp32, fp16_fp16, int8_int32, fp8_fp32_fp32, fp8_fp32_fp16, fp8_fp32, count
};

enum class PType { f16, u8, e4m3 };

SAGE_HD constexpr PType p_type(Mode mode) {
    return mode <= Mode::fp16_fp16 ? PType::f16 : mode == Mode::int8_int32 ? PType::u8 : PType::e4m3;
}
// Whether code for an architecture (compute capability times ten) has a mode: fp8 came with 8.9, and 7.5's 64 KB of shared memory
// are too few for V in fp16.
SAGE_HD constexpr bool has_mode(Mode mode, int arch) {
    return arch >= (p_type(mode) == PType::u8 ? 75 : p_type(mode) == PType::f16 ? 80 : 89);
}
SAGE_HD constexpr int v_bytes(Mode mode) { return p_type(mode) == PType::f16 ? 2 : 1; }
// Keys in one row of V codes: 64 bytes of them.
SAGE_HD constexpr int v_row_keys(Mode mode) { return PANEL / v_bytes(mode); }

// Whether there is a kernel for 9.0 that uses wgmma. Sums of fp16 products in fp16 stay with mma.sync, and so do wide heads.
SAGE_HD constexpr bool has_wgmma(Mode mode, int dim, int v_dim) {
    return dim <= 128 && v_dim <= 128 && mode != Mode::fp16_fp16_fp32 && mode != Mode::fp16_fp16;
}

// V codes are stored as the matrix instructions eat them (docs/cuda.md, "Layouts"): a row of 64 bytes holds the keys of one
// channel, in the order in which a thread's scores come out of Q K^T.
SAGE_HD constexpr int key_position(int key, int row_keys) {
    return row_keys / 4 * (key % 8 / 2) + 2 * (key / 8) + key % 2;
}
// The row of a channel: a thread's outputs are then 8 neighbouring channels.
SAGE_HD constexpr int channel_row(int channel) {
    const int x = channel % 32;
    return channel - x + 8 * (x % 8 / 2) + 2 * (x / 8) + x % 2;
}

// The same for wgmma, whose rows of V have 128 bytes: where among the codes of its row a key of 1 or 2 bytes is. A wgmma takes
// 32 bytes of a row; of those a thread's P has, from each half, the 4 that start at 4 * (lane % 4).
SAGE_HD constexpr int wgmma_key_position(int key, int v_bytes) {
    return v_bytes == 2 ? key : key / 16 * 16 + 4 * (key % 8 / 2) + 2 * (key / 8 % 2) + key % 2;
}
// Rows of K (dim bytes) and V lie as wgmma reads them from shared memory without bank conflicts, its swizzle of 64 or 128 bytes:
// where byte `at` of row `row` is within that row.
SAGE_HD constexpr int swizzled(int at, int row, int row_bytes) {
    return at ^ row * row_bytes / 128 % (row_bytes / 16) * 16;
}

// [b, h, n, d] of any layout with d contiguous; strides in elements.
struct View {
    void* data;
    int64_t b, h, n;
};

enum class MaskKind : int { none, boolean, f16, bf16, f32 };

struct Mask {
    MaskKind kind;
    const void* data;
    int64_t b, h, q, k;  // strides in elements, 0 where it broadcasts
};

struct Call {
    int batch, heads, kv_heads;
    int nq, nk;    // of packed sequences (cu_q != nullptr) the longest
    int head_dim;
    int dim;       // channels of Q and K codes: 64, 128 or 256, the rest zeros
    int v_dim;     // channels of V codes: 64, 96, 128 or 256
    Mode mode;
    DType dtype;   // of q, k, v and out
    int q_block, q_sub, k_sub;  // quantize.Granularity; k_block is PANEL
    bool is_causal, smooth_k, smooth_v, rotate, return_lse;
    bool wgmma;        // K and V codes lie as wgmma reads them (attention_wgmma), else as mma.sync does (attention_mma)
    float sm_scale;    // as given
    float q_factor;    // sm_scale * log2(e): scores are in base 2
    float v_max;       // V is scaled per channel to this
    float p_max_log2;  // P is multiplied by two to this before it is rounded
    const int32_t *cu_q, *cu_k;  // [batch + 1] for packed sequences, else nullptr
    int splits;        // parts that the keys of a query block are shared out to (1: none)

    SAGE_HD int64_t q_rows() const { return int64_t(batch) * heads; }
    SAGE_HD int64_t kv_rows() const { return int64_t(batch) * kv_heads; }
    SAGE_HD int group() const { return heads / kv_heads; }
    SAGE_HD int q_padded() const { return (nq + BLOCK - 1) / BLOCK * BLOCK; }
    SAGE_HD int k_padded() const { return (nk + BLOCK - 1) / BLOCK * BLOCK; }
    SAGE_HD int q_groups() const { return q_padded() / q_block * q_sub; }
    SAGE_HD int k_groups() const { return k_padded() / PANEL * k_sub; }
    // Programs that share the statistics of one kv head.
    SAGE_HD int chunks() const {
        const int64_t want = (STATS_PROGRAMS + kv_rows() - 1) / kv_rows(), have = (nk + PANEL - 1) / PANEL;
        return int(want < have ? want : have);
    }
};

// Tokens of sequence b: `first` within the packed tokens (0 for a padded batch), `n` of them. Never more than the longest that
// the caller named: all memory is sized by that, and nobody has looked at cu.
struct Span {
    int64_t first;
    int n;
};
SAGE_HD Span span(const int32_t* cu, int b, int n) {
    const int own = cu ? cu[b + 1] - cu[b] : n;
    return {cu ? cu[b] : 0, own < 0 ? 0 : own < n ? own : n};
}

// Hands out aligned parts of one allocation; with a null base it only counts bytes.
struct Carver {
    char* base;
    int64_t used = 0;
    template <class T> SAGE_HD T* take(int64_t count) {
        T* at = base ? reinterpret_cast<T*>(base + used) : nullptr;
        used += (count * int64_t(sizeof(T)) + SCRATCH_ALIGNMENT - 1) / SCRATCH_ALIGNMENT * SCRATCH_ALIGNMENT;
        return at;
    }
};

// Known of K and V before they are quantised.
struct Stats {
    int32_t* bad;      // [kv_rows] 1 where q, k or v holds a NaN, an inf or a magnitude of LARGEST, or where a mean is inf
    int32_t* arrived;  // [kv_rows] programs of the statistics that are done
    int64_t* v_sums;   // [kv_rows, dim] sum of V's codes in units of code_unit(mode); 0 before quantisation
    int32_t* k_top;    // [kv_rows] the largest scale of K's codes, as bits; 0 before quantisation
    int64_t zeroed;    // bytes from `bad` on that must be zero at the start
    float* k_mean;     // [kv_rows, dim], 0 unless smooth_k
    float* v_mean;     // [kv_rows, dim], 0 unless smooth_v
    float* v_scale;    // [kv_rows, dim], 0 for a channel of zeros
    float* v_inverse;  // [kv_rows, dim] 1 / v_scale, 0 where that is 0
    float* partial;    // [kv_rows, chunks, 4, dim] sums of k, of v, smallest v, largest v
    int64_t bytes;
    SAGE_HD static Stats carve(const Call& c, void* base) {
        Carver at{static_cast<char*>(base)};
        Stats s;
        s.bad = at.take<int32_t>(c.kv_rows());
        s.arrived = at.take<int32_t>(c.kv_rows());
        s.v_sums = at.take<int64_t>(c.kv_rows() * c.dim);
        s.k_top = at.take<int32_t>(c.kv_rows());
        s.zeroed = at.used;
        s.k_mean = at.take<float>(c.kv_rows() * c.dim);
        s.v_mean = at.take<float>(c.kv_rows() * c.dim);
        s.v_scale = at.take<float>(c.kv_rows() * c.dim);
        s.v_inverse = at.take<float>(c.kv_rows() * c.dim);
        s.partial = at.take<float>(c.kv_rows() * c.chunks() * 4 * c.dim);
        s.bytes = at.used;
        return s;
    }
};

// A sum of codes is kept exactly, as an integer multiple of the smallest difference between two codes.
SAGE_HD constexpr float code_unit(Mode mode) {
    return p_type(mode) == PType::u8 ? 1.0f : p_type(mode) == PType::e4m3 ? 0x1p-9f : 0x1p-24f;
}

struct QCodes {
    int8_t* codes;     // [q_rows, q_padded, dim]
    float* scale;      // [q_rows, q_groups]
    float* lse_shift;  // [q_rows, q_padded] what smoothing took from each query's scores, natural log; nullptr if not needed
    int64_t bytes;
    SAGE_HD static QCodes carve(const Call& c, void* base) {
        Carver at{static_cast<char*>(base)};
        QCodes q;
        q.codes = at.take<int8_t>(c.q_rows() * c.q_padded() * c.dim);
        q.scale = at.take<float>(c.q_rows() * c.q_groups());
        const bool shifts = c.return_lse && c.smooth_k;
        q.lse_shift = at.take<float>(shifts ? c.q_rows() * c.q_padded() : 0);
        if (!shifts) q.lse_shift = nullptr;
        q.bytes = at.used;
        return q;
    }
};

struct KCodes {
    int8_t* codes;  // [kv_rows, k_padded / 64, dim / 64, 64 tokens, 64 channels]; wgmma: [kv_rows, k_padded, dim], rows swizzled
    float* scale;   // [kv_rows, k_groups]
    int64_t bytes;
    SAGE_HD static KCodes carve(const Call& c, void* base) {
        Carver at{static_cast<char*>(base)};
        KCodes k;
        k.codes = at.take<int8_t>(c.kv_rows() * c.k_padded() * c.dim);
        k.scale = at.take<float>(c.kv_rows() * c.k_groups());
        k.bytes = at.used;
        return k;
    }
};

struct VCodes {
    // [kv_rows, k_padded / v_row_keys, v_dim rows in channel_row order, 64 bytes in key_position order]; wgmma: twice the keys a
    // row, [..., v_dim rows in channel_row order, 128 bytes in wgmma_key_position order], rows swizzled
    uint8_t* codes;
    int64_t bytes;
    SAGE_HD static VCodes carve(const Call& c, void* base) {
        Carver at{static_cast<char*>(base)};
        VCodes v;
        v.codes = at.take<uint8_t>(c.kv_rows() * c.k_padded() * c.v_dim * v_bytes(c.mode));
        v.bytes = at.used;
        return v;
    }
};

// What the parts of a split query block leave for combine.
struct Partials {
    float* out;    // [splits, q_rows, q_padded, v_dim], not yet divided by the total
    float* top;    // [splits, q_rows, q_padded] largest score
    float* total;  // [splits, q_rows, q_padded]
    int64_t bytes;
    SAGE_HD static Partials carve(const Call& c, void* base) {
        Carver at{static_cast<char*>(base)};
        const int64_t rows = c.splits > 1 ? c.splits * c.q_rows() * c.q_padded() : 0;
        Partials p;
        p.out = at.take<float>(rows * c.v_dim);
        p.top = at.take<float>(rows);
        p.total = at.take<float>(rows);
        p.bytes = at.used;
        return p;
    }
};

}  // namespace sage
