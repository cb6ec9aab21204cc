// Attention with wgmma, for compute capability 9.0 alone: INT8 Q K^T and PV in the modes of has_wgmma.
//
// A block has three warpgroups and takes 128 queries at a time. One thread of the first asks for Q and for tiles of K and V, which
// copies bring into shared memory (copy), and its other warps for what else is needed (Brief::help); the other two each own 64
// queries. What these do with a tile is in turn(): a warpgroup's matrix products run in the background of its own softmax and of
// the other's. docs/hopper.md draws it and lists what else was tried.
#pragma once

#include "common/briefs.cuh"
#include "common/stages.cuh"
#include "common/wgmma.cuh"
#include "params.h"
#include "tiles.h"

namespace sage {

template <Mode MODE, int DIM, int V_DIM, bool MASKED> struct WgmmaAttention {
    static constexpr int KEYS = WGMMA_KEYS;
    static constexpr int ROWS = WGMMA_ROWS, WARPGROUPS = ROWS / 64;  // queries of a block, and those who own them
    static constexpr int THREADS = 128 * (WARPGROUPS + 1);
    static constexpr int K_BYTES = KEYS * DIM, V_BYTES = KEYS * V_DIM * v_bytes(MODE), Q_BYTES = ROWS * DIM;
    using Soft = Softmax<MODE, 1, KEYS, V_DIM, MASKED, true>;
    using Brief = sage::Brief<Soft, ROWS, V_DIM>;
    using Tiles = Stages<Q_BYTES, K_BYTES, V_BYTES>;
    static constexpr int ALIGNMENT = 1024;  // of swizzled rows
    static constexpr int SHARED_BYTES = ALIGNMENT + Tiles::BYTES + Tiles::BARRIER_BYTES + Tiles::BRIEFS * Brief::BYTES;
    static constexpr int REGISTERS = 240, COPY_REGISTERS = 24;  // of a thread: 2 * 128 * 240 + 128 * 24 are all there are

    using Pv = typename Soft::Pv;
    static constexpr int GROUPS = Soft::GROUPS;
    static constexpr bool IN_PLACE = Pv::IN_PLACE;
    using Part = typename Pv::Part[V_DIM / 8];

    // A maximum may pass the reference, which sums are relative to, by this (base 2) before they are brought to a new one: P is
    // relative to its tile's own maximum, and float32 has room. Where P is relative to the reference there is none.
    static constexpr float HEADROOM = Pv::P_AT_TILE ? 64.0f : 0.0f;

    // In which order the compiler has a turn's instructions is worth 5 %, and what makes it choose a good one was found by trying, for
    // each mode (docs/hopper.md). The result is the same.
    static constexpr bool FLUSH_FIRST = MODE == Mode::int8_int32 && V_DIM > 64;
    static constexpr bool HOLD_K = !FLUSH_FIRST && MODE != Mode::fp8_fp32 && MODE != Mode::fp16_fp32;

    // Words of P in a thread and row that are computed while the rest of the tile before is still being summed: half or none, whatever
    // is faster.
    static constexpr bool START_EARLY = MODE == Mode::fp8_fp32_fp32 || (MODE == Mode::fp8_fp32_fp16 && V_DIM == 64);
    static constexpr int EARLY = START_EARLY ? Soft::P_WORDS / 2 : 0;
    static_assert(EARLY == 0 || (HOLD_K && !IN_PLACE), "K's stage would be free twice, or sums be raised while they change");

    // What a warpgroup keeps from one tile to the next.
    struct State {
        typename Soft::Rows rows;
        typename Soft::Scores s;
        Part part;            // this tile's sums of P V, unless they are added in place
        float tops[1][2];     // this thread's largest scores
        float base[1][2];     // the rows' largest, which P's exponents are taken from
        float grow[2];        // 2^(base - reference), of the sums in `part`
        typename Soft::Scales scale;  // of s
        float k_scale[GROUPS];        // of the next tile
        uint32_t q_rows;              // wgmma::descriptor of Q
        int next, phase;              // where the tile's V is and the next one's K; the phase of their barrier
        int done;                     // the stage that was used last
    };

    template <class T, int A, int B> __device__ static T (&flat(T (&x)[A][B]))[A * B] { return reinterpret_cast<T(&)[A * B]>(x); }

    // Scores start at MAGIC, as Softmax wants them: the compiler hides these moves among the exponentials before.
    __device__ static void clear(typename Soft::Scores& s) {
#pragma unroll
        for (int n = 0; n < Soft::N; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) s[0][n][i] = MAGIC_BITS;
        wgmma::changed(flat(s[0]));
    }

    __device__ static void multiply_qk(typename Soft::Scores& s, uint32_t q, uint32_t k) {
#pragma unroll
        for (int step = 0; step < DIM / 32; ++step)
            wgmma::mma_s8(flat(s[0]), wgmma::whole<DIM>(q + step * wgmma::STEP), wgmma::whole<DIM>(k + step * wgmma::STEP));
        wgmma::commit();
    }

    // v: of the tile's rows, each 128 bytes of keys; of 2-byte codes two such panels.
    template <class Sums> __device__ static void multiply_pv(Sums& sums, const typename Soft::Probabilities& p, uint32_t v) {
#pragma unroll
        for (int step = 0; step < Soft::P_WORDS / 2; ++step) {
            const uint32_t a[4] = {p[0][0][2 * step], p[0][1][2 * step], p[0][0][2 * step + 1], p[0][1][2 * step + 1]};
            const uint64_t b = wgmma::whole<WGMMA_PANEL>(v + step / 4 * (V_DIM * WGMMA_PANEL / 16) + step % 4 * wgmma::STEP);
            const bool add = IN_PLACE || step > 0;
            if constexpr (p_type(MODE) == PType::u8) wgmma::mma_u8s8(flat(sums), a, b, add);
            else if constexpr (p_type(MODE) == PType::f16) wgmma::mma_f16(flat(sums), a, b, add);
            else wgmma::mma_e4m3(flat(sums), a, b, add);
            if (2 * (step + 1) == EARLY) wgmma::commit();
        }
        wgmma::commit();
    }

    // One of the four sums of a thread in 8 channels.
    __device__ static float sum_of(const int32_t (&part)[4], int i) { return float(part[i]); }
    __device__ static float sum_of(const float (&part)[4], int i) { return part[i]; }
    __device__ static float sum_of(const uint32_t (&part)[2], int i) { return ptx::from_f16(uint16_t(part[i / 2] >> i % 2 * 16)); }

    // The sums of one tile to those of all.
    __device__ static void flush(State& state) {
        if constexpr (!IN_PLACE) {
#pragma unroll
            for (int j = 0; j < V_DIM / 8; ++j)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    float& sum = state.rows.acc[0][j][i];
                    if constexpr (Pv::P_AT_TILE) sum = fmaf(sum_of(state.part[j], i), state.grow[i / 2], sum);
                    else sum += sum_of(state.part[j], i);
                }
        }
    }

    // Moves the reference up to `base` where that is too far above.
    __device__ static void rescale(State& state) {
        typename Soft::Rows& rows = state.rows;
        const bool moved = state.base[0][0] > rows.top[0][0] + HEADROOM || state.base[0][1] > rows.top[0][1] + HEADROOM;
        if (!__any_sync(0xFFFFFFFFu, moved)) return;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float top = fmaxf(rows.top[0][r], state.base[0][r]), shrink = ptx::exp2(rows.top[0][r] - top);
            rows.top[0][r] = top;
            rows.total[0][r] *= shrink;
#pragma unroll
            for (int j = 0; j < V_DIM / 8; ++j) rows.acc[0][j][2 * r] *= shrink, rows.acc[0][j][2 * r + 1] *= shrink;
        }
    }

    // What does not change from tile to tile.
    struct Work {
        const Call& call;
        const typename Soft::Place& at;
        const Tiles& tiles;
        uint32_t k_rows, v_rows;  // wgmma::descriptor of the first stages
        const float* k_scales;    // of this thread's keys
        bool leads;               // this thread speaks for its warpgroup
        bool large;               // some scores may count much (Softmax::exponent)
    };

    __device__ static void load_k_scale(State& state, const Work& work, int tile) {
        const float* from = work.k_scales + min(tile, work.at.tile_end - 1) * (GROUPS * work.call.k_sub);
#pragma unroll
        for (int g = 0; g < GROUPS; ++g) state.k_scale[g] = from[g * work.call.k_sub];
    }

    // The scores of a tile have arrived: this thread's largest. CAREFUL, here and below: some keys may be hidden, or scores large.
    template <bool CAREFUL> __device__ static void find_tops(State& state, const Work& work, int tile) {
        Soft::template scales<CAREFUL>(state.scale, state.rows, state.k_scale);
        if (CAREFUL && (MASKED || tile >= work.at.whole_end))
            Soft::hide(state.s, work.at, state.scale, tile * KEYS, work.call.is_causal);
        Soft::find_tops(state.tops, state.s, state.scale);
        if (CAREFUL)
#pragma unroll
            for (int r = 0; r < 2; ++r) state.tops[0][r] = fmaxf(state.tops[0][r], Soft::NOTHING);
        wgmma::changed(state.tops[0]);
    }

    __device__ static void find_base(State& state) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float top = Soft::quad_max(state.tops[0][r]);
            state.base[0][r] = Pv::P_AT_TILE ? top : fmaxf(top, state.rows.top[0][r]);
        }
        wgmma::changed(state.base[0]);
    }

    __device__ static void multiply_pv(State& state, const Work& work, const typename Soft::Probabilities& p) {
        const uint32_t v = work.v_rows + state.next * (V_BYTES / 16);
        if constexpr (IN_PLACE) multiply_pv(state.rows.acc[0], p, v);
        else multiply_pv(state.part, p, v);
    }
    __device__ static void await_pv(State& state) {
        wgmma::wait<0>();
        if constexpr (IN_PLACE) wgmma::changed(flat(state.rows.acc[0]));
        else wgmma::changed(flat(state.part));
        wgmma::changed(flat(state.s[0]));
    }
    __device__ static void finish_pv(State& state, const Work& work) {
        await_pv(state);
        if (work.leads) ptx::arrive(work.tiles.v_free(state.done));
    }
    // Not before `known` is known, or the compiler would wait for P V before it looks for that. What is added is 0, as a batch is not
    // negative, which it cannot see.
    __device__ static void release_k(const State& state, const Work& work, const float (&known)[2]) {
        const uint32_t bits = __float_as_uint(known[0]) | __float_as_uint(known[1]);
        if (work.leads) ptx::arrive(work.tiles.k_free(state.done) + ((bits & uint32_t(work.call.batch)) >> 31));
    }

    // From the scores of a tile to P. The rows' largest are exchanged, and the sums of the tile before added, meanwhile.
    template <bool CAREFUL>
    __device__ static void weigh(State& state, const Work& work, typename Soft::Probabilities& p, float (&sums)[1][2]) {
        if constexpr (EARLY > 0) {
            wgmma::wait<1>();  // of P, the words up to EARLY can be written
            wgmma::changed(flat(state.s[0]));
        }
        find_base(state);
        if constexpr (IN_PLACE) rescale(state);
        if (FLUSH_FIRST) flush(state);
        const auto exponent = Soft::exponent(state.s, state.base, state.scale, work.call.p_max_log2, CAREFUL && work.large);
        if constexpr (EARLY > 0) {
            Soft::template weigh<0, EARLY>(p, sums, state.s, exponent, state.base, work.call.p_max_log2);
            wgmma::changed(sums[0]);
            release_k(state, work, sums[0]);
            finish_pv(state, work);
        }
        if (!FLUSH_FIRST) flush(state);
        Soft::template weigh<EARLY>(p, sums, state.s, exponent, state.base, work.call.p_max_log2);
        wgmma::changed(flat(p[0]));
    }

    // The sums of P, and what this tile's sums of P V will count.
    __device__ static void add_up(State& state, const float (&sums)[1][2]) {
        if constexpr (!IN_PLACE) rescale(state);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float& total = state.rows.total[0][r];
            if constexpr (Pv::P_AT_TILE) {
                state.grow[r] = ptx::exp2(state.base[0][r] - state.rows.top[0][r]);
                total = fmaf(sums[0][r], state.grow[r], total);
            } else {
                total += sums[0][r];
            }
        }
    }

    // To the next stage.
    __device__ static void advance(State& state) {
        state.done = state.next;
        if (++state.next == Tiles::COUNT) state.next = 0, state.phase ^= 1;
    }

    // A tile whose scores are here, up to where those of the next one are, which behind the last is the first of the next block.
    template <bool CAREFUL> __device__ static void turn(State& state, const Work& work, int tile, int next) {
        const Tiles& tiles = work.tiles;
        typename Soft::Probabilities p;
        float sums[1][2];
        weigh<CAREFUL>(state, work, p, sums);
        clear(state.s);

        // In the background from here on: the next tile's scores, first, and this tile's sums.
        wgmma::fence();
        multiply_qk(state.s, state.q_rows, work.k_rows + state.next * (K_BYTES / 16));
        multiply_pv(state, work, p);
        advance(state);
        const uint32_t passed = ptx::barrier_passed(tiles.full(state.next), state.phase);
        add_up(state, sums);
        ptx::wait_barrier(tiles.full(state.next), state.phase, passed);
        wgmma::wait<EARLY ? 2 : 1>();
        wgmma::changed(flat(state.s[0]));
        find_tops<CAREFUL>(state, work, next);
        if constexpr (HOLD_K) {
            if constexpr (EARLY == 0) release_k(state, work, state.tops[0]);
            load_k_scale(state, work, tile + 2);
        } else if (work.leads) {
            ptx::arrive(tiles.k_free(state.done));
        }
        if constexpr (EARLY == 0) finish_pv(state, work);
        if (!HOLD_K) load_k_scale(state, work, tile + 2);
    }

    // The same for the loop over tiles, where the compiler must see that a warp agrees: shuffles show it that.
    __device__ static typename Soft::Place place_of(const Call& call, const Mask& mask, uint32_t brief) {
        typename Soft::Place at = Brief::read(call, brief).at;
        at.tile_begin = Brief::agreed(at.tile_begin), at.tile_end = Brief::agreed(at.tile_end);
        at.whole_end = Brief::agreed(at.whole_end), at.k.n = Brief::agreed(at.k.n);
        if (MASKED) at.mask = mask_of_head(mask, call.batch > 1 ? int(at.q_row) / call.heads : 0, Brief::agreed(at.head));
        return at;
    }

    // The scales of a block's queries and of its first tile.
    __device__ static void take_scales(State& state, uint32_t brief) {
        const auto scale = [&](int word) { return __int_as_float(ptx::load_shared4(brief + word * 4)); };
#pragma unroll
        for (int r = 0; r < 2; ++r) state.rows.scale[0][r] = scale(Brief::Q_SCALES + Brief::warp_row() + r * 8 + Soft::lane() / 4);
#pragma unroll
        for (int g = 0; g < GROUPS; ++g) state.k_scale[g] = scale(Brief::K_SCALES + g * 4 + Soft::lane() % 4);
    }

    // The scores of the very first tile, with nothing else to do meanwhile.
    __device__ static void begin(State& state, const Work& work, uint32_t brief) {
        ptx::wait_barrier(work.tiles.full(0), 0);
        if (work.leads && EARLY == 0) ptx::arrive(work.tiles.v_free(0));  // the first turn brings no V
        take_scales(state, brief);
        clear(state.s);
        wgmma::fence();
        multiply_qk(state.s, state.q_rows, work.k_rows);
        advance(state);
        ptx::wait_barrier(work.tiles.full(state.next), state.phase);
        wgmma::wait<0>();
        wgmma::changed(flat(state.s[0]));
        if (work.leads && EARLY == 0) ptx::arrive(work.tiles.k_free(0));  // else the first tile does both
        find_tops<true>(state, work, work.at.tile_begin);
    }

    // The tiles of a block whose first scores are here. follow(): makes ready for those of the next block, and moves work.at there.
    template <class Follow> __device__ static void consume(State& state, const Work& work, const Follow& follow) {
#pragma unroll
        for (int j = 0; j < V_DIM / 8; ++j)
#pragma unroll
            for (int i = 0; i < int(sizeof(typename Pv::Part) / 4); ++i) {
                if constexpr (Pv::P_AT_TILE) asm volatile("" : "=r"(state.part[j][i]));  // any integer: it is multiplied by 0
                else state.part[j][i] = 0;
            }
        state.grow[0] = state.grow[1] = 0.0f;
#pragma unroll
        for (int r = 0; r < 2; ++r) state.rows.top[0][r] = Soft::quad_max(state.tops[0][r]);
        load_k_scale(state, work, work.at.tile_begin + 1);

        int tile = work.at.tile_begin, end = work.at.tile_end - 1, ahead = 1, plain = min(work.at.whole_end - 1, end);
        // First all tiles but the last, then that one; those that are followed by one that may be seen as a whole by themselves.
#pragma unroll 1
        for (bool last = false;; last = true) {
            plain = Brief::agreed(MASKED || work.large ? 0 : plain);  // with a mask none; but without this loop the other one spills
            for (; tile < plain; ++tile) turn<false>(state, work, tile, tile + 1);
            for (; tile < end; ++tile) turn<true>(state, work, tile, tile + ahead);
            if (last) break;
            follow();
            ahead = work.at.tile_begin - tile;
            plain = work.at.tile_begin < work.at.whole_end ? end + 1 : 0;
            ++end;
        }
        if constexpr (EARLY > 0) await_pv(state);
        flush(state);
    }

    // What one thread does: asks for the tiles of all blocks. They are numbered from the first head's on, and so are Q's.
    template <class Blocks>
    __device__ static void copy(const Call& call, const QCodes& q, const KCodes& k, const VCodes& v, const Tiles& tiles, const Blocks& blocks) {
        int stage = 0, phase = 1, place = 0;  // at first the barriers that say a stage is free count as passed
        int before = -1;                      // the last turn's tile
        const auto turn = [&](int q_block, int tile) {
            ptx::sleep_on_barrier(tiles.k_free(stage), phase);
            ptx::sleep_on_barrier(tiles.v_free(stage), phase);
            const uint32_t full = tiles.full(stage);
            ptx::expect_bytes(full, (q_block >= 0 ? Q_BYTES : 0) + (tile >= 0 ? K_BYTES : 0) + (before >= 0 ? V_BYTES : 0));
            if (q_block >= 0) ptx::copy_bulk(tiles.q(place), q.codes + int64_t(q_block) * Q_BYTES, Q_BYTES, full);
            if (tile >= 0) ptx::copy_bulk(tiles.k(stage), k.codes + int64_t(tile) * K_BYTES, K_BYTES, full);
            if (before >= 0) ptx::copy_bulk(tiles.v(stage), v.codes + int64_t(before) * V_BYTES, V_BYTES, full);
            if (++stage == Tiles::COUNT) stage = 0, phase ^= 1;
            before = tile;
        };
        blocks([&](const typename Soft::Place& at) {
            const int first = int(at.kv_row) * (call.k_padded() / KEYS), end = first + at.tile_end;
            int q_block = int(at.q_row) * (call.q_padded() / ROWS) + at.first / ROWS;
            for (int tile = first + at.tile_begin; tile < end; ++tile, q_block = -1) turn(q_block, tile);
            if (at.tile_begin < at.tile_end && ++place == Tiles::COUNT) place = 0;
        });
        if (before >= 0) turn(-1, -1), turn(-1, -1);  // the second brings nothing, but is waited for
    }

    __device__ static void run(const Call& call, const QCodes& q, const KCodes& k, const VCodes& v, const Stats& stats,
                               const Mask& mask, const Partials& partials, const View& out, float* lse) {
        extern __shared__ char shared[];
        const Tiles tiles{(ptx::shared_address(shared) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT};
        const uint32_t briefs = tiles.shared + Tiles::BYTES + Tiles::BARRIER_BYTES;
        // The same in all threads of a warp: the shuffle shows that to the compiler, which then has descriptors ready in uniform registers.
        const int group = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 128, 0);
        if (threadIdx.x == 0) tiles.init(WARPGROUPS, Brief::HELPERS);
        __syncthreads();

        // One query block after another: each(its number, whether more follow). With a mask just one, as that leaves no registers.
        const uint32_t all = uint32_t(call.q_rows()) * call.splits * ((call.nq + ROWS - 1) / ROWS);
        const auto for_each = [&](const auto& each) {
            if constexpr (MASKED) return each(blockIdx.x, false);
            for (uint32_t index = blockIdx.x; index < all; index += gridDim.x) each(index, index + gridDim.x < all);
        };
        const auto blocks = [&](const auto& each) {
            for_each([&](uint32_t index, bool) {
                typename Soft::Place at;
                const bool exists = Soft::template locate<ROWS, uint32_t>(call, mask, 0, index, at, gridDim.x < all);
                if (!exists) at.tile_begin = at.tile_end = 0;
                each(at);
            });
        };
        if (group == 0) {
            asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COPY_REGISTERS));
            if (threadIdx.x == 0) copy(call, q, k, v, tiles, blocks);
            else if (threadIdx.x >= 128 - Brief::HELPERS) Brief::help(call, q, k, stats, tiles, briefs, blocks);
            return;
        }
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
        State state;
        state.next = 0, state.phase = 0;
        int place = 0, which = 0, phase = 0;
        const auto q_rows = [&] { return wgmma::descriptor(tiles.q(place) + (group - 1) * 64 * DIM); };
        ptx::wait_barrier(tiles.brief_ready(0), 0);
        typename Soft::Place at = place_of(call, mask, briefs);  // of the block whose scores come next
        Work work{call, at, tiles, wgmma::descriptor(tiles.k(0)), wgmma::descriptor(tiles.v(0)), k.scale, threadIdx.x % 128 == 0, false};
        const bool any = at.tile_begin < at.tile_end;  // the same in all blocks where these are several
        if (any) {
            state.q_rows = q_rows();
            begin(state, work, briefs);
        }
        for_each([&](uint32_t, bool more) {
            const uint32_t brief = briefs + which * Brief::BYTES;
            Soft::start(state.rows);
            wgmma::changed(flat(state.rows.acc[0]));
            if (any) {
                const Brief said = Brief::read(call, brief);
                work.k_scales = k.scale + said.at.kv_row * call.k_groups() + threadIdx.x % 4 * call.k_sub / 4;
                const float q_top = fmaxf(state.rows.scale[0][0], state.rows.scale[0][1]);
                work.large = !MASKED && __any_sync(0xFFFFFFFFu, said.k_top * q_top > Soft::LARGE);
                consume(state, work, [&] {
                    if (++place == Tiles::COUNT) place = 0;
                    state.q_rows = q_rows();
                    if (!more) return;
                    const uint32_t next = briefs + (which ^ 1) * Brief::BYTES;
                    ptx::wait_barrier(tiles.brief_ready(which ^ 1), phase ^ which);
                    take_scales(state, next);
                    at = place_of(call, mask, next);
                });
            } else {
                ptx::wait_barrier(tiles.brief_ready(which), phase);
            }
            const Brief said = Brief::read(call, brief);
            if (!said.bad)
                Soft::write(call, said.at, state.rows, q, partials, out, lse, [&](int channel) {
                    return Brief::finish(brief, channel);
                });
            ptx::arrive(tiles.brief_free(which));
            if ((which ^= 1) == 0) phase ^= 1;
        });
    }
};

template <Mode MODE, int DIM, int V_DIM, bool MASKED>
__global__ void __launch_bounds__(WgmmaAttention<MODE, DIM, V_DIM, MASKED>::THREADS, 1)
    attention_wgmma(const Call call, const QCodes q, const KCodes k, const VCodes v, const Stats stats, const Mask mask,
                    const Partials partials, const View out, float* lse) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    WgmmaAttention<MODE, DIM, V_DIM, MASKED>::run(call, q, k, v, stats, mask, partials, out, lse);
#endif
}

}  // namespace sage
