// The deployment step of many tensors, in place, in two passes: see the package's docstring.
//
// Tensors are cut into chunks, and threads share the chunks of all tensors. States are stored in single precision, or in
// bfloat16 with stochastic rounding: a moving average that changes by less than half of the last bit in a step would
// otherwise stand still.

#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "rule.h"
#include "segments.h"

namespace hrnn {

enum class Kind { Float, BFloat16, Half, Double };

// One tensor, its state and what `measure` leaves for `apply`.
struct Work {
    void* param;
    const void* grad;
    void *hidden, *average, *square;  // [H, n] [S, n] [SQUARES, n]
    void* lookahead;                  // [n] or null
    float* steps;                     // [R, n]
    int64_t count;                    // n
    Kind param_kind, grad_kind;
};

struct Chunk {
    int64_t tensor, begin;
    int count;
};

inline std::vector<Chunk> chunks_of(const std::vector<Work>& work) {
    std::vector<Chunk> chunks;
    for (size_t t = 0; t < work.size(); t++)
        for (int64_t begin = 0; begin < work[t].count; begin += CHUNK)
            chunks.push_back({int64_t(t), begin, int(std::min(CHUNK, work[t].count - begin))});
    return chunks;
}

template <class Visit> HRNN_INLINE void with_kind(Kind kind, Visit visit) {
    switch (kind) {
        case Kind::Float: return visit(float());
        case Kind::BFloat16: return visit(c10::BFloat16());
        case Kind::Half: return visit(c10::Half());
        case Kind::Double: return visit(double());
    }
}

HRNN_INLINE float widen(c10::BFloat16 value) {
    const uint32_t raised = uint32_t(value.x) << 16;
    float result;
    std::memcpy(&result, &raised, sizeof(result));
    return result;
}
HRNN_INLINE float widen(c10::Half value) { return float(value); }
HRNN_INLINE float widen(float value) { return value; }
HRNN_INLINE float widen(double value) { return float(value); }

// Read a piece of a row; whole tiles by whole vectors.
template <class Stored> HRNN_INLINE Lanes<float> widen_lanes(const Stored* from) {
    Lanes<float> result;
    for (int i = 0; i < WIDTH<float>; i++) result[i] = widen(from[i]);
    return result;
}
HRNN_INLINE Lanes<float> widen_lanes(const float* from) { return load<float>(from); }
#if defined(__AVX512F__)
HRNN_INLINE Lanes<float> widen_lanes(const c10::BFloat16* from) {
    return (FloatLanes)_mm512_slli_epi32(
        _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))), 16);
}
HRNN_INLINE Lanes<float> widen_lanes(const c10::Half* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
#elif defined(__AVX2__)
HRNN_INLINE Lanes<float> widen_lanes(const c10::BFloat16* from) {
    return (FloatLanes)_mm256_slli_epi32(
        _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))), 16);
}
HRNN_INLINE Lanes<float> widen_lanes(const c10::Half* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
#endif
template <class Stored> HRNN_INLINE void read(float* to, const Stored* from, int count) {
    if (count == TILE) {
#pragma GCC unroll 16
        for (int p = 0; p < TILE; p += WIDTH<float>) store<float>(to + p, widen_lanes(from + p));
    } else {
        for (int p = 0; p < count; p++) to[p] = widen(from[p]);
    }
}

// Scramble the bits of each lane (the finaliser of a multiplicative hash).
HRNN_INLINE IntLanes scramble(IntLanes x) {
    typedef uint32_t Unsigned __attribute__((vector_size(VECTOR_BYTES)));
    Unsigned u = (Unsigned)x;
    u ^= u >> 16;
    u *= 0x7feb352du;
    u ^= u >> 15;
    u *= 0x846ca68bu;
    u ^= u >> 16;
    return (IntLanes)u;
}

// Where the randomness of rounding comes from: what changes from step to step (the levels above, the gradient) and the
// place of the parameter. So it is the same on every rank and after a resume, and no counter has to be kept.
inline uint32_t rounding_key(const float* above, int64_t tensors, int64_t tensor, const float* log_rates) {
    uint32_t key = 2166136261u;
    const auto mix = [&](float value) {
        uint32_t bits;
        std::memcpy(&bits, &value, sizeof(bits));
        key = (key ^ bits) * 16777619u;
        key ^= key >> 15;
    };
    for (int i = 0; i < ABOVE; i++) mix(above[i * tensors + tensor]);
    mix(log_rates[tensor]);
    return key;
}

// Write the rows of one state in the precision in which it is kept.
template <int ROWS>
HRNN_INLINE void write_state(float* to, const float (*rows)[TILE], const float*, int count, int64_t stride, uint32_t) {
    for (int i = 0; i < ROWS; i++) {
        if (count == TILE) {
#pragma GCC unroll 16
            for (int p = 0; p < TILE; p += WIDTH<float>) store<float>(to + i * stride + p, load<float>(&rows[i][p]));
        } else
            std::memcpy(to + i * stride, rows[i], count * sizeof(float));
    }
}

// Add as many random bits as will be cut off, so that a value is rounded up as often as it lies near the upper one.
template <int ROWS>
HRNN_INLINE void write_state(
    c10::BFloat16* to, const float (*rows)[TILE], const float* grad, int count, int64_t stride, uint32_t key) {
    typedef uint16_t Halves __attribute__((vector_size(VECTOR_BYTES / 2)));
    typedef uint32_t Words __attribute__((vector_size(VECTOR_BYTES)));
    typedef uint16_t HalvesAnywhere __attribute__((vector_size(VECTOR_BYTES / 2), aligned(2), may_alias));
    IntLanes place;
    for (int i = 0; i < WIDTH<float>; i++) place[i] = i;
    for (int p = 0; p < count; p += WIDTH<float>) {
        const IntLanes here = (place + p) * int32_t(0x9e3779b9) + int32_t(key);
        const IntLanes seed = scramble(here ^ bits(load<float>(&grad[p])));
        Words random{};
        for (int i = 0; i < ROWS; i++) {
            random = i % 2 ? random >> 16 : (Words)scramble(seed + i * int32_t(0x85ebca6b));
            const Words raised = ((Words)bits(load<float>(&rows[i][p])) + (random & 0xffffu)) >> 16;
            const Halves value = __builtin_convertvector(raised, Halves);
            if (p + WIDTH<float> <= count)
                *reinterpret_cast<HalvesAnywhere*>(to + i * stride + p) = value;
            else
                std::memcpy(to + i * stride + p, &value, (count - p) * sizeof(uint16_t));
        }
    }
}

template <class Stored>
HRNN_INLINE void read_state(float (*to)[TILE], const Stored* from, int rows, int count, int64_t stride) {
    for (int i = 0; i < rows; i++) read(to[i], from + i * stride, count);
}

// What pass one sums over a chunk, in vectors of partial sums: rows of `Tile` from `hidden` on, squares of parameters.
template <int R> struct ChunkSums {
    static constexpr int ROWS = Tile<float, R>::SUMMED + 1;
    Lanes<float> rows[ROWS];
};

template <int R> struct MeasureScratch {
    Tile<float, R> tile{};
    ChunkSums<R> sums;
    alignas(64) float params[TILE]{};
};

// Add a tile's rows to the sums of its chunk.
template <int R> HRNN_INLINE void add_up(MeasureScratch<R>& scratch, int count) {
    constexpr int ROWS = ChunkSums<R>::ROWS;
    float* rows = scratch.tile.hidden[0];
    const auto row_sum = [](const float* row) {
        Lanes<float> sum = load<float>(row);
#pragma GCC unroll 16
        for (int p = WIDTH<float>; p < TILE; p += WIDTH<float>) sum += load<float>(row + p);
        return sum;
    };
    for (int p = 0; p < TILE; p += WIDTH<float>)
        store<float>(scratch.params + p, load<float>(scratch.params + p) * load<float>(scratch.params + p));
    if (count < TILE) {
        for (int i = 0; i + 1 < ROWS; i++) std::fill(rows + i * TILE + count, rows + (i + 1) * TILE, 0.0f);
        std::fill(scratch.params + count, scratch.params + TILE, 0.0f);
    }
    for (int i = 0; i + 1 < ROWS; i++) scratch.sums.rows[i] += row_sum(rows + i * TILE);
    scratch.sums.rows[ROWS - 1] += row_sum(scratch.params);
}

template <class Stored> HRNN_INLINE void prefetch_tile(const Work& work, int64_t begin, int count) {
    prefetch_rows(static_cast<const Stored*>(work.hidden) + begin, H, work.count, count);
    prefetch_rows(static_cast<const Stored*>(work.average) + begin, S, work.count, count);
    prefetch_rows(static_cast<const Stored*>(work.square) + begin, SQUARES, work.count, count);
    with_kind(work.grad_kind, [&](auto kind) {
        prefetch_rows(static_cast<const decltype(kind)*>(work.grad) + begin, 1, 0, count);
    });
    with_kind(work.param_kind, [&](auto kind) {
        prefetch_rows(static_cast<const decltype(kind)*>(work.param) + begin, 1, 0, count);
    });
}

template <class Stored, int R>
HRNN_INLINE void measure_tile(
    const Weights<float, R>& rule, const OneTensor<float>& above, MeasureScratch<R>& scratch, const Work& work,
    int64_t begin, int count, uint32_t key) {
    Tile<float, R>& tile = scratch.tile;
    const int64_t n = work.count;
    Stored *hidden = static_cast<Stored*>(work.hidden) + begin, *average = static_cast<Stored*>(work.average) + begin,
           *square = static_cast<Stored*>(work.square) + begin;
    with_kind(work.grad_kind, [&](auto kind) {
        read(tile.grad, static_cast<const decltype(kind)*>(work.grad) + begin, count);
    });
    with_kind(work.param_kind, [&](auto kind) {
        read(scratch.params, static_cast<const decltype(kind)*>(work.param) + begin, count);
    });
    read_state(tile.before, hidden, H, count, n);
    read_state(tile.average_before, average, S, count, n);
    read_state(tile.square_before, square, SQUARES, count, n);
    prefetch_tile<Stored>(work, begin + count, int(std::min<int64_t>(TILE, n - begin - count)));
    NoTrace none;
    forward_tile(rule, above, tile, none, count);
    write_state<H>(hidden, tile.hidden, tile.grad, count, n, key);
    write_state<S>(average, tile.average, tile.grad, count, n, key + 1);
    write_state<SQUARES>(square, tile.square, tile.grad, count, n, key + 2);
    for (int r = 0; r < R; r++) {
#pragma GCC unroll 16
        for (int p = 0; p < TILE; p += WIDTH<float>)
            store<float>(&tile.directions[r][p], load<float>(&tile.directions[r][p]) * load<float>(&tile.factor[p]));
    }
    write_state<R>(work.steps + begin, tile.directions, tile.grad, count, n, 0);
    add_up(scratch, count);
}

// Step the states; write steps to `Work::steps`, sums of hidden states, inputs, squares of directions and squares of
// parameters to `sums` [H + F + R + 1, T].
template <class Stored, int R>
void measure(
    const Weights<float, R>& rule, const std::vector<Work>& work, const float* above, const float* log_rates,
    float* sums) {
    constexpr int ROWS = ChunkSums<R>::ROWS;
    const int64_t tensors = work.size();
    const std::vector<Chunk> chunks = chunks_of(work);
    std::vector<float> of_chunk(chunks.size() * ROWS);
    each_chunk<MeasureScratch<R>>(chunks.size(), [&](int64_t index, MeasureScratch<R>& scratch) {
        const Chunk& chunk = chunks[index];
        const float* told = above + chunk.tensor;
        OneTensor<float> here;
        for (int i = 0; i < 3 * H; i++)
            here.biases[i] = rule.gate_bias(i, told[i * tensors], told[3 * H * tensors]);
        here.remembers = told[(3 * H + 1) * tensors];
        if constexpr (LONG) {
            here.decay = told[(3 * H + 2) * tensors];
            here.power = told[(3 * H + 3) * tensors];
        }
        std::fill_n(scratch.tile.inputs[F - 1], TILE, told[3 * H * tensors]);
        std::fill_n(scratch.sums.rows, ROWS, Lanes<float>{});
        const uint32_t key = rounding_key(above, tensors, chunk.tensor, log_rates);
        for (int from = 0; from < chunk.count; from += TILE)
            measure_tile<Stored>(
                rule, here, scratch, work[chunk.tensor], chunk.begin + from, std::min(TILE, chunk.count - from),
                key + uint32_t(chunk.begin + from) * 0x01000193u);
        for (int i = 0; i < ROWS; i++) of_chunk[index * ROWS + i] = sum_lanes<float>(scratch.sums.rows[i]);
    });
    std::vector<double> total(tensors * ROWS);
    for (size_t index = 0; index < chunks.size(); index++)
        for (int i = 0; i < ROWS; i++) total[i * tensors + chunks[index].tensor] += of_chunk[index * ROWS + i];
    for (size_t i = 0; i < total.size(); i++) sums[i] = float(total[i]);
}

template <class Value> HRNN_INLINE Value limited(Value step, Value limit) {
    return std::min(std::max(step, -limit), limit);
}

template <class Stored, class Value>
HRNN_INLINE void move(Stored* param, const float* steps, int count, Value scale, Value limit, Value decay) {
    for (int p = 0; p < count; p++) {
        const Value value = static_cast<Value>(param[p]);
        param[p] = static_cast<Stored>(value - (limited(Value(steps[p]) * scale, limit) + value * decay));
    }
}

// Move parameters by `scale` [R, T] times their steps, none further than `limit` [R, T], after a decay of `decay` [T];
// set lookaheads.
template <int R> void apply(const std::vector<Work>& work, const float* scale, const float* limit, const float* decay) {
    const int64_t tensors = work.size();
    const std::vector<Chunk> chunks = chunks_of(work);
    each_chunk(chunks.size(), [&](int64_t index, Nothing&) {
        const auto [tensor, begin, count] = chunks[index];
        const Work& here = work[tensor];
        with_kind(here.param_kind, [&](auto kind) {
            using Stored = decltype(kind);
            using Value = std::conditional_t<std::is_same_v<Stored, double>, double, float>;
            move<Stored, Value>(
                static_cast<Stored*>(here.param) + begin, here.steps + begin, count, scale[tensor], limit[tensor],
                decay[tensor]);
            if (!here.lookahead) return;
            Stored* lookahead = static_cast<Stored*>(here.lookahead) + begin;
            const float* steps = here.steps + (R - 1) * here.count + begin;
            const int64_t row = (R - 1) * tensors + tensor;
            for (int p = 0; p < count; p++)
                lookahead[p] = static_cast<Stored>(limited(steps[p] * scale[row], limit[row]));
        });
    });
}

}  // namespace hrnn
