// Activations and their derivatives, of a pack of examples.

#pragma once

#include "lanes.h"

namespace hrnn {

enum class Activation { Relu, Tanh, Sigmoid, Gelu, Silu, Elu, LeakyRelu };

constexpr double LEAK = 0.01, ROOT_HALF = 0.70710678118654752, INVERSE_ROOT_TWO_PI = 0.39894228040143268;
constexpr double SMALLEST_POWER = 87;  // e to the minus it is still a normal number in single precision

template <class T, int K> HRNN_INLINE Pack<T, K> exponential_of_negative(Pack<T, K> x) {
    return power(at_least(T(-SMALLEST_POWER) * NATURAL<T>, NATURAL<T> * x));
}
template <class T, int K> HRNN_INLINE Pack<T, K> choose(Pack<T, K> sign, Pack<T, K> positive, Pack<T, K> other) {
    return each([](auto s, auto a, auto b) { return s > 0 ? a : b; }, sign, positive, other);
}

// The normal distribution up to x, and its density there. Abramowitz and Stegun 7.1.26, error 1.5e-7, in single
// precision; the C library in double.
template <class T, int K> HRNN_INLINE void normal(Pack<T, K> x, Pack<T, K>& distribution, Pack<T, K>& density) {
    const Pack<T, K> tail = exponential_of_negative(T(-0.5) * x * x);
    density = tail * T(INVERSE_ROOT_TWO_PI);
    if constexpr (sizeof(T) == 8) {
        distribution = each_lane([](double v) { return 0.5 * std::erfc(-v * ROOT_HALF); }, x);
    } else {
        const Pack<T, K> size = choose(x, x, T(-1) * x);
        const Pack<T, K> t = inverse(T(1) + size * T(0.3275911 * ROOT_HALF));
        Pack<T, K> p = t * T(0.5 * 1.061405429) + T(0.5 * -1.453152027);
        p = p * t + T(0.5 * 1.421413741);
        p = p * t + T(0.5 * -0.284496736);
        p = p * t + T(0.5 * 0.254829592);
        const Pack<T, K> beyond = p * t * tail;
        distribution = choose(x, T(1) - beyond, beyond);
    }
}

template <Activation KIND, class T, int K> HRNN_INLINE Pack<T, K> activate(Pack<T, K> x) {
    if constexpr (KIND == Activation::Relu) return at_least(T(0), x);
    if constexpr (KIND == Activation::Tanh) return tangent(x);
    if constexpr (KIND == Activation::Sigmoid) return sigmoid(x);
    if constexpr (KIND == Activation::Silu) return x * sigmoid(x);
    if constexpr (KIND == Activation::Elu) return choose(x, x, exponential_of_negative(at_most(T(0), x)) - T(1));
    if constexpr (KIND == Activation::LeakyRelu) return choose(x, x, x * T(LEAK));
    if constexpr (KIND == Activation::Gelu) {
        Pack<T, K> distribution, density;
        normal(x, distribution, density);
        return x * distribution;
    }
}

// The derivative at x, where the value is y.
template <Activation KIND, class T, int K> HRNN_INLINE Pack<T, K> slope(Pack<T, K> x, Pack<T, K> y) {
    const Pack<T, K> one = all_of<T, K>(1);
    if constexpr (KIND == Activation::Relu) return choose(y, one, all_of<T, K>(0));
    if constexpr (KIND == Activation::Tanh) return T(1) - y * y;
    if constexpr (KIND == Activation::Sigmoid) return y * (T(1) - y);
    if constexpr (KIND == Activation::Elu) return choose(x, one, y + T(1));
    if constexpr (KIND == Activation::LeakyRelu) return choose(x, one, all_of<T, K>(T(LEAK)));
    if constexpr (KIND == Activation::Silu) {
        const Pack<T, K> gate = sigmoid(x);
        return gate * (T(1) + x * (T(1) - gate));
    }
    if constexpr (KIND == Activation::Gelu) {
        Pack<T, K> distribution, density;
        normal(x, distribution, density);
        return distribution + x * density;
    }
}

template <class Visit> HRNN_INLINE void with_activation(Activation kind, Visit visit) {
    using enum Activation;
    switch (kind) {
        case Relu: return visit.template operator()<Relu>();
        case Tanh: return visit.template operator()<Tanh>();
        case Sigmoid: return visit.template operator()<Sigmoid>();
        case Gelu: return visit.template operator()<Gelu>();
        case Silu: return visit.template operator()<Silu>();
        case Elu: return visit.template operator()<Elu>();
        case LeakyRelu: return visit.template operator()<LeakyRelu>();
    }
}

}  // namespace hrnn
