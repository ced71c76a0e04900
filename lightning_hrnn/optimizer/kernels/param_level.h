// The param level over a flat vector of tensors, forward and backward: what `HierarchicalRNN.param_level` computes.

#pragma once

#include "backward.h"
#include "segments.h"

namespace hrnn {

// Rows of parameters, features first. A null pointer stands for zeros.
template <class T> struct State {
    T *hidden, *average, *square;  // [H, P] [S, P] [SQUARES, P]
};

template <class T> struct Forward {
    const T* grad;                               // [P]
    State<const T> before;
    const T* above;                              // [ABOVE, T]
    State<T> after;
    T* pooled;                                   // [H + F, T]
    T* steps;                                    // [R, P]
    T* inverse_rms;                              // [R, T] ones where the rule does not scale directions
    bool scales;
};

template <class T> struct Backward {
    const T* grad;
    State<const T> before;
    const T* above;
    const T *steps, *inverse_rms;                // as made by the forward step
    bool scales;
    State<const T> to_after;                     // gradients that come in
    const T *to_pooled, *to_steps;
    T* to_grad;                                  // gradients that go out
    State<T> to_before;
    T* to_above;                                 // [3H + 1 + LONG, T] biases, relative rate, power of the long scale
    T* to_rule;                                  // [meta-parameters]
};

constexpr double RMS_FLOOR = 1e-20;

template <class T> HRNN_INLINE void copy_rows(T (*to)[TILE], const T* from, int rows, int64_t stride, int count) {
    for (int i = 0; i < rows; i++) {
        if (from && count == TILE) {
            for (int p = 0; p < TILE; p += WIDTH<T>) store<T>(&to[i][p], load<T>(from + i * stride + p));
        } else {
            if (from) std::memcpy(to[i], from + i * stride, count * sizeof(T));
            std::fill(to[i] + (from ? count : 0), to[i] + TILE, T(0));
        }
    }
}

template <class T> HRNN_INLINE void write_rows(T* to, const T (*from)[TILE], int rows, int64_t stride, int count) {
    for (int i = 0; i < rows; i++) {
        if (count == TILE)
            for (int p = 0; p < TILE; p += WIDTH<T>) store<T>(to + i * stride + p, load<T>(&from[i][p]));
        else
            std::memcpy(to + i * stride, from[i], count * sizeof(T));
    }
}

// What every tensor tells its parameters, side by side: biases of the gates, whether it remembers, decay and power of
// its long scale if it has one, the relative rate.
template <class T, int R>
std::vector<T> told_to_params(const Weights<T, R>& rule, const T* above, int64_t tensors) {
    std::vector<T> told(tensors * ABOVE);
    const T *rates = above + 3 * H * tensors, *rest = rates + tensors;
    for (int i = 0; i < 3 * H; i++)
        for (int64_t t = 0; t < tensors; t++)
            told[t * ABOVE + i] = rule.gate_bias(i, above[i * tensors + t], rates[t]);
    for (int64_t t = 0; t < tensors; t++) {
        for (int i = 0; i <= 2 * LONG; i++) told[t * ABOVE + 3 * H + i] = rest[i * tensors + t];
        told[t * ABOVE + ABOVE - 1] = rates[t];
    }
    return told;
}

// Fetch what a forward step of a tile needs. Lanes past the last parameter get zeros, of which the step makes finite
// numbers that nobody reads.
template <class T, int R> struct Scratch {
    Tile<T, R> tile;
    ManyTensors<T> above;
};

template <class T, int R>
HRNN_INLINE void fetch(
    Scratch<T, R>& to, const T* grad, State<const T> before, const std::vector<T>& told, const Offsets& offsets,
    int64_t begin, int count, int64_t& tensor) {
    const int64_t params = offsets.back();
    Tile<T, R>& tile = to.tile;
    copy_rows(&tile.grad, grad + begin, 1, params, count);
    copy_rows(tile.before, before.hidden + begin, H, params, count);
    copy_rows(tile.average_before, before.average + begin, S, params, count);
    copy_rows(tile.square_before, before.square + begin, SQUARES, params, count);
    each_segment(offsets, begin, begin + count, tensor, [&](int64_t t, int64_t from, int64_t stop) {
        const T* here = &told[t * ABOVE];
        for (int i = 0; i < ABOVE - 1; i++) spread<T>(to.above.rows[i], from - begin, stop - begin, here[i]);
        std::fill(tile.inputs[F - 1] + (from - begin), tile.inputs[F - 1] + (stop - begin), here[ABOVE - 1]);
    });
    for (int i = 0; count < TILE && i < ABOVE - 1; i++)
        std::fill(to.above.rows[i] + count, to.above.rows[i] + TILE, T(0));
}

template <class T, int R> void forward(const Weights<T, R>& rule, const Forward<T>& io, const Offsets& offsets) {
    const int64_t params = offsets.back(), tensors = offsets.size() - 1;
    TensorSums<T, Tile<T, R>::SUMMED> sums(offsets);
    const std::vector<T> told = told_to_params(rule, io.above, tensors);
    each_chunk<Scratch<T, R>>(chunks_of(params), [&](int64_t chunk, Scratch<T, R>& scratch) {
        Tile<T, R>& tile = scratch.tile;
        const int64_t end = std::min(params, (chunk + 1) * CHUNK);
        int64_t tensor = tensor_at(offsets, chunk * CHUNK);
        for (int64_t begin = chunk * CHUNK; begin < end; begin += TILE) {
            const int count = std::min<int64_t>(TILE, end - begin);
            int64_t first = tensor;
            fetch(scratch, io.grad, io.before, told, offsets, begin, count, tensor);
            const int ahead = int(std::min<int64_t>(TILE, end - begin - count));
            prefetch_rows(io.before.hidden + begin + count, H, params, ahead);
            prefetch_rows(io.before.average + begin + count, S, params, ahead);
            prefetch_rows(io.before.square + begin + count, SQUARES, params, ahead);
            NoTrace none;
            forward_tile(rule, scratch.above, tile, none);
            write_rows(io.after.hidden + begin, tile.hidden, H, params, count);
            write_rows(io.after.average + begin, tile.average, S, params, count);
            write_rows(io.after.square + begin, tile.square, SQUARES, params, count);
            each_segment(offsets, begin, begin + count, first, [&](int64_t t, int64_t from, int64_t to) {
                add_segment<T, Tile<T, R>::SUMMED>(
                    tile.hidden[0], TILE, from - begin, to - begin, sums.of(chunk, t));
            });
            for (int r = 0; r < R; r++)
                for (int p = 0; p < TILE; p += WIDTH<T>)
                    store<T>(&tile.directions[r][p], load<T>(&tile.directions[r][p]) * load<T>(&tile.factor[p]));
            write_rows(io.steps + begin, tile.directions, R, params, count);
        }
    });
    sums.finish();
    for (int64_t t = 0; t < tensors; t++) {
        const T share = T(1) / T(offsets[t + 1] - offsets[t]);
        for (int i = 0; i < H + F; i++) io.pooled[i * tensors + t] = sums[t][i] * share;
        for (int r = 0; r < R; r++)
            io.inverse_rms[r * tensors + t] =
                io.scales ? 1 / std::sqrt(sums[t][H + F + r] * share + T(RMS_FLOOR)) : T(1);
    }
    if (!io.scales) return;
    each_chunk(chunks_of(params), [&](int64_t chunk, Nothing&) {
        int64_t tensor = tensor_at(offsets, chunk * CHUNK);
        const int64_t end = std::min(params, (chunk + 1) * CHUNK);
        each_segment(offsets, chunk * CHUNK, end, tensor, [&](int64_t t, int64_t from, int64_t to) {
            for (int r = 0; r < R; r++) {
                const T scale = io.inverse_rms[r * tensors + t];
                for (int64_t p = from; p < to; p++) io.steps[r * params + p] *= scale;
            }
        });
    });
}

// Sum the products of steps with the gradients they receive, over every tensor.
template <class T, int R>
void add_step_products(const Backward<T>& io, const Offsets& offsets, TensorSums<T, R>& sums) {
    const int64_t params = offsets.back();
    each_chunk(chunks_of(params), [&](int64_t chunk, Nothing&) {
        int64_t tensor = tensor_at(offsets, chunk * CHUNK);
        const int64_t end = std::min(params, (chunk + 1) * CHUNK);
        each_segment(offsets, chunk * CHUNK, end, tensor, [&](int64_t t, int64_t from, int64_t to) {
            for (int r = 0; r < R; r++) {
                const T *steps = io.steps + r * params, *grads = io.to_steps + r * params;
                Lanes<T> sum{};
                int64_t p = from;
                for (; p + WIDTH<T> <= to; p += WIDTH<T>) sum += load<T>(steps + p) * load<T>(grads + p);
                T rest = sum_lanes<T>(sum);
                for (; p < to; p++) rest += steps[p] * grads[p];
                sums.of(chunk, t)[r] += rest;
            }
        });
    });
    sums.finish();
}

// Fetch the gradients that come into a tile.
template <class T, int R>
HRNN_INLINE void fetch_gradients(
    TileGrad<T, R>& grad, const Backward<T>& io, const TensorSums<T, R>& products, const Offsets& offsets,
    int64_t begin, int count, int64_t& tensor) {
    const int64_t params = offsets.back(), tensors = offsets.size() - 1;
    const auto from = [&](const T* rows) { return rows ? rows + begin : nullptr; };
    copy_rows(grad.hidden, from(io.to_after.hidden), H, params, count);
    copy_rows(grad.average, from(io.to_after.average), S, params, count);
    copy_rows(grad.square, from(io.to_after.square), SQUARES, params, count);
    copy_rows(grad.steps, from(io.to_steps), R, params, count);
    copy_rows(grad.steps_made, from(io.steps), R, params, count);
    each_segment(offsets, begin, begin + count, tensor, [&](int64_t t, int64_t segment, int64_t stop) {
        const int here = segment - begin, end = stop - begin;
        const T share = T(1) / T(offsets[t + 1] - offsets[t]);
        for (int i = 0; i < H + F; i++)
            spread<T>(grad.above[i], here, end, io.to_pooled ? io.to_pooled[i * tensors + t] * share : T(0));
        for (int r = 0; r < R; r++) {
            const T inverse = io.inverse_rms[r * tensors + t];
            spread<T>(grad.above[H + F + r], here, end, inverse);
            spread<T>(grad.above[H + F + R + r], here, end, -inverse * inverse * products[t][r] * share);
        }
    });
    for (int i = 0; count < TILE && i < TileGrad<T, R>::ABOVE_GRAD; i++)
        std::fill(grad.above[i] + count, grad.above[i] + TILE, T(0));
}

template <class T, int R> struct BackwardScratch {
    Scratch<T, R> forward;
    Trace<T, R> trace;
    TileGrad<T, R> grad;
    Lanes<T> sums[Packed<R>::SIZE];
};

template <class T, int R> void backward(const Weights<T, R>& rule, const Backward<T>& io, const Offsets& offsets) {
    using At = Packed<R>;
    constexpr int SUMMED = TileGrad<T, R>::SUMMED;
    const int64_t params = offsets.back(), tensors = offsets.size() - 1, chunks = chunks_of(params);
    TensorSums<T, R> products(offsets);
    if (io.to_steps && io.scales) add_step_products<T, R>(io, offsets, products);
    TensorSums<T, SUMMED> sums(offsets);
    std::vector<T> to_rule(chunks * At::SIZE);
    const std::vector<T> told = told_to_params(rule, io.above, tensors);
    const Transposed<T, R> transposed(rule.flat);
    each_chunk<BackwardScratch<T, R>>(chunks, [&](int64_t chunk, BackwardScratch<T, R>& scratch) {
        auto& [forward, trace, grad, rule_sums] = scratch;
        const Tile<T, R>& tile = forward.tile;
        std::fill(rule_sums, rule_sums + At::SIZE, Lanes<T>{});
        const int64_t end = std::min(params, (chunk + 1) * CHUNK);
        int64_t tensor = tensor_at(offsets, chunk * CHUNK);
        for (int64_t begin = chunk * CHUNK; begin < end; begin += TILE) {
            const int count = std::min<int64_t>(TILE, end - begin);
            int64_t first = tensor, same = tensor;
            fetch(forward, io.grad, io.before, told, offsets, begin, count, tensor);
            fetch_gradients(grad, io, products, offsets, begin, count, first);
            forward_tile(rule, forward.above, forward.tile, trace);
            backward_tile(rule, transposed, forward.above, tile, trace, grad, rule_sums);
            if (io.to_grad) write_rows(io.to_grad + begin, &grad.grad, 1, params, count);
            write_rows(io.to_before.hidden + begin, grad.before, H, params, count);
            write_rows(io.to_before.average + begin, grad.average_before, S, params, count);
            write_rows(io.to_before.square + begin, grad.square_before, SQUARES, params, count);
            each_segment(offsets, begin, begin + count, same, [&](int64_t t, int64_t from, int64_t to) {
                add_segment<T, SUMMED>(grad.gates[0], TILE, from - begin, to - begin, sums.of(chunk, t));
            });
        }
        for (int i = 0; i < At::SIZE; i++) to_rule[chunk * At::SIZE + i] = sum_lanes<T>(rule_sums[i]);
    });
    sums.finish();
    std::fill(io.to_rule, io.to_rule + At::SIZE, T(0));
    for (int64_t chunk = 0; chunk < chunks; chunk++)
        for (int i = 0; i < At::SIZE; i++) io.to_rule[i] += to_rule[chunk * At::SIZE + i];
    finish_rule<T, R>(io.to_rule);
    for (int64_t t = 0; t < tensors; t++) {  // what every parameter of a tensor was told in the same words
        T to_rate = io.to_pooled ? io.to_pooled[(H + F - 1) * tensors + t] : T(0);
        for (int i = 0; i < 3 * H; i++) {
            const int at = At::GATE + i * INPUT + F - 1;
            io.to_above[i * tensors + t] = sums[t][i];
            io.to_rule[At::GATE_BIAS + i] += sums[t][i];
            io.to_rule[at] += sums[t][i] * io.above[3 * H * tensors + t];
            to_rate += sums[t][i] * rule.flat[at];
        }
        io.to_above[3 * H * tensors + t] = to_rate;
        if constexpr (LONG) io.to_above[(3 * H + 1) * tensors + t] = sums[t][3 * H];
    }
}

}  // namespace hrnn
