// Chunks of a flat vector of parameters, in which tensors of all sizes lie end to end.
//
// Work is shared out by chunk, not by tensor, and lanes are filled across tensors. What a chunk adds up of a tensor that
// lies across its border is kept aside and added at the end, in order: results do not depend on the number of threads.

#pragma once

#include <algorithm>
#include <atomic>
#include <memory>
#include <utility>
#include <vector>

#include <ATen/Parallel.h>
#include <ATen/TensorIterator.h>
#include <ATen/ops/empty.h>

#include "lanes.h"

namespace hrnn {

constexpr int64_t CHUNK = 2048;  // parameters

// Spread one value over a segment of a row; writes up to a vector beyond its end.
template <class T> HRNN_INLINE void spread(T* row, int begin, int end, T value) {
    const Lanes<T> lanes = all<T>(value);
    for (int p = begin; p < end; p += WIDTH<T>) store<T>(row + p, lanes);
}

// Add up the lanes of each of WIDTH vectors: lane i of the result is the sum of rows[i].
#if defined(__clang__)
template <class T> HRNN_INLINE Lanes<T> sum_each(Lanes<T>* rows) {
    Lanes<T> result{};
    for (int i = 0; i < WIDTH<T>; i++) result[i] = sum_lanes<T>(rows[i]);
    return result;
}
#else
// Pair vectors and add the halves of each block of lanes, a block being what is left of a row: a vector holds one row at
// first, two blocks of half the lanes next, in the end one lane of every row.
template <class T, int BLOCK, int... LANE>
HRNN_INLINE Lanes<T> halve(Lanes<T> a, Lanes<T> b, std::integer_sequence<int, LANE...>) {
    using Index = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
    typedef Index Pick __attribute__((vector_size(VECTOR_BYTES)));
    constexpr int HALF = BLOCK / 2;
    const Pick low = {(LANE / HALF % 2 * WIDTH<T> + LANE / BLOCK * BLOCK + LANE % HALF)...};
    return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, low + HALF);
}
template <class T, int BLOCK = WIDTH<T>> HRNN_INLINE Lanes<T> sum_each(Lanes<T>* rows) {
    constexpr int COUNT = BLOCK / 2;
#pragma GCC unroll 8
    for (int i = 0; i < COUNT; i++)
        rows[i] = halve<T, BLOCK>(rows[i], rows[i + COUNT], std::make_integer_sequence<int, WIDTH<T>>());
    if constexpr (BLOCK > 2)
        return sum_each<T, COUNT>(rows);
    else
        return rows[0];
}
#endif

// Sums over one segment of ROWS rows that lie `stride` apart. They are rounded up to whole vectors.
template <int ROWS, class T> constexpr int ROUNDED = (ROWS + WIDTH<T> - 1) / WIDTH<T> * WIDTH<T>;

template <class T, int ROWS> HRNN_INLINE void add_segment(const T* rows, int stride, int begin, int end, T* sums) {
    using Index = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
    typedef Index Places __attribute__((vector_size(VECTOR_BYTES)));
    Places lane;
    for (int i = 0; i < WIDTH<T>; i++) lane[i] = i;
#pragma GCC unroll 8
    for (int first = 0; first < ROWS; first += WIDTH<T>) {
        Lanes<T> sum[WIDTH<T>]{};
        const int here = std::min(WIDTH<T>, ROWS - first);
        for (int p = begin; p < end; p += WIDTH<T>) {
            const Places inside = lane < Places{} + Index(end - p);
#pragma GCC unroll 16
            for (int i = 0; i < here; i++) sum[i] += inside ? load<T>(rows + (first + i) * stride + p) : Lanes<T>{};
        }
        store<T>(sums + first, load<T>(sums + first) + sum_each<T>(sum));
    }
}

// Where tensors begin: T + 1 offsets.
using Offsets = std::vector<int64_t>;

inline int64_t chunks_of(int64_t params) { return (params + CHUNK - 1) / CHUNK; }

// Walk over the pieces of tensors that lie in [begin, end): visit(tensor, begin, end).
template <class Visit>
HRNN_INLINE void each_segment(
    const Offsets& offsets, int64_t begin, int64_t end, int64_t& tensor, Visit visit) {
    for (int64_t p = begin; p < end;) {
        while (offsets[tensor + 1] <= p) tensor++;
        const int64_t stop = std::min(end, offsets[tensor + 1]);
        visit(tensor, p, stop);
        p = stop;
    }
}

inline int64_t tensor_at(const Offsets& offsets, int64_t param) {
    return std::upper_bound(offsets.begin(), offsets.end(), param) - offsets.begin() - 1;
}

// Sums over tensors, made by chunks in any order: `[T, ROWS]`, tensor by tensor.
template <class T, int ROWS> class TensorSums {
public:
    static constexpr int WIDE = ROUNDED<ROWS, T>;

    TensorSums(const Offsets& offsets)
        : offsets(offsets), sums((offsets.size() - 1) * WIDE), edges(chunks_of(offsets.back()) * 2 * WIDE) {}

    // Return where the piece of a tensor in a chunk adds up.
    T* of(int64_t chunk, int64_t tensor) {
        if (offsets[tensor] < chunk * CHUNK) return &edges[chunk * 2 * WIDE];
        if (offsets[tensor + 1] > (chunk + 1) * CHUNK) return &edges[(chunk * 2 + 1) * WIDE];
        return &sums[tensor * WIDE];
    }

    // Add up what lies across the borders of chunks. After the last chunk.
    void finish() {
        const int64_t chunks = chunks_of(offsets.back());
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
            const int64_t first = tensor_at(offsets, chunk * CHUNK);
            if (offsets[first] < chunk * CHUNK) add(first, &edges[chunk * 2 * WIDE]);
            const int64_t last = tensor_at(offsets, std::min(offsets.back(), (chunk + 1) * CHUNK) - 1);
            if (offsets[last] >= chunk * CHUNK && offsets[last + 1] > (chunk + 1) * CHUNK)
                add(last, &edges[(chunk * 2 + 1) * WIDE]);
        }
    }

    const T* operator[](int64_t tensor) const { return &sums[tensor * WIDE]; }

private:
    void add(int64_t tensor, const T* edge) {
        for (int i = 0; i < ROWS; i++) sums[tensor * WIDE + i] += edge[i];
    }

    const Offsets& offsets;
    std::vector<T> sums, edges;
};

// Ask for pieces of rows before they are needed: there are more of them than a processor can keep in view by itself.
template <class Stored> HRNN_INLINE void prefetch_rows(const Stored* from, int rows, int64_t stride, int count) {
    constexpr int LINE = 64 / sizeof(Stored);
    for (int i = 0; i < rows; i++)
        for (int p = 0; p < count; p += LINE) __builtin_prefetch(from + i * stride + p, 1);
}

// Call work(chunk, scratch) for every chunk, on as many threads as torch uses, each with scratch of its own. A thread
// takes the next chunk when it is done with one, so that none waits long for another that got less of the processor.
//
// at::parallel_for would be inlined here and would bring an OpenMP runtime of its own, which does not know what
// torch.set_num_threads said. The loop of a TensorIterator runs within torch, on torch's threads, whatever they are.
struct Nothing {};
template <class Scratch = Nothing, class Work> void each_chunk(int64_t chunks, Work work) {
    const int64_t threads = std::min<int64_t>(chunks, at::get_num_threads());
    const at::Tensor numbers = at::empty({threads}, at::TensorOptions().dtype(at::kByte));
    auto iterator = at::TensorIterator::borrowing_nullary_op(numbers);
    std::atomic<int64_t> next{0};
    iterator.for_each(
        [&](char**, const int64_t*, int64_t) {
            const auto scratch = std::make_unique<Scratch>();
            for (int64_t chunk = next++; chunk < chunks; chunk = next++) work(chunk, *scratch);
        },
        1);
}

}  // namespace hrnn
