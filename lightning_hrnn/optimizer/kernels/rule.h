// The param level of the default rule, a tile of parameters at a time, forward and backward.
//
// A tile is a structure of arrays: one row of TILE parameters for every quantity, small enough to stay in cache. All
// loops over rows have constant bounds, set when the file is compiled: H hidden units, S timescales, R readouts. The
// equations are those of `HierarchicalRNN.param_step` and of `features.py`, in the same order.

#pragma once

#include "lanes.h"

namespace hrnn {

constexpr int H = HRNN_HIDDEN, S = HRNN_TIMESCALES;
constexpr int F = 3 * S;      // scaled gradients, products of neighbours, relative magnitudes, relative rate
constexpr int INPUT = F + H;  // of a gate
constexpr int TILE = 128;     // parameters
constexpr int ABOVE = 3 * H + 2;  // rows of what a tensor tells its parameters: gate biases, relative rate, remembers
constexpr int AT_ONCE = VECTOR_REGISTERS == 32 ? 2 : 1;  // vectors that share a load of a weight
constexpr double SQUARE_FLOOR = 1e-18, MAX_DECAY_LOGIT = 9.2, GRAD_LIMIT = 1e15;

// Where each meta-parameter lies in the flat vector that cpp.py packs.
template <int R> struct Packed {
    static constexpr int GATE = 0;                                // [2H, F + H]
    static constexpr int CANDIDATE = GATE + 2 * H * INPUT;        // [H, F + H]
    static constexpr int DECAY = CANDIDATE + H * INPUT;           // [2, H]
    static constexpr int MOMENTARY = DECAY + 2 * H;               // [H]
    static constexpr int WEIGHT = MOMENTARY + H;                  // [R, S, H]
    static constexpr int GATE_BIAS = WEIGHT + R * S * H;          // [2H]
    static constexpr int CANDIDATE_BIAS = GATE_BIAS + 2 * H;      // [H]
    static constexpr int DECAY_BIAS = CANDIDATE_BIAS + H;         // [2]
    static constexpr int MOMENTARY_BIAS = DECAY_BIAS + 2;         // []
    static constexpr int SHORTCUT = MOMENTARY_BIAS + 1;           // [R, S]
    static constexpr int SIZE = SHORTCUT + R * S;
};

// Meta-parameters in the order in which the loops meet them.
template <class T, int R> struct Weights {
    using At = Packed<R>;
    T flat[At::SIZE];
    T gate_of_input[INPUT][2 * H], candidate_of_input[INPUT][H], weight_of_hidden[H][R * S];  // transposed
    T bound;

    Weights(const T* packed, T bound) : bound(bound) {
        std::memcpy(flat, packed, sizeof(flat));
        for (int j = 0; j < INPUT; j++) {
            for (int i = 0; i < 2 * H; i++) gate_of_input[j][i] = flat[At::GATE + i * INPUT + j];
            for (int i = 0; i < H; i++) candidate_of_input[j][i] = flat[At::CANDIDATE + i * INPUT + j];
        }
        for (int j = 0; j < H; j++)
            for (int i = 0; i < R * S; i++) weight_of_hidden[j][i] = flat[At::WEIGHT + i * H + j];
    }
};

// What a forward step needs and makes. Rows from `hidden` to `directions` are what is summed over tensors.
template <class T, int R> struct Tile {
    static constexpr int SUMMED = H + F + R;
    alignas(64) T above[ABOVE][TILE + WIDTH<T>];  // a tensor's values may be written past its end
    T grad[TILE], before[H][TILE], average_before[S][TILE], square_before[S][TILE];
    T hidden[H][TILE], inputs[F][TILE], direction_squares[R][TILE];
    T average[S][TILE], square[S][TILE];
    T reset[H][TILE], keep[H][TILE], candidate[H][TILE], reset_hidden[H][TILE];
    T directions[R][TILE], choice[R][S][TILE], factor[TILE], momentary[TILE];
    T decay[S][TILE], scale_decay[TILE], inverse_rms[S][TILE], ratio[S][TILE], slope[S][TILE];
    T padding[WIDTH<T>];
};

// Multiply rows by a matrix and hand each row of the product to `done(row, vector offset, value)`.
template <class T, int ROWS, int FIRST, int SECOND, int LEADING, class Start, class Done>
HRNN_INLINE void multiply_rows(
    const T* matrix, const T (*first)[TILE], const T (*second)[TILE], int at, Start start, Done done) {
    Lanes<T> sum[ROWS][AT_ONCE];
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 2
        for (int k = 0; k < AT_ONCE; k++) sum[i][k] = start(i, at + k * WIDTH<T>);
    for (int j = 0; j < FIRST; j++) {
#pragma GCC unroll 2
        for (int k = 0; k < AT_ONCE; k++) {
            const Lanes<T> x = load<T>(&first[j][at + k * WIDTH<T>]);
#pragma GCC unroll 16
            for (int i = 0; i < ROWS; i++) sum[i][k] += matrix[i * LEADING + j] * x;
        }
    }
    for (int j = 0; j < SECOND; j++) {
#pragma GCC unroll 2
        for (int k = 0; k < AT_ONCE; k++) {
            const Lanes<T> x = load<T>(&second[j][at + k * WIDTH<T>]);
#pragma GCC unroll 16
            for (int i = 0; i < ROWS; i++) sum[i][k] += matrix[i * LEADING + FIRST + j] * x;
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 2
        for (int k = 0; k < AT_ONCE; k++) done(i, at + k * WIDTH<T>, sum[i][k]);
}

// The same for any number of rows, in blocks whose sums fit the registers.
template <class T, int ROWS, int FIRST, int SECOND, int LEADING, class Start, class Done>
HRNN_INLINE void multiply(
    const T* matrix, const T (*first)[TILE], const T (*second)[TILE], int at, Start start, Done done) {
    constexpr int BLOCK = ROWS < 10 ? ROWS : 10, REST = ROWS % BLOCK;
    for (int row = 0; row + BLOCK <= ROWS; row += BLOCK)
        multiply_rows<T, BLOCK, FIRST, SECOND, LEADING>(
            matrix + row * LEADING, first, second, at, [&](int i, int p) { return start(row + i, p); },
            [&](int i, int p, Lanes<T> value) { done(row + i, p, value); });
    if constexpr (REST > 0)
        multiply_rows<T, REST, FIRST, SECOND, LEADING>(
            matrix + (ROWS - REST) * LEADING, first, second, at,
            [&](int i, int p) { return start(ROWS - REST + i, p); },
            [&](int i, int p, Lanes<T> value) { done(ROWS - REST + i, p, value); });
}

template <class T> HRNN_INLINE Lanes<T> clip(Lanes<T> grad) {
    return at_least(T(-GRAD_LIMIT), at_most(T(GRAD_LIMIT), grad));
}

// Moving averages and the inputs of the GRU, of one vector of parameters.
template <class T, int R> HRNN_INLINE void step_features(const Weights<T, R>& rule, Tile<T, R>& tile, int p) {
    using V = Lanes<T>;
    using At = Packed<R>;
    V logit[2];
    for (int i = 0; i < 2; i++) {
        logit[i] = all<T>(rule.flat[At::DECAY_BIAS + i]);
#pragma GCC unroll 32
        for (int j = 0; j < H; j++) logit[i] += rule.flat[At::DECAY + i * H + j] * load<T>(&tile.before[j][p]);
    }
    const V remembers = load<T>(&tile.above[3 * H + 1][p]), grad = clip<T>(load<T>(&tile.grad[p]));
    V decay = sigmoid(at_most(T(MAX_DECAY_LOGIT), logit[0])) * remembers;
    const V scale_decay = sigmoid(at_most(T(MAX_DECAY_LOGIT), logit[1])) * remembers;
    store<T>(&tile.scale_decay[p], scale_decay);
    V scaled[S], log_square[S], mean{};
#pragma GCC unroll 8
    for (int s = 0; s < S; s++) {
        const V average = decay * load<T>(&tile.average_before[s][p]) + (1 - decay) * grad;
        const V square = scale_decay * load<T>(&tile.square_before[s][p]) +
                         (1 - scale_decay) * (average * average + T(SQUARE_FLOOR));
        const V inverse_rms = inverse_root(square);
        const V ratio = average * inverse_rms;
        const V stretched = 1 + ratio * ratio, slope = inverse_root(stretched);  // the derivative of asinh
        scaled[s] = arsinh(ratio, stretched * slope);
        log_square[s] = logarithm(square);
        mean += log_square[s];
        store<T>(&tile.average[s][p], average);
        store<T>(&tile.square[s][p], square);
        store<T>(&tile.decay[s][p], decay);
        store<T>(&tile.inverse_rms[s][p], inverse_rms);
        store<T>(&tile.ratio[s][p], ratio);
        store<T>(&tile.slope[s][p], slope);
        store<T>(&tile.inputs[s][p], scaled[s]);
        decay = root(decay);  // the next timescale is twice as long
    }
    mean *= T(1) / S;
#pragma GCC unroll 8
    for (int s = 0; s + 1 < S; s++) store<T>(&tile.inputs[S + s][p], scaled[s] * scaled[s + 1]);
#pragma GCC unroll 8
    for (int s = 0; s < S; s++) store<T>(&tile.inputs[2 * S - 1 + s][p], log_square[s] - mean);
    store<T>(&tile.inputs[F - 1][p], load<T>(&tile.above[3 * H][p]));
}

// The GRU, of AT_ONCE vectors of parameters.
template <class T, int R> HRNN_INLINE void step_hidden(const Weights<T, R>& rule, Tile<T, R>& tile, int at) {
    using V = Lanes<T>;
    using At = Packed<R>;
    const T* flat = rule.flat;
    multiply<T, H, F, H, INPUT>(
        flat + At::GATE, tile.inputs, tile.before, at,
        [&](int i, int p) { return flat[At::GATE_BIAS + i] + load<T>(&tile.above[i][p]); },
        [&](int i, int p, V value) {
            const V reset = sigmoid(value);
            store<T>(&tile.reset[i][p], reset);
            store<T>(&tile.reset_hidden[i][p], reset * load<T>(&tile.before[i][p]));
        });
    multiply<T, H, F, H, INPUT>(
        flat + At::GATE + H * INPUT, tile.inputs, tile.before, at,
        [&](int i, int p) { return flat[At::GATE_BIAS + H + i] + load<T>(&tile.above[H + i][p]); },
        [&](int i, int p, V value) { store<T>(&tile.keep[i][p], sigmoid(value)); });
    multiply<T, H, F, H, INPUT>(
        flat + At::CANDIDATE, tile.inputs, tile.reset_hidden, at,
        [&](int i, int p) { return flat[At::CANDIDATE_BIAS + i] + load<T>(&tile.above[2 * H + i][p]); },
        [&](int i, int p, V value) {
            const V candidate = tangent(value), keep = load<T>(&tile.keep[i][p]);
            store<T>(&tile.candidate[i][p], candidate);
            store<T>(&tile.hidden[i][p], keep * load<T>(&tile.before[i][p]) + (1 - keep) * candidate);
        });
}

// Directions and the momentary factor, of one vector of parameters.
template <class T, int R> HRNN_INLINE void read_out(const Weights<T, R>& rule, Tile<T, R>& tile, int p) {
    using V = Lanes<T>;
    using At = Packed<R>;
    V hidden[H];
#pragma GCC unroll 32
    for (int j = 0; j < H; j++) hidden[j] = load<T>(&tile.hidden[j][p]);
#pragma GCC unroll 2
    for (int r = 0; r < R; r++) {
        V direction{};
#pragma GCC unroll 8
        for (int s = 0; s < S; s++) {
            V choice = all<T>(rule.flat[At::SHORTCUT + r * S + s]);
#pragma GCC unroll 32
            for (int j = 0; j < H; j++) choice += rule.flat[At::WEIGHT + (r * S + s) * H + j] * hidden[j];
            store<T>(&tile.choice[r][s][p], choice);
            direction += choice * load<T>(&tile.inputs[s][p]);
        }
        store<T>(&tile.directions[r][p], direction);
        store<T>(&tile.direction_squares[r][p], direction * direction);
    }
    V raw = all<T>(rule.flat[At::MOMENTARY_BIAS]);
#pragma GCC unroll 32
    for (int j = 0; j < H; j++) raw += rule.flat[At::MOMENTARY + j] * hidden[j];
    const V momentary = tangent(raw * (1 / rule.bound));
    store<T>(&tile.momentary[p], momentary);
    store<T>(&tile.factor[p], exponential(rule.bound * momentary));
}

// Take the step of the first `count` parameters of a tile, rounded up to whole vectors.
template <class T, int R> void forward_tile(const Weights<T, R>& rule, Tile<T, R>& tile, int count = TILE) {
    for (int p = 0; p < count; p += WIDTH<T>) step_features(rule, tile, p);
    for (int p = 0; p < count; p += AT_ONCE * WIDTH<T>) step_hidden(rule, tile, p);
    for (int p = 0; p < count; p += WIDTH<T>) read_out(rule, tile, p);
}

// Gradients with respect to what a tile made (in) and to what it was made from (out).
template <class T, int R> struct TileGrad {
    static constexpr int ABOVE_GRAD = H + F + 2 * R;  // rows of what comes down from a tensor's means
    static constexpr int SUMMED = 3 * H + 1;
    alignas(64) T above[ABOVE_GRAD][TILE + WIDTH<T>];  // pooled; inverse RMS and pull to unit RMS, of each readout
    T hidden[H][TILE], average[S][TILE], square[S][TILE], steps[R][TILE], steps_made[R][TILE];  // in
    T gates[2 * H][TILE], candidate[H][TILE], relative_rate[TILE];  // out, summed over tensors
    T inputs[F][TILE], scaled[S][TILE];
    T choice[R * S][TILE], raw[1][TILE], logits[2][TILE];
    T hidden_now[H][TILE];
    T grad[TILE], before[H][TILE], average_before[S][TILE], square_before[S][TILE];  // out
    T padding[WIDTH<T>];
};

// From steps to the hidden state and the scaled gradients.
template <class T, int R>
HRNN_INLINE void read_out_backward(const Weights<T, R>& rule, const Tile<T, R>& tile, TileGrad<T, R>& grad, int p) {
    using V = Lanes<T>;
    using At = Packed<R>;
    V raw{}, choices[R * S], scaled[S]{};
    const V factor = load<T>(&tile.factor[p]), momentary = load<T>(&tile.momentary[p]);
#pragma GCC unroll 2
    for (int r = 0; r < R; r++) {
        const V step = load<T>(&grad.steps[r][p]);
        raw += step * load<T>(&grad.steps_made[r][p]);
        const V direction = step * factor * load<T>(&grad.above[H + F + r][p]) +
                            load<T>(&grad.above[H + F + R + r][p]) * load<T>(&tile.directions[r][p]);
#pragma GCC unroll 8
        for (int s = 0; s < S; s++) {
            choices[r * S + s] = direction * load<T>(&tile.inputs[s][p]);
            scaled[s] += direction * load<T>(&tile.choice[r][s][p]);
            store<T>(&grad.choice[r * S + s][p], choices[r * S + s]);
        }
    }
    raw *= 1 - momentary * momentary;
    store<T>(&grad.raw[0][p], raw);
#pragma GCC unroll 8
    for (int s = 0; s < S; s++) store<T>(&grad.scaled[s][p], scaled[s]);
#pragma GCC unroll 32
    for (int j = 0; j < H; j++) {
        V hidden = load<T>(&grad.hidden[j][p]) + load<T>(&grad.above[j][p]) + rule.flat[At::MOMENTARY + j] * raw;
#pragma GCC unroll 16
        for (int i = 0; i < R * S; i++) hidden += rule.weight_of_hidden[j][i] * choices[i];
        const V keep = load<T>(&tile.keep[j][p]), candidate = load<T>(&tile.candidate[j][p]);
        const V before = load<T>(&tile.before[j][p]);
        store<T>(&grad.hidden_now[j][p], hidden);
        store<T>(&grad.gates[H + j][p], hidden * (before - candidate) * keep * (1 - keep));
        store<T>(&grad.candidate[j][p], hidden * (1 - keep) * (1 - candidate * candidate));
    }
}

// From the gates to their inputs and the hidden state before.
template <class T, int R>
HRNN_INLINE void hidden_backward(const Weights<T, R>& rule, const Tile<T, R>& tile, TileGrad<T, R>& grad, int at) {
    using V = Lanes<T>;
    const T(*none)[TILE] = nullptr;
    multiply<T, H, H, 0, H>(
        rule.candidate_of_input[F], grad.candidate, none, at, [](int, int) { return V{}; },
        [&](int j, int p, V value) {
            const V reset = load<T>(&tile.reset[j][p]), keep = load<T>(&tile.keep[j][p]);
            store<T>(&grad.gates[j][p], value * load<T>(&tile.before[j][p]) * reset * (1 - reset));
            store<T>(&grad.before[j][p], value * reset + load<T>(&grad.hidden_now[j][p]) * keep);
        });
    multiply<T, H, 2 * H, 0, 2 * H>(
        rule.gate_of_input[F], grad.gates, none, at, [&](int j, int p) { return load<T>(&grad.before[j][p]); },
        [&](int j, int p, V value) { store<T>(&grad.before[j][p], value); });
    multiply<T, F, H, 0, H>(
        rule.candidate_of_input[0], grad.candidate, none, at,
        [&](int i, int p) { return load<T>(&grad.above[H + i][p]); },
        [&](int i, int p, V value) { store<T>(&grad.inputs[i][p], value); });
    multiply<T, F, 2 * H, 0, 2 * H>(
        rule.gate_of_input[0], grad.gates, none, at, [&](int i, int p) { return load<T>(&grad.inputs[i][p]); },
        [&](int i, int p, V value) { store<T>(&grad.inputs[i][p], value); });
}

// From the inputs of the GRU to gradient, averages and decays.
template <class T, int R>
HRNN_INLINE void features_backward(const Weights<T, R>& rule, const Tile<T, R>& tile, TileGrad<T, R>& grad, int p) {
    using V = Lanes<T>;
    using At = Packed<R>;
    V scaled[S], mean{};
#pragma GCC unroll 8
    for (int s = 0; s < S; s++) {
        scaled[s] = load<T>(&grad.inputs[s][p]) + load<T>(&grad.scaled[s][p]);
        mean += load<T>(&grad.inputs[2 * S - 1 + s][p]);
    }
    mean *= T(1) / S;
#pragma GCC unroll 8
    for (int s = 0; s + 1 < S; s++) {
        const V product = load<T>(&grad.inputs[S + s][p]);
        scaled[s] += product * load<T>(&tile.inputs[s + 1][p]);
        scaled[s + 1] += product * load<T>(&tile.inputs[s][p]);
    }
    const V unclipped = load<T>(&tile.grad[p]), gradient = clip<T>(unclipped);
    const V scale_decay = load<T>(&tile.scale_decay[p]);
    V to_grad{}, to_decay{}, to_scale_decay{};
#pragma GCC unroll 8
    for (int s = 0; s < S; s++) {
        const V inverse = load<T>(&tile.inverse_rms[s][p]), average = load<T>(&tile.average[s][p]);
        const V to_ratio = scaled[s] * load<T>(&tile.slope[s][p]);
        const V to_log = load<T>(&grad.inputs[2 * S - 1 + s][p]) - mean - T(0.5) * to_ratio * load<T>(&tile.ratio[s][p]);
        const V to_square = load<T>(&grad.square[s][p]) + to_log * inverse * inverse;
        const V to_average =
            load<T>(&grad.average[s][p]) + to_ratio * inverse + 2 * average * (1 - scale_decay) * to_square;
        const V square_before = load<T>(&tile.square_before[s][p]), before = load<T>(&tile.average_before[s][p]);
        const V decay = load<T>(&tile.decay[s][p]);
        to_scale_decay += to_square * (square_before - average * average - T(SQUARE_FLOOR));
        to_decay += to_average * (before - gradient) * decay * (T(1) / (1 << s));
        to_grad += to_average * (1 - decay);
        store<T>(&grad.square_before[s][p], to_square * scale_decay);
        store<T>(&grad.average_before[s][p], to_average * decay);
    }
    store<T>(&grad.grad[p], magnitude(unclipped) > T(GRAD_LIMIT) ? V{} : to_grad);
    store<T>(&grad.relative_rate[p], load<T>(&grad.inputs[F - 1][p]));
    // d decay_s / d logit = decay_s (1 - decay_0) / 2^s, nothing where the logit is cut off
    V logit[2] = {to_decay * (1 - load<T>(&tile.decay[0][p])), to_scale_decay * scale_decay * (1 - scale_decay)};
    for (int i = 0; i < 2; i++) {
        V value = all<T>(rule.flat[At::DECAY_BIAS + i]);
#pragma GCC unroll 32
        for (int j = 0; j < H; j++) value += rule.flat[At::DECAY + i * H + j] * load<T>(&tile.before[j][p]);
        logit[i] = value > T(MAX_DECAY_LOGIT) ? V{} : logit[i];
        store<T>(&grad.logits[i][p], logit[i]);
    }
#pragma GCC unroll 32
    for (int j = 0; j < H; j++) {
        V before = load<T>(&grad.before[j][p]);
        for (int i = 0; i < 2; i++) before += rule.flat[At::DECAY + i * H + j] * logit[i];
        store<T>(&grad.before[j][p], before);
    }
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

// `sums` are gradients of the packed meta-parameters, a vector of partial sums each; those of the gates' biases stay
// zero, because they are sums of what the bias from above receives.
template <class T, int R>
void backward_tile(const Weights<T, R>& rule, const Tile<T, R>& tile, TileGrad<T, R>& grad, Lanes<T>* sums) {
    using At = Packed<R>;
    for (int p = 0; p < TILE; p += WIDTH<T>) read_out_backward(rule, tile, grad, p);
    for (int p = 0; p < TILE; p += AT_ONCE * WIDTH<T>) hidden_backward(rule, tile, grad, p);
    for (int p = 0; p < TILE; p += WIDTH<T>) features_backward(rule, tile, grad, p);
    add_products<T, 2 * H, F>(grad.gates, tile.inputs, sums + At::GATE, INPUT);
    add_products<T, 2 * H, H>(grad.gates, tile.before, sums + At::GATE + F, INPUT);
    add_products<T, H, F>(grad.candidate, tile.inputs, sums + At::CANDIDATE, INPUT);
    add_products<T, H, H>(grad.candidate, tile.reset_hidden, sums + At::CANDIDATE + F, INPUT);
    add_products<T, 2, H>(grad.logits, tile.before, sums + At::DECAY, H);
    add_products<T, 1, H>(grad.raw, tile.hidden, sums + At::MOMENTARY, H);
    add_products<T, R * S, H>(grad.choice, tile.hidden, sums + At::WEIGHT, H);
    add_rows<T>(grad.logits, 2, sums + At::DECAY_BIAS);
    add_rows<T>(grad.raw, 1, sums + At::MOMENTARY_BIAS);
    add_rows<T>(grad.choice, R * S, sums + At::SHORTCUT);
}

}  // namespace hrnn
