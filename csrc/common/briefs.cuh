// What attention_wgmma's warpgroups need beside a block's tiles. Helping warps get it ready for them in shared memory, one block ahead:
// a brief.
#pragma once

#include "softmax.cuh"

namespace sage {

// Of a block of ROWS queries.
template <class Soft, int ROWS, int V_DIM> struct Brief {
    typename Soft::Place at;
    float k_top;  // the head's largest K scale
    bool bad;     // another kernel has computed the head exactly

    static constexpr int GROUPS = Soft::GROUPS;
    // 32-bit words, from these on.
    static constexpr int FINISH = 0, Q_SCALES = FINISH + 2 * V_DIM, K_SCALES = Q_SCALES + ROWS, PLACE = K_SCALES + 4 * GROUPS;
    static constexpr int PLACE_WORDS = 12, BYTES = (PLACE + PLACE_WORDS) * 4;
    static constexpr int HELPERS = 96;  // threads: all of the first warpgroup whose warps do not copy

    __device__ static int agreed(int x) { return __shfl_sync(0xFFFFFFFFu, x, 0); }
    // First query of this warp, from the block's first one on; computed anew, rather than to hold it in a register through the loop.
    __device__ static int warp_row() { return (ptx::thread_again() / 32 - 4) * 16; }

    // tell() puts the place there, and read() is called again when it is needed again, rather than to hold it through the loop.
    __device__ static void tell(const typename Soft::Place& at, int32_t k_top, int32_t bad, uint32_t brief) {
        const int32_t words[PLACE_WORDS] = {int(at.q_row), int(at.kv_row), at.head, at.first, at.tile_begin, at.tile_end, at.q.n, at.k.n,
                                            int(at.q.first), at.split, k_top, bad};
#pragma unroll
        for (int i = 0; i < PLACE_WORDS; ++i) ptx::store_shared4(brief + (PLACE + i) * 4, words[i]);
    }
    __device__ static Brief read(const Call& call, uint32_t brief) {
        const uint32_t from = brief + PLACE * 4;
        const uint4 a = ptx::load_shared16(from), b = ptx::load_shared16(from + 16), c = ptx::load_shared16(from + 32);
        Brief said;
        typename Soft::Place& at = said.at;
        at.q_row = a.x, at.kv_row = a.y, at.head = a.z, at.first = a.w;
        at.tile_begin = b.x, at.tile_end = b.y, at.q.n = b.z, at.k.n = b.w;
        at.q.first = c.x, at.split = c.y, said.k_top = __uint_as_float(c.z), said.bad = c.w;
        at.row = at.first + warp_row();
        at.whole_end = (call.is_causal ? min(at.k.n, at.row + 1) : at.k.n) / (8 * Soft::N);
        return said;
    }

    // What 8 channels from this one on need at the end.
    __device__ static Finish finish(uint32_t brief, int channel) {
        Finish f;
        ptx::load_shared32(f.scale, brief + (FINISH + channel) * 4);
        ptx::load_shared32(f.put_back, brief + (FINISH + V_DIM + channel) * 4);
        return f;
    }

    // What the helping warps do. Each thread asks for all of its share before it waits for anything: the warpgroups leave these few
    // turns, and one wait after another would take longer than a short block.
    template <class Tiles, class Blocks>
    __device__ static void help(const Call& call, const QCodes& q, const KCodes& k, const Stats& stats, const Tiles& tiles, uint32_t briefs,
                                const Blocks& blocks) {
        const int thread = threadIdx.x - (128 - HELPERS), warp = agreed(thread / 32);
        int which = 0, phase = 1;
        blocks([&](const typename Soft::Place& at) {
            const uint32_t to = briefs + which * BYTES;
            const auto place_free = [&] { ptx::sleep_on_barrier(tiles.brief_free(which), phase); };
            const auto store = [&](int word, float x) { ptx::store_shared4(to + word * 4, __float_as_int(x)); };
            if (warp == 0) {
                constexpr int EACH = ROWS / 32;
                float q_scale[EACH], k_scale = 0.0f;
#pragma unroll
                for (int i = 0; i < EACH; ++i) q_scale[i] = Soft::q_scale(call, at, q, at.first + i * 32 + thread);
                if (thread < 4 * GROUPS && at.tile_begin < at.tile_end) {
                    const int64_t group = at.kv_row * call.k_groups() + (at.tile_begin * GROUPS + thread / 4) * call.k_sub;
                    k_scale = k.scale[group + thread % 4 * call.k_sub / 4];
                }
                const int32_t k_top = stats.k_top[at.kv_row], bad = stats.bad[at.kv_row];
                place_free();
#pragma unroll
                for (int i = 0; i < EACH; ++i) store(Q_SCALES + i * 32 + thread, q_scale[i]);
                if (thread < 4 * GROUPS) store(K_SCALES + thread, k_scale);
                if (thread == 0) tell(at, k_top, bad, to);
            } else {
                constexpr int OTHERS = HELPERS - 32, EACH = (V_DIM + OTHERS - 1) / OTHERS;
                const auto channel = [&](int i) { return min(i * OTHERS + thread - 32, V_DIM - 1); };
                float2 finish[EACH];
#pragma unroll
                for (int i = 0; i < EACH; ++i) finish[i] = finish_of(call, stats, at.kv_row, channel(i), at.k.n);
                place_free();
#pragma unroll
                for (int i = 0; i < EACH; ++i)
                    store(FINISH + channel(i), finish[i].x), store(FINISH + V_DIM + channel(i), finish[i].y);
            }
            ptx::arrive(tiles.brief_ready(which));
            if ((which ^= 1) == 0) phase ^= 1;
        });
    }
};

}  // namespace sage
