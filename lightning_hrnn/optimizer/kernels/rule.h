// The param level of the default rule, a tile of parameters at a time: the way forward. backward.h has the way back.
//
// A tile is a structure of arrays: one row of TILE parameters for every quantity, small enough to stay in cache. All
// loops over rows have constant bounds, set when the file is compiled: H hidden units, S timescales, R readouts. The
// equations are those of `HierarchicalRNN.param_step` and of `features.py`, in the same order.

#pragma once

#include "lanes.h"

namespace hrnn {

constexpr int H = HRNN_HIDDEN, S = HRNN_TIMESCALES;
constexpr int SQUARES = HRNN_SQUARES, LONG = SQUARES - S;  // 1 if the first average of squares is averaged for long
constexpr int F = 3 * S;      // scaled gradients, products of neighbours, relative magnitudes, relative rate
constexpr int INPUT = F + H;  // of a gate
constexpr int LOGS = 2 * S - 1, INNER = F - 2;  // the first relative magnitude, the last one
constexpr int TILE = 64;  // parameters
// Rows of what a tensor tells its parameters: gate biases, relative rate, whether it remembers, decay and power of
// `LongScale` if there is a long average.
constexpr int ABOVE = 3 * H + 2 + 2 * LONG;
constexpr int AT_ONCE = VECTOR_REGISTERS == 32 ? 2 : 1;  // vectors of a pack, which share every load of a weight
template <class T> constexpr int PACK = AT_ONCE * WIDTH<T>;  // parameters
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
//
// Two inputs of the GRU need no row of their own on the way forward. The relative rate is one number a tensor, and goes
// into the bias. The relative magnitudes add up to zero, so the last one's weights go to the others, negative.
template <class T, int R> struct Weights {
    using At = Packed<R>;
    static constexpr int JOINED = INNER + H;  // columns of `gates`
    T flat[At::SIZE];
    T gates[3 * H][JOINED];  // reset, keep, candidate; times their factors in `gate_factor`
    T rate[3 * H], bias[3 * H];
    T readouts[R * S + 1][H], readout_bias[R * S + 1];  // choices, then the momentary factor
    T bound;

    // A gate is made from powers: sigmoid(x) = 1 / (1 + e^-x), tanh(x) = 2 sigmoid(2 x) - 1.
    static constexpr T gate_factor(int row) { return row < 2 * H ? -NATURAL<T> : -2 * NATURAL<T>; }

    Weights(const T* packed, T bound) : bound(bound) {
        std::memcpy(flat, packed, sizeof(flat));
        for (int i = 0; i < 3 * H; i++) {
            const T *row = flat + At::GATE + i * INPUT, factor = gate_factor(i);  // candidates' rows come after gates'
            for (int j = 0; j < INNER; j++) gates[i][j] = factor * (j < LOGS ? row[j] : row[j] - row[INNER]);
            for (int j = 0; j < H; j++) gates[i][INNER + j] = factor * row[F + j];
            rate[i] = factor * row[F - 1];
            bias[i] = factor * flat[At::GATE_BIAS + i];
        }
        for (int i = 0; i <= R * S; i++) {
            for (int j = 0; j < H; j++) readouts[i][j] = flat[(i < R * S ? At::WEIGHT + i * H : At::MOMENTARY) + j];
            readout_bias[i] = flat[i < R * S ? At::SHORTCUT + i : At::MOMENTARY_BIAS];
        }
    }

    // What a tensor adds to row `i` of the gates of its parameters.
    T gate_bias(int i, T from_above, T relative_rate) const {
        return gate_factor(i) * from_above + rate[i] * relative_rate + bias[i];
    }
};

// What a tensor tells its parameters, the same for a whole tile or a row for each quantity.
template <class T> struct OneTensor {
    T biases[3 * H], remembers, decay, power;

    HRNN_INLINE Pack<T, AT_ONCE> bias(int i, int) const { return all_of<T, AT_ONCE>(biases[i]); }
    HRNN_INLINE Pack<T, AT_ONCE> remembering(int) const { return all_of<T, AT_ONCE>(remembers); }
    HRNN_INLINE Pack<T, AT_ONCE> long_decay(int) const { return all_of<T, AT_ONCE>(decay); }
    HRNN_INLINE Pack<T, AT_ONCE> long_power(int) const { return all_of<T, AT_ONCE>(power); }
};
template <class T> struct ManyTensors {
    alignas(64) T rows[ABOVE - 1][TILE + WIDTH<T>];  // a tensor's values may be written past its end

    HRNN_INLINE Pack<T, AT_ONCE> bias(int i, int p) const { return load_pack<T, AT_ONCE>(&rows[i][p]); }
    HRNN_INLINE Pack<T, AT_ONCE> remembering(int p) const { return load_pack<T, AT_ONCE>(&rows[3 * H][p]); }
    HRNN_INLINE Pack<T, AT_ONCE> long_decay(int p) const { return load_pack<T, AT_ONCE>(&rows[3 * H + 1][p]); }
    HRNN_INLINE Pack<T, AT_ONCE> long_power(int p) const { return load_pack<T, AT_ONCE>(&rows[3 * H + 2][p]); }
};

// What a forward step needs and makes. Rows from `hidden` to `direction_squares` are what is summed over tensors.
template <class T, int R> struct Tile {
    static constexpr int SUMMED = H + F + R;
    alignas(64) T grad[TILE];
    T before[H][TILE], average_before[S][TILE], square_before[SQUARES][TILE];
    T hidden[H][TILE], inputs[F][TILE], direction_squares[R][TILE];
    T average[S][TILE], square[SQUARES][TILE];
    T reset[H][TILE], keep[H][TILE], candidate[H][TILE];  // what is left of them, without a trace, is half done
    T reset_hidden[H][TILE], directions[R][TILE], factor[TILE];
    T present_size[TILE];  // log of sqrt(v_0 / V); only where there is a long average
    T padding[WIDTH<T>];
};

// What the way back needs besides.
template <class T, int R> struct Trace {
    alignas(64) T choice[R * S][TILE], momentary[TILE];
    T decay[S][TILE], scale_decay[TILE], inverse_rms[S][TILE], ratio[S][TILE], slope[S][TILE];
    T long_scale[TILE];  // of directions
};
struct NoTrace {};
template <class Kept> constexpr bool TRACED = !std::is_same_v<Kept, NoTrace>;

// Multiply rows by a matrix and hand each row of the product to `done(row, value)`.
//
// A processor adds products at full speed here and has units to spare for other work: `beside(column)` is called
// between the columns.
constexpr auto NOTHING_BESIDE = [](int) {};

template <class T, int ROWS, int FIRST, int SECOND, int LEADING, class Start, class Done, class Beside>
HRNN_INLINE void multiply_rows(
    const T* matrix, const T (*first)[TILE], const T (*second)[TILE], int at, Start start, Done done, Beside beside) {
    using V = Pack<T, AT_ONCE>;
    V sum[ROWS];
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++) sum[i] = start(i);
    for (int j = 0; j < FIRST; j++) {
        const V x = load_pack<T, AT_ONCE>(&first[j][at]);
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; i++) sum[i] += matrix[i * LEADING + j] * x;
        beside(j);
    }
    for (int j = 0; j < SECOND; j++) {
        const V x = load_pack<T, AT_ONCE>(&second[j][at]);
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; i++) sum[i] += matrix[i * LEADING + FIRST + j] * x;
        beside(FIRST + j);
    }
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++) done(i, sum[i]);
}

constexpr int BLOCK = 10;  // rows whose sums fit the registers
template <int ROWS, int COLUMNS> constexpr int calls_beside = (ROWS + BLOCK - 1) / BLOCK * COLUMNS;

// The same for any number of rows, in blocks; `beside` is called with the numbers from 0 on.
template <class T, int ROWS, int FIRST, int SECOND, int LEADING, class Start, class Done, class Beside>
HRNN_INLINE void multiply(
    const T* matrix, const T (*first)[TILE], const T (*second)[TILE], int at, Start start, Done done, Beside beside) {
    using V = Pack<T, AT_ONCE>;
    constexpr int REST = ROWS % BLOCK, COLUMNS = FIRST + SECOND;
    for (int row = 0; row + BLOCK <= ROWS; row += BLOCK)
        multiply_rows<T, BLOCK, FIRST, SECOND, LEADING>(
            matrix + row * LEADING, first, second, at, [&](int i) { return start(row + i); },
            [&](int i, V value) { done(row + i, value); }, [&](int j) { beside(row / BLOCK * COLUMNS + j); });
    if constexpr (REST > 0)
        multiply_rows<T, REST, FIRST, SECOND, LEADING>(
            matrix + (ROWS - REST) * LEADING, first, second, at, [&](int i) { return start(ROWS - REST + i); },
            [&](int i, V value) { done(ROWS - REST + i, value); },
            [&](int j) { beside(ROWS / BLOCK * COLUMNS + j); });
}

template <class T> HRNN_INLINE auto clip(auto grad) { return at_least(T(-GRAD_LIMIT), at_most(T(GRAD_LIMIT), grad)); }

// Moving averages and the inputs of the GRU, of one pack of parameters.
template <class T, int R, class Above, class Kept>
HRNN_INLINE void step_features(const Weights<T, R>& rule, const Above& above, Tile<T, R>& tile, Kept& trace, int p) {
    using V = Pack<T, AT_ONCE>;
    using At = Packed<R>;
    const auto read = [p](const T* row) { return load_pack<T, AT_ONCE>(row + p); };
    V logit[2];
    multiply_rows<T, 2, H, 0, H>(
        rule.flat + At::DECAY, tile.before, tile.before, p,
        [&](int i) { return all_of<T, AT_ONCE>(rule.flat[At::DECAY_BIAS + i]); },
        [&](int i, V value) { logit[i] = at_most(T(MAX_DECAY_LOGIT), value); }, NOTHING_BESIDE);
    const V remembers = above.remembering(p), grad = clip<T>(read(tile.grad));
    V decay = sigmoid(logit[0]) * remembers;
    const V scale_decay = sigmoid(logit[1]) * remembers;
    if constexpr (TRACED<Kept>) store(trace.scale_decay + p, scale_decay);
    V scaled[S], log_square[S], mean;
#pragma GCC unroll 8
    for (int s = 0; s < S; s++) {
        const V average = decay * read(tile.average_before[s]) + (1 - decay) * grad;
        const V square = scale_decay * read(tile.square_before[s]) +
                         (1 - scale_decay) * (average * average + T(SQUARE_FLOOR));
        const V inverse_rms = inverse_root(square);
        const V ratio = average * inverse_rms;
        const V stretched = 1 + ratio * ratio, slope = inverse_root(stretched);  // the derivative of asinh
        scaled[s] = arsinh(ratio, stretched * slope);
        log_square[s] = logarithm(square);
        mean = s ? mean + log_square[s] : log_square[s];
        store(tile.average[s] + p, average);
        store(tile.square[s] + p, square);
        store(tile.inputs[s] + p, scaled[s]);
        if constexpr (TRACED<Kept>) {
            store(trace.decay[s] + p, decay);
            store(trace.inverse_rms[s] + p, inverse_rms);
            store(trace.ratio[s] + p, ratio);
            store(trace.slope[s] + p, slope);
        }
        decay = root(decay);  // the next timescale is twice as long
    }
    if constexpr (LONG) {
        const V kept = above.long_decay(p);
        const V square = kept * read(tile.square_before[S]) + (1 - kept) * read(tile.square[0]);
        store(tile.square[S] + p, square);
        store(tile.present_size + p, T(0.5) * (log_square[0] - logarithm(square)));
    }
    mean = mean * (T(1) / S);
#pragma GCC unroll 8
    for (int s = 0; s + 1 < S; s++) store(tile.inputs[S + s] + p, scaled[s] * scaled[s + 1]);
#pragma GCC unroll 8
    for (int s = 0; s < S; s++) store(tile.inputs[LOGS + s] + p, log_square[s] - mean);
}

// The GRU. What follows a product goes on beside the next one, the last step of a pack beside the next pack's first.
//
// With a = e^-x of the keep gate and b = e^-2y of the candidate, keep = 1 / (1 + a), candidate = (1 - b) / (1 + b), and
// keep * before + (1 - keep) * candidate has the one denominator (1 + a) (1 + b).
template <class T, int R, class Above, class Kept>
HRNN_INLINE void step_hidden(const Weights<T, R>& rule, const Above& above, Tile<T, R>& tile, Kept& trace, int count) {
    using V = Pack<T, 1>;
    constexpr int LEADING = Weights<T, R>::JOINED;
    const auto read = [](const T* row) { return load_pack<T, 1>(row); };
    const auto finish_reset = [&](int i, int p) {
        const V reset = inverse(1 + bounded_power(read(&tile.reset[i][p])));
        store(&tile.reset_hidden[i][p], reset * read(&tile.before[i][p]));
        if constexpr (TRACED<Kept>) store(&tile.reset[i][p], reset);
    };
    const auto finish_keep = [&](int i, int p) {
        store(&tile.keep[i][p], bounded_power(read(&tile.keep[i][p])));
    };
    const auto finish_hidden = [&](int i, int p) {
        const V a = read(&tile.keep[i][p]), b = bounded_power(read(&tile.candidate[i][p]));
        const V one_and_a = 1 + a, one_and_b = 1 + b, rest = 1 - b, share = inverse(one_and_a * one_and_b);
        store(&tile.hidden[i][p], (one_and_b * read(&tile.before[i][p]) + a * rest) * share);
        if constexpr (TRACED<Kept>) {
            store(&tile.keep[i][p], one_and_b * share);
            store(&tile.candidate[i][p], rest * one_and_a * share);
        }
    };
    // Multiply the rows of one gate, of the pack at `p`, and beside it `finish` every vector of another pack.
    const auto gate = [&](int first, const T (*second)[TILE], T (*to)[TILE], int p, auto finish, int other) {
        constexpr int VECTORS = H * AT_ONCE, COLUMNS = calls_beside<H, INNER + H>;
        constexpr int EACH = (VECTORS + COLUMNS - 1) / COLUMNS;
        multiply<T, H, INNER, H, LEADING>(
            rule.gates[first], tile.inputs, second, p, [&](int i) { return above.bias(first + i, p); },
            [&](int i, auto value) { store(&to[i][p], value); },
            [&](int call) {
                if (other < 0) return;
                for (int v = call * EACH; v < (call + 1) * EACH && v < VECTORS; v++)
                    finish(v / AT_ONCE, other + v % AT_ONCE * WIDTH<T>);
            });
    };
    int p = 0;
    for (; p < count; p += PACK<T>) {
        gate(0, tile.before, tile.reset, p, finish_hidden, p - PACK<T>);
        gate(H, tile.before, tile.keep, p, finish_reset, p);
        gate(2 * H, tile.reset_hidden, tile.candidate, p, finish_keep, p);
    }
    for (int i = 0; i < H; i++)
        for (int q = p - PACK<T>; q < p; q += WIDTH<T>) finish_hidden(i, q);
}

// Directions and the momentary factor, of one pack of parameters.
template <class T, int R, class Above, class Kept>
HRNN_INLINE void read_out(const Weights<T, R>& rule, const Above& above, Tile<T, R>& tile, Kept& trace, int p) {
    using V = Pack<T, AT_ONCE>;
    V read[R * S + 1];
    multiply<T, R * S + 1, H, 0, H>(
        rule.readouts[0], tile.hidden, tile.hidden, p,
        [&](int i) { return all_of<T, AT_ONCE>(rule.readout_bias[i]); }, [&](int i, V value) { read[i] = value; },
        NOTHING_BESIDE);
    [[maybe_unused]] V long_scale;
    if constexpr (LONG) {
        long_scale = power(NATURAL<T> * above.long_power(p) * load_pack<T, AT_ONCE>(tile.present_size + p));
        if constexpr (TRACED<Kept>) store(trace.long_scale + p, long_scale);
    }
#pragma GCC unroll 2
    for (int r = 0; r < R; r++) {
        V direction = read[r * S] * load_pack<T, AT_ONCE>(tile.inputs[0] + p);
#pragma GCC unroll 8
        for (int s = 1; s < S; s++) direction += read[r * S + s] * load_pack<T, AT_ONCE>(tile.inputs[s] + p);
        if constexpr (LONG) direction = direction * long_scale;
        store(tile.directions[r] + p, direction);
        store(tile.direction_squares[r] + p, direction * direction);
    }
    const V momentary = tangent(read[R * S] * (1 / rule.bound));
    constexpr T MOST = 87 * NATURAL<T>;
    store(tile.factor + p, power(at_least(-MOST, at_most(MOST, (NATURAL<T> * rule.bound) * momentary))));
    if constexpr (TRACED<Kept>) {
        store(trace.momentary + p, momentary);
#pragma GCC unroll 16
        for (int i = 0; i < R * S; i++) store(trace.choice[i] + p, read[i]);
    }
}

// Take the step of the first `count` parameters of a tile, rounded up to whole packs. The row of relative rates is left
// to the caller.
template <class T, int R, class Above, class Kept>
void forward_tile(
    const Weights<T, R>& rule, const Above& above, Tile<T, R>& tile, Kept& trace, int count = TILE) {
    for (int p = 0; p < count; p += PACK<T>) step_features(rule, above, tile, trace, p);
    step_hidden(rule, above, tile, trace, count);
    for (int p = 0; p < count; p += PACK<T>) read_out(rule, above, tile, trace, p);
}

}  // namespace hrnn
