// The way back through a tile: gradients with respect to states, meta-parameters and what the levels above say.

#pragma once

#include "rule.h"

namespace hrnn {

// Meta-parameters as the way back meets them: by input.
template <class T, int R> struct Transposed {
    using At = Packed<R>;
    T inner[INNER][3 * H];  // as in `Weights::gates`, without the factors
    T before[H][2 * H], reset_hidden[H][H], readouts[H][R * S + 1];

    Transposed(const T* flat) {
        for (int i = 0; i < 3 * H; i++) {
            const T* row = flat + At::GATE + i * INPUT;
            for (int j = 0; j < INNER; j++) inner[j][i] = j < LOGS ? row[j] : row[j] - row[INNER];
            for (int j = 0; j < H; j++) (i < 2 * H ? before[j][i] : reset_hidden[j][i - 2 * H]) = row[F + j];
        }
        for (int j = 0; j < H; j++) {
            for (int i = 0; i < R * S; i++) readouts[j][i] = flat[At::WEIGHT + i * H + j];
            readouts[j][R * S] = flat[At::MOMENTARY + j];
        }
    }
};

// Gradients with respect to what a tile made (in) and to what it was made from (out).
template <class T, int R> struct TileGrad {
    static constexpr int ABOVE_GRAD = H + F + 2 * R;  // rows of what comes down from a tensor's means
    static constexpr int SUMMED = 3 * H + LONG;
    alignas(64) T above[ABOVE_GRAD][TILE + WIDTH<T>];  // pooled; inverse RMS and pull to unit RMS, of each readout
    T hidden[H][TILE], average[S][TILE], square[SQUARES][TILE], steps[R][TILE], steps_made[R][TILE];  // in
    T gates[SUMMED][TILE];  // out, summed over tensors; the last row is the power of the long scale, if there is one
    T present_size[TILE];
    T inputs[INNER][TILE], scaled[S][TILE];
    T choice[R * S + 1][TILE], logits[2][TILE];  // the last choice is the momentary factor's
    T hidden_now[H][TILE];
    T grad[TILE], before[H][TILE], average_before[S][TILE], square_before[SQUARES][TILE];  // out
    T padding[WIDTH<T>];
};

// From steps to the hidden state, the gates, the scaled gradients and the long scale.
template <class T, int R, class Above>
HRNN_INLINE void read_out_backward(
    const Transposed<T, R>& rule, const Above& above, const Tile<T, R>& tile, const Trace<T, R>& trace,
    TileGrad<T, R>& grad, int p) {
    using V = Pack<T, AT_ONCE>;
    const auto read = [p](const T* row) { return load_pack<T, AT_ONCE>(row + p); };
    V raw, scaled[S];
    [[maybe_unused]] V to_log_scale;
    const V factor = read(tile.factor), momentary = read(trace.momentary);
#pragma GCC unroll 2
    for (int r = 0; r < R; r++) {
        const V step = read(grad.steps[r]), moved = step * read(grad.steps_made[r]);
        raw = r ? raw + moved : moved;
        V direction =
            step * factor * read(grad.above[H + F + r]) + read(grad.above[H + F + R + r]) * read(tile.directions[r]);
        if constexpr (LONG) {
            const V turned = direction * read(tile.directions[r]);
            to_log_scale = r ? to_log_scale + turned : turned;
            direction = direction * read(trace.long_scale);
        }
#pragma GCC unroll 8
        for (int s = 0; s < S; s++) {
            const V through = direction * read(trace.choice[r * S + s]);
            scaled[s] = r ? scaled[s] + through : through;
            store(grad.choice[r * S + s] + p, direction * read(tile.inputs[s]));
        }
    }
    store(grad.choice[R * S] + p, raw * (1 - momentary * momentary));
    if constexpr (LONG) {
        store(grad.gates[3 * H] + p, to_log_scale * read(tile.present_size));
        store(grad.present_size + p, to_log_scale * above.long_power(p));
    }
#pragma GCC unroll 8
    for (int s = 0; s < S; s++) store(grad.scaled[s] + p, scaled[s]);
    multiply<T, H, R * S + 1, 0, R * S + 1>(
        rule.readouts[0], grad.choice, grad.choice, p,
        [&](int j) { return read(grad.hidden[j]) + read(grad.above[j]); },
        [&](int j, V hidden) {
            const V keep = read(tile.keep[j]), candidate = read(tile.candidate[j]);
            const V passed = hidden * keep, made = hidden - passed;
            store(grad.hidden_now[j] + p, passed);
            store(grad.gates[H + j] + p, (read(tile.before[j]) - candidate) * (passed - passed * keep));
            store(grad.gates[2 * H + j] + p, made - made * (candidate * candidate));
        },
        NOTHING_BESIDE);
}

// From the gates to their inputs and the hidden state before.
template <class T, int R>
HRNN_INLINE void hidden_backward(const Transposed<T, R>& rule, const Tile<T, R>& tile, TileGrad<T, R>& grad, int p) {
    using V = Pack<T, AT_ONCE>;
    const auto read = [p](const T* row) { return load_pack<T, AT_ONCE>(row + p); };
    multiply<T, H, H, 0, H>(
        rule.reset_hidden[0], grad.gates + 2 * H, grad.gates, p, [](int) { return all_of<T, AT_ONCE>(0); },
        [&](int j, V value) {
            const V passed = value * read(tile.reset[j]);
            store(grad.gates[j] + p, read(tile.before[j]) * (passed - passed * read(tile.reset[j])));
            store(grad.before[j] + p, passed + read(grad.hidden_now[j]));
        },
        NOTHING_BESIDE);
    multiply<T, H, 2 * H, 0, 2 * H>(
        rule.before[0], grad.gates, grad.gates, p, [&](int j) { return read(grad.before[j]); },
        [&](int j, V value) { store(grad.before[j] + p, value); }, NOTHING_BESIDE);
    multiply<T, INNER, 3 * H, 0, 3 * H>(
        rule.inner[0], grad.gates, grad.gates, p,
        [&](int j) {
            const V from_mean = read(grad.above[H + j]);
            return j < LOGS ? from_mean : from_mean - read(grad.above[H + INNER]);
        },
        [&](int j, V value) { store(grad.inputs[j] + p, value); }, NOTHING_BESIDE);
}

// From the inputs of the GRU to gradient, averages and decays.
template <class T, int R, class Above>
HRNN_INLINE void features_backward(
    const Weights<T, R>& rule, const Above& above, const Tile<T, R>& tile, const Trace<T, R>& trace,
    TileGrad<T, R>& grad, int p) {
    using V = Pack<T, AT_ONCE>;
    using At = Packed<R>;
    const auto read = [p](const T* row) { return load_pack<T, AT_ONCE>(row + p); };
    V scaled[S], mean = read(grad.inputs[LOGS]);
#pragma GCC unroll 8
    for (int s = 0; s < S; s++) scaled[s] = read(grad.inputs[s]) + read(grad.scaled[s]);
#pragma GCC unroll 8
    for (int s = 1; s + 1 < S; s++) mean += read(grad.inputs[LOGS + s]);
    mean = mean * (T(1) / S);
#pragma GCC unroll 8
    for (int s = 0; s + 1 < S; s++) {
        const V product = read(grad.inputs[S + s]);
        scaled[s] += product * read(tile.inputs[s + 1]);
        scaled[s + 1] += product * read(tile.inputs[s]);
    }
    [[maybe_unused]] V from_long;  // to the first average of squares
    if constexpr (LONG) {
        const V decay = above.long_decay(p), half = T(0.5) * read(grad.present_size);
        const V to_long = read(grad.square[S]) - half * inverse(read(tile.square[S]));
        store(grad.square_before[S] + p, to_long * decay);
        from_long = to_long * (1 - decay) + half * inverse(read(tile.square[0]));
    }
    const V unclipped = read(tile.grad), gradient = clip<T>(unclipped), scale_decay = read(trace.scale_decay);
    V to_grad, to_decay, to_scale_decay;
#pragma GCC unroll 8
    for (int s = 0; s < S; s++) {
        const V inverse = read(trace.inverse_rms[s]), average = read(tile.average[s]);
        const V to_ratio = scaled[s] * read(trace.slope[s]);
        const V from_log = s + 1 < S ? read(grad.inputs[LOGS + s]) - mean : T(-1) * mean;  // nothing came to the last
        const V to_log = from_log - T(0.5) * to_ratio * read(trace.ratio[s]);
        V to_square = read(grad.square[s]) + to_log * inverse * inverse;
        if constexpr (LONG) to_square = s ? to_square : to_square + from_long;
        const V to_average = read(grad.average[s]) + to_ratio * inverse + 2 * average * (1 - scale_decay) * to_square;
        const V decay = read(trace.decay[s]);
        const V scale_part = to_square * (read(tile.square_before[s]) - average * average - T(SQUARE_FLOOR));
        const V decay_part = to_average * (read(tile.average_before[s]) - gradient) * decay * (T(1) / (1 << s));
        const V grad_part = to_average * (1 - decay);
        to_scale_decay = s ? to_scale_decay + scale_part : scale_part;
        to_decay = s ? to_decay + decay_part : decay_part;
        to_grad = s ? to_grad + grad_part : grad_part;
        store(grad.square_before[s] + p, to_square * scale_decay);
        store(grad.average_before[s] + p, to_average * decay);
    }
    const auto unless_beyond = [](T limit, V value, V x) {  // where a value is cut off, no gradient flows
        return each([limit](auto v, auto y) { return v > limit ? decltype(y){} : y; }, value, x);
    };
    const V inside = unless_beyond(T(GRAD_LIMIT), unclipped, to_grad);
    store(grad.grad + p, unless_beyond(T(GRAD_LIMIT), T(-1) * unclipped, inside));
    // d decay_s / d logit = decay_s (1 - decay_0) / 2^s
    const V logit[2] = {to_decay * (1 - read(trace.decay[0])), to_scale_decay * scale_decay * (1 - scale_decay)};
    V reached[2];
    multiply_rows<T, 2, H, 0, H>(
        rule.flat + At::DECAY, tile.before, tile.before, p,
        [&](int i) { return all_of<T, AT_ONCE>(rule.flat[At::DECAY_BIAS + i]); },
        [&](int i, V value) {
            reached[i] = unless_beyond(T(MAX_DECAY_LOGIT), value, logit[i]);
            store(grad.logits[i] + p, reached[i]);
        },
        NOTHING_BESIDE);
#pragma GCC unroll 32
    for (int j = 0; j < H; j++)
        store(
            grad.before[j] + p,
            read(grad.before[j]) + rule.flat[At::DECAY + j] * reached[0] + rule.flat[At::DECAY + H + j] * reached[1]);
}

// Add the products of every row of one matrix with every row of another, lane by lane: sums[a][b] += A[a] * B[b].
template <class T, int A, int B>
HRNN_INLINE void add_products_block(const T (*left)[TILE], const T (*right)[TILE], Lanes<T>* sums, int leading) {
    Lanes<T> sum[A][B];
#pragma GCC unroll 8
    for (int a = 0; a < A; a++)
#pragma GCC unroll 8
        for (int b = 0; b < B; b++) sum[a][b] = sums[a * leading + b];
    for (int p = 0; p < TILE; p += WIDTH<T>) {
        Lanes<T> x[B];
#pragma GCC unroll 8
        for (int b = 0; b < B; b++) x[b] = load<T>(&right[b][p]);
#pragma GCC unroll 8
        for (int a = 0; a < A; a++) {
            const Lanes<T> y = load<T>(&left[a][p]);
#pragma GCC unroll 8
            for (int b = 0; b < B; b++) sum[a][b] += y * x[b];
        }
    }
#pragma GCC unroll 8
    for (int a = 0; a < A; a++)
#pragma GCC unroll 8
        for (int b = 0; b < B; b++) sums[a * leading + b] = sum[a][b];
}

template <class T, int A, int B>
void add_products(const T (*left)[TILE], const T (*right)[TILE], Lanes<T>* sums, int leading) {
    constexpr int LEFT = VECTOR_REGISTERS == 32 ? 5 : 3, RIGHT = VECTOR_REGISTERS == 32 ? 4 : 3;
    constexpr int REST_A = A % LEFT, REST_B = B % RIGHT;
    for (int a = 0; a + LEFT <= A; a += LEFT) {
        for (int b = 0; b + RIGHT <= B; b += RIGHT)
            add_products_block<T, LEFT, RIGHT>(left + a, right + b, sums + a * leading + b, leading);
        if constexpr (REST_B > 0)
            add_products_block<T, LEFT, REST_B>(left + a, right + B - REST_B, sums + a * leading + B - REST_B, leading);
    }
    if constexpr (REST_A > 0) {
        const T(*last)[TILE] = left + A - REST_A;
        Lanes<T>* to = sums + (A - REST_A) * leading;
        for (int b = 0; b + RIGHT <= B; b += RIGHT)
            add_products_block<T, REST_A, RIGHT>(last, right + b, to + b, leading);
        if constexpr (REST_B > 0)
            add_products_block<T, REST_A, REST_B>(last, right + B - REST_B, to + B - REST_B, leading);
    }
}

template <class T> HRNN_INLINE void add_rows(const T (*rows)[TILE], int count, Lanes<T>* sums) {
    for (int i = 0; i < count; i++)
        for (int p = 0; p < TILE; p += WIDTH<T>) sums[i] += load<T>(&rows[i][p]);
}

// `sums` are gradients of the packed meta-parameters, a vector of partial sums each. Those that `finish_rule` makes from
// others stay zero.
template <class T, int R, class Above>
void backward_tile(
    const Weights<T, R>& rule, const Transposed<T, R>& transposed, const Above& above, const Tile<T, R>& tile,
    const Trace<T, R>& trace, TileGrad<T, R>& grad, Lanes<T>* sums) {
    using At = Packed<R>;
    for (int p = 0; p < TILE; p += PACK<T>) read_out_backward(transposed, above, tile, trace, grad, p);
    for (int p = 0; p < TILE; p += PACK<T>) hidden_backward(transposed, tile, grad, p);
    for (int p = 0; p < TILE; p += PACK<T>) features_backward(rule, above, tile, trace, grad, p);
    add_products<T, 3 * H, INNER>(grad.gates, tile.inputs, sums + At::GATE, INPUT);
    add_products<T, 2 * H, H>(grad.gates, tile.before, sums + At::GATE + F, INPUT);
    add_products<T, H, H>(grad.gates + 2 * H, tile.reset_hidden, sums + At::CANDIDATE + F, INPUT);
    add_products<T, 2, H>(grad.logits, tile.before, sums + At::DECAY, H);
    add_products<T, 1, H>(grad.choice + R * S, tile.hidden, sums + At::MOMENTARY, H);
    add_products<T, R * S, H>(grad.choice, tile.hidden, sums + At::WEIGHT, H);
    add_rows<T>(grad.logits, 2, sums + At::DECAY_BIAS);
    add_rows<T>(grad.choice + R * S, 1, sums + At::MOMENTARY_BIAS);
    add_rows<T>(grad.choice, R * S, sums + At::SHORTCUT);
}

// Gradients of the gates' weights on the last relative magnitude, which is the others' sum with its sign turned.
template <class T, int R> void finish_rule(T* to_rule) {
    for (int i = 0; i < 3 * H; i++) {
        T* row = to_rule + Packed<R>::GATE + i * INPUT;
        row[INNER] = 0;
        for (int j = LOGS; j < INNER; j++) row[INNER] -= row[j];
    }
}

}  // namespace hrnn
