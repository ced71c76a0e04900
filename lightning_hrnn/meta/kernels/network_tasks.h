// Losses of small networks and their gradients, of many instances of many task families at once.
//
// Examples lie side by side in lanes: a tile is a few vectors of them, and every quantity of a network is a run of rows
// of the tile, so that all but sums over examples is plain arithmetic on vectors. A network is a program, a list of
// operations from rows to rows, run forward and then backward into rows of gradients.

#pragma once

#include <limits>

#include "activations.h"
#include "segments.h"

namespace hrnn {

enum class Kind : int64_t { Affine, Activate, Normalise, Add, Embed };
enum class Score : int64_t { CrossEntropy, HalfSquare, Quadratic };

// `first` and `second` say where parameters begin in the first instance, or -1; of `Activate`, `first` is which; of `Add`,
// the rows added to those at `from`.
struct Operation {
    Kind kind;
    int64_t from, inputs, to, outputs, first, second;
};

template <class T> struct Task {
    int64_t instances, points, examples;  // of each instance: in the data, in the loss
    int64_t features;                     // numbers, or tokens, of an example
    bool tokens;
    Score score;
    int64_t outputs, at_outputs, rows;    // what the network makes, where, and all rows of the tile
    std::vector<Operation> operations;
    const void *inputs, *targets;         // [B, N, F], [B, N] or [B, N, C]; of a quadratic, matrix and vector
    const int64_t* picked;                // [B, n] or null for all
    int64_t first_model;
};

constexpr int64_t MOST_EXAMPLES = 128;  // of a tile
constexpr int MOST_ROWS = VECTOR_REGISTERS == 32 ? 8 : 4;

// Rows of activations and of their gradients, and what belongs to each lane.
template <class T> struct Rows {
    std::vector<Lanes<T>> storage;
    T *values, *grads;
    int64_t stride;           // lanes
    T weight[MOST_EXAMPLES];  // of an example in the loss
    int64_t place[MOST_EXAMPLES];
    double loss;

    T* at(int64_t row) { return values + row * stride; }
    T* grad(int64_t row) { return grads + row * stride; }
};

template <class T> struct Instance {
    const Task<T>& task;
    int64_t index;
    const T* params;
    T* grads;  // or null
};

// ------------------------------------------------------------------ products

// y[r] (+)= start[r] + sum_c matrix[r rs + c cs] x[c], of K vectors of lanes.
template <class T, int K, int ROWS, class Start>
HRNN_INLINE void product_block(
    const T* matrix, int64_t rs, int64_t cs, int64_t columns, const T* x, T* y, int64_t stride, Start start) {
    Pack<T, K> sum[ROWS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) sum[r] = start.template operator()<K>(r);
    for (int64_t c = 0; c < columns; c++) {
        const Pack<T, K> value = load_pack<T, K>(x + c * stride);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) sum[r] += matrix[r * rs + c * cs] * value;
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) store(y + r * stride, sum[r]);
}

template <class T, int K, class Start>
HRNN_INLINE void product_rows(
    const T* matrix, int64_t rs, int64_t cs, int64_t rows, int64_t columns, const T* x, T* y, int64_t stride,
    Start start) {
    int64_t row = 0;
    const auto block = [&](auto count) {
        constexpr int ROWS = decltype(count)::value;
        product_block<T, K, ROWS>(
            matrix + row * rs, rs, cs, columns, x, y + row * stride, stride,
            [&]<int N>(int r) { return start.template operator()<N>(row + r); });
        row += ROWS;
    };
    while (row + MOST_ROWS <= rows) block(std::integral_constant<int, MOST_ROWS>());
    if constexpr (MOST_ROWS > 4)
        if ((rows - row) & 4) block(std::integral_constant<int, 4>());
    if ((rows - row) & 2) block(std::integral_constant<int, 2>());
    if ((rows - row) & 1) block(std::integral_constant<int, 1>());
}

// Call visit<K>(lane) for all lanes of a tile, two vectors at a time.
template <class T, class Visit> HRNN_INLINE void each_pack(int64_t lanes, Visit visit) {
    int64_t p = 0;
    for (; p + 2 * WIDTH<T> <= lanes; p += 2 * WIDTH<T>) visit.template operator()<2>(p);
    if (p < lanes) visit.template operator()<1>(p);
}

// to[a B + b] += sum over lanes of left[a] right[b]. Rows are read up to three past the last.
template <class T>
void add_outer(const T* left, int64_t lefts, const T* right, int64_t rights, int64_t stride, T* to) {
    constexpr int B = 4, A = WIDTH<T> / B > 0 ? WIDTH<T> / B : 1, BLOCK = A * B / WIDTH<T>;
    for (int64_t a = 0; a < lefts; a += A)
        for (int64_t b = 0; b < rights; b += B) {
            Lanes<T> sum[A * B]{};
            for (int64_t p = 0; p < stride; p += WIDTH<T>) {
                Lanes<T> x[B];
#pragma GCC unroll 4
                for (int j = 0; j < B; j++) x[j] = load<T>(right + (b + j) * stride + p);
#pragma GCC unroll 4
                for (int i = 0; i < A; i++) {
                    const Lanes<T> y = load<T>(left + (a + i) * stride + p);
#pragma GCC unroll 4
                    for (int j = 0; j < B; j++) sum[i * B + j] += y * x[j];
                }
            }
            T parts[A * B];
#pragma GCC unroll 4
            for (int i = 0; i < BLOCK; i++) store<T>(parts + i * WIDTH<T>, sum_each<T>(sum + i * WIDTH<T>));
            const int here = std::min<int64_t>(A, lefts - a), there = std::min<int64_t>(B, rights - b);
            for (int i = 0; i < here; i++)
                for (int j = 0; j < there; j++) to[(a + i) * rights + b + j] += parts[i * B + j];
        }
}

template <class T> HRNN_INLINE T sum_row(const T* row, int64_t stride) {
    Lanes<T> sum = load<T>(row);
    for (int64_t p = WIDTH<T>; p < stride; p += WIDTH<T>) sum += load<T>(row + p);
    return sum_lanes<T>(sum);
}

// ------------------------------------------------------------------ operations

template <class T> void affine(const Operation& op, const Instance<T>& of, Rows<T>& rows) {
    const T* bias = op.second < 0 ? nullptr : of.params + op.second + of.index * op.outputs;
    const T* weight = of.params + op.first + of.index * op.inputs * op.outputs;
    each_pack<T>(rows.stride, [&]<int K>(int64_t p) {
        product_rows<T, K>(
            weight, 1, op.outputs, op.outputs, op.inputs, rows.at(op.from) + p, rows.at(op.to) + p, rows.stride,
            [&]<int N>(int64_t r) { return all_of<T, N>(bias ? bias[r] : T(0)); });
    });
}

template <class T> void affine_backward(const Operation& op, const Instance<T>& of, Rows<T>& rows, bool to_inputs) {
    const int64_t weights = op.first + of.index * op.inputs * op.outputs;
    const T* grad = rows.grad(op.to);
    add_outer<T>(rows.at(op.from), op.inputs, grad, op.outputs, rows.stride, of.grads + weights);
    if (op.second >= 0)
        for (int64_t o = 0; o < op.outputs; o++)
            of.grads[op.second + of.index * op.outputs + o] += sum_row(grad + o * rows.stride, rows.stride);
    if (!to_inputs) return;
    each_pack<T>(rows.stride, [&]<int K>(int64_t p) {
        T* to = rows.grad(op.from) + p;
        product_rows<T, K>(
            of.params + weights, op.outputs, 1, op.inputs, op.outputs, grad + p, to, rows.stride,
            [&]<int N>(int64_t r) { return load_pack<T, N>(to + r * rows.stride); });
    });
}

template <class T> void activate_rows(const Operation& op, Rows<T>& rows) {
    const T* from = rows.at(op.from);
    T* to = rows.at(op.to);
    with_activation(Activation(op.first), [&]<Activation KIND>() {
        each_pack<T>(op.inputs * rows.stride, [&]<int K>(int64_t p) {
            store(to + p, activate<KIND>(load_pack<T, K>(from + p)));
        });
    });
}

template <class T> void activate_backward(const Operation& op, Rows<T>& rows) {
    const T *from = rows.at(op.from), *made = rows.at(op.to), *grad = rows.grad(op.to);
    T* to = rows.grad(op.from);
    with_activation(Activation(op.first), [&]<Activation KIND>() {
        each_pack<T>(op.inputs * rows.stride, [&]<int K>(int64_t p) {
            const Pack<T, K> at = slope<KIND>(load_pack<T, K>(from + p), load_pack<T, K>(made + p));
            store(to + p, load_pack<T, K>(to + p) + load_pack<T, K>(grad + p) * at);
        });
    });
}

// Layer norm over the rows; two rows past the outputs keep the mean and the inverse deviation of each example.
constexpr double NORM_FLOOR = 1e-5;

template <class T> void normalise(const Operation& op, const Instance<T>& of, Rows<T>& rows) {
    const int64_t width = op.inputs, stride = rows.stride;
    const T *gain = of.params + op.first + of.index * width, *shift = of.params + op.second + of.index * width;
    each_pack<T>(stride, [&]<int K>(int64_t p) {
        const T* x = rows.at(op.from) + p;
        T* y = rows.at(op.to) + p;
        Pack<T, K> mean = all_of<T, K>(0), square = all_of<T, K>(0);
        for (int64_t j = 0; j < width; j++) mean += load_pack<T, K>(x + j * stride);
        mean = mean * (T(1) / T(width));
        for (int64_t j = 0; j < width; j++) {
            const Pack<T, K> off = load_pack<T, K>(x + j * stride) - mean;
            square += off * off;
        }
        const Pack<T, K> inverse = inverse_root(square * (T(1) / T(width)) + T(NORM_FLOOR));
        for (int64_t j = 0; j < width; j++)
            store(y + j * stride, (load_pack<T, K>(x + j * stride) - mean) * inverse * gain[j] + shift[j]);
        store(y + width * stride, mean);
        store(y + (width + 1) * stride, inverse);
    });
}

template <class T> void normalise_backward(const Operation& op, const Instance<T>& of, Rows<T>& rows) {
    const int64_t width = op.inputs, stride = rows.stride, gains = op.first + of.index * width;
    const T *x = rows.at(op.from), *grad = rows.grad(op.to), *mean = rows.at(op.to) + width * stride;
    const T *inverse = mean + stride, *gain = of.params + gains;
    T *unit = rows.at(op.to), *to = rows.grad(op.from);  // outputs are no longer needed
    each_pack<T>(stride, [&]<int K>(int64_t p) {
        const Pack<T, K> middle = load_pack<T, K>(mean + p), scale = load_pack<T, K>(inverse + p);
        Pack<T, K> pull = all_of<T, K>(0), along = all_of<T, K>(0);
        for (int64_t j = 0; j < width; j++) {
            const Pack<T, K> here = (load_pack<T, K>(x + j * stride + p) - middle) * scale;
            const Pack<T, K> passed = load_pack<T, K>(grad + j * stride + p) * gain[j];
            pull += passed;
            along += passed * here;
            store(unit + j * stride + p, here);
        }
        pull = pull * (T(1) / T(width));
        along = along * (T(1) / T(width));
        for (int64_t j = 0; j < width; j++) {
            const Pack<T, K> passed = load_pack<T, K>(grad + j * stride + p) * gain[j];
            const Pack<T, K> here = load_pack<T, K>(unit + j * stride + p);
            T* into = to + j * stride + p;
            store(into, load_pack<T, K>(into) + scale * (passed - pull - here * along));
        }
    });
    for (int64_t j = 0; j < width; j++) {
        Lanes<T> sum{};
        for (int64_t p = 0; p < stride; p += WIDTH<T>)
            sum += load<T>(grad + j * stride + p) * load<T>(unit + j * stride + p);
        of.grads[gains + j] += sum_lanes<T>(sum);
        of.grads[op.second + of.index * width + j] += sum_row(grad + j * stride, stride);
    }
}

template <class T> void add_rows(const Operation& op, Rows<T>& rows) {
    const T *a = rows.at(op.from), *b = rows.at(op.first);
    T* to = rows.at(op.to);
    for (int64_t p = 0; p < op.inputs * rows.stride; p += WIDTH<T>) store<T>(to + p, load<T>(a + p) + load<T>(b + p));
}
template <class T> void add_backward(const Operation& op, Rows<T>& rows) {
    const T* grad = rows.grad(op.to);
    for (T* to : {rows.grad(op.from), rows.grad(op.first)})
        for (int64_t p = 0; p < op.inputs * rows.stride; p += WIDTH<T>)
            store<T>(to + p, load<T>(to + p) + load<T>(grad + p));
}

// The mean over an example's tokens of rows of a table `[inputs, outputs]`. Visits entries of the table in its order.
template <class T, class Visit> void each_token(const Operation& op, const Instance<T>& of, Rows<T>& rows, Visit visit) {
    const Task<T>& task = of.task;
    const int64_t* tokens = static_cast<const int64_t*>(task.inputs);
    for (int64_t e = 0; e < rows.stride; e++)
        for (int64_t l = 0; l < task.features; l++)
            visit(e, op.first + (of.index * op.inputs + tokens[rows.place[e] * task.features + l]) * op.outputs);
}
template <class T> void embed(const Operation& op, const Instance<T>& of, Rows<T>& rows) {
    T* to = rows.at(op.to);
    const T share = T(1) / T(of.task.features);
    std::fill(to, to + op.outputs * rows.stride, T(0));
    each_token(op, of, rows, [&](int64_t e, int64_t entry) {
        for (int64_t j = 0; j < op.outputs; j++) to[j * rows.stride + e] += share * of.params[entry + j];
    });
}
template <class T> void embed_backward(const Operation& op, const Instance<T>& of, Rows<T>& rows) {
    const T *grad = rows.grad(op.to), share = T(1) / T(of.task.features);
    each_token(op, of, rows, [&](int64_t e, int64_t entry) {
        for (int64_t j = 0; j < op.outputs; j++) of.grads[entry + j] += share * grad[j * rows.stride + e];
    });
}

// ------------------------------------------------------------------ losses

// Score the outputs; leave the gradient of the mean over examples.
template <class T> void cross_entropy(const Task<T>& task, Rows<T>& rows) {
    const int64_t stride = rows.stride;
    const int64_t* targets = static_cast<const int64_t*>(task.targets);
    T* out = rows.at(task.at_outputs);
    T* grad = rows.grad(task.at_outputs);
    T least[MOST_EXAMPLES];
    each_pack<T>(stride, [&]<int K>(int64_t p) {
        Pack<T, K> largest = load_pack<T, K>(out + p), sum = all_of<T, K>(0);
        for (int64_t c = 1; c < task.outputs; c++)
            largest = each(
                [](auto a, auto b) { return b > a ? b : (b == b ? a : b); }, largest,
                load_pack<T, K>(out + c * stride + p));
        for (int64_t c = 0; c < task.outputs; c++) {
            const Pack<T, K> off = load_pack<T, K>(out + c * stride + p) - largest;
            const Pack<T, K> share = exponential_of_negative(off);
            sum += share;
            store(out + c * stride + p, off);
            store(grad + c * stride + p, share);
        }
        store(least + p, logarithm(sum));
        const Pack<T, K> scale = load_pack<T, K>(rows.weight + p) * inverse(sum);
        for (int64_t c = 0; c < task.outputs; c++)
            store(grad + c * stride + p, load_pack<T, K>(grad + c * stride + p) * scale);
    });
    for (int64_t e = 0; e < stride; e++) {
        if (rows.weight[e] == 0) continue;
        const int64_t at = targets[rows.place[e]] * stride + e;
        rows.loss += double(least[e] - out[at]);
        grad[at] -= rows.weight[e];
    }
}

template <class T> void half_square(const Task<T>& task, Rows<T>& rows) {
    const T* targets = static_cast<const T*>(task.targets);
    const T *out = rows.at(task.at_outputs), share = T(1) / T(task.outputs);
    T* grad = rows.grad(task.at_outputs);
    for (int64_t c = 0; c < task.outputs; c++) {
        T sum = 0;
        for (int64_t e = 0; e < rows.stride; e++) {
            const T off = out[c * rows.stride + e] - targets[rows.place[e] * task.outputs + c];
            grad[c * rows.stride + e] = off * (rows.weight[e] * share);
            sum += rows.weight[e] == 0 ? T(0) : off * off;
        }
        rows.loss += 0.5 * double(sum * share);
    }
}

// ------------------------------------------------------------------ tasks

template <class T> void fetch_examples(const Instance<T>& of, int64_t begin, Rows<T>& rows) {
    const Task<T>& task = of.task;
    const int64_t valid = std::min(task.examples - begin, rows.stride);
    for (int64_t e = 0; e < rows.stride; e++) {  // lanes past the last example repeat the first, without weight
        const int64_t example = begin + (e < valid ? e : 0);
        rows.place[e] =
            of.index * task.points + (task.picked ? task.picked[of.index * task.examples + example] : example);
        rows.weight[e] = e < valid ? T(1) / T(task.examples) : T(0);
    }
    if (task.tokens) return;
    const T* inputs = static_cast<const T*>(task.inputs);
    T* to = rows.values;
    for (int64_t e = 0; e < rows.stride; e++) {
        const T* from = inputs + rows.place[e] * task.features;
        for (int64_t f = 0; f < task.features; f++) to[f * rows.stride + e] = from[f];
    }
}

template <class T> void run_forward(const Instance<T>& of, Rows<T>& rows) {
    for (const Operation& op : of.task.operations) switch (op.kind) {
            case Kind::Affine: affine(op, of, rows); break;
            case Kind::Activate: activate_rows(op, rows); break;
            case Kind::Normalise: normalise(op, of, rows); break;
            case Kind::Add: add_rows(op, rows); break;
            case Kind::Embed: embed(op, of, rows); break;
        }
}

template <class T> void run_backward(const Instance<T>& of, Rows<T>& rows) {
    const auto& operations = of.task.operations;
    for (auto op = operations.rbegin(); op != operations.rend(); ++op) switch (op->kind) {
            case Kind::Affine: affine_backward(*op, of, rows, of.task.tokens || op->from > 0); break;
            case Kind::Activate: activate_backward(*op, rows); break;
            case Kind::Normalise: normalise_backward(*op, of, rows); break;
            case Kind::Add: add_backward(*op, rows); break;
            case Kind::Embed: embed_backward(*op, of, rows); break;
        }
}

template <class T> T network_loss(const Instance<T>& of, Rows<T>& rows) {
    const Task<T>& task = of.task;
    rows.loss = 0;
    rows.stride = std::min(MOST_EXAMPLES, (task.examples + WIDTH<T> - 1) / WIDTH<T> * WIDTH<T>);
    const size_t size = (task.rows + 3) * rows.stride;  // `add_outer` reads past the end
    const size_t vectors = size / WIDTH<T>;
    if (rows.storage.size() < 2 * vectors) rows.storage.resize(2 * vectors);
    rows.values = reinterpret_cast<T*>(rows.storage.data());
    rows.grads = rows.values + size;
    for (int64_t begin = 0; begin < task.examples; begin += rows.stride) {
        fetch_examples(of, begin, rows);
        run_forward(of, rows);
        if (of.grads) std::fill_n(rows.grads, size, T(0));
        if (task.score == Score::CrossEntropy)
            cross_entropy(task, rows);
        else
            half_square(task, rows);
        if (of.grads) run_backward(of, rows);
    }
    return T(rows.loss / task.examples);
}

// 1/2 |W x - y|^2.
template <class T> T quadratic_loss(const Instance<T>& of) {
    const int64_t size = of.task.features, at = of.task.operations[0].first + of.index * size;
    const T* matrix = static_cast<const T*>(of.task.inputs) + of.index * size * size;
    const T *target = static_cast<const T*>(of.task.targets) + of.index * size, *x = of.params + at;
    T loss = 0;
    for (int64_t i = 0; i < size; i++, matrix += size) {
        Lanes<T> sum{};
        int64_t j = 0;
        for (; j + WIDTH<T> <= size; j += WIDTH<T>) sum += load<T>(matrix + j) * load<T>(x + j);
        T rest = sum_lanes<T>(sum) - target[i];
        for (; j < size; j++) rest += matrix[j] * x[j];
        loss += T(0.5) * rest * rest;
        if (of.grads)
            for (j = 0; j < size; j++) of.grads[at + j] += rest * matrix[j];
    }
    return loss;
}

// Losses of all instances [M] and, if asked for, gradients added to those of the parameters [P].
template <class T> void task_losses(const std::vector<Task<T>>& tasks, const T* params, T* losses, T* grads) {
    std::vector<std::pair<const Task<T>*, int64_t>> work;
    for (const Task<T>& task : tasks)
        for (int64_t i = 0; i < task.instances; i++) work.emplace_back(&task, i);
    each_chunk<Rows<T>>(work.size(), [&](int64_t number, Rows<T>& rows) {
        const auto [task, index] = work[number];
        const Instance<T> instance{*task, index, params, grads};
        losses[task->first_model + index] =
            task->score == Score::Quadratic ? quadratic_loss(instance) : network_loss(instance, rows);
    });
}

}  // namespace hrnn
