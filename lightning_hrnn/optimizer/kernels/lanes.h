// Vectors of parameters, one a lane, and the functions the rule needs of them.
//
// Width follows the target the file is compiled for. Every function is plain arithmetic that any compiler must keep as
// written: the file must not be compiled with -ffast-math, which would fold the rounding in `round_to_int` away.
//
// Largest errors found in single precision: exp 1e-7, sigmoid 2e-7, log 1e-7, asinh 2.1e-7, 1/x 1.2e-7, 1/sqrt 1.4e-7
// relative, tanh 3e-7 absolute. What is not a number stays so; exp is cut off at -87 and 88. In double precision the
// functions are those of the C library.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace hrnn {

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64, VECTOR_REGISTERS = 32;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32, VECTOR_REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int VECTOR_BYTES = 16, VECTOR_REGISTERS = 32;
#else
constexpr int VECTOR_BYTES = 16, VECTOR_REGISTERS = 16;
#endif

typedef float FloatLanes __attribute__((vector_size(VECTOR_BYTES)));
typedef double DoubleLanes __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t IntLanes __attribute__((vector_size(VECTOR_BYTES)));
typedef float FloatAnywhere __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
typedef double DoubleAnywhere __attribute__((vector_size(VECTOR_BYTES), aligned(8), may_alias));

template <class T> struct LanesOf;
template <> struct LanesOf<float> { using type = FloatLanes; using anywhere = FloatAnywhere; };
template <> struct LanesOf<double> { using type = DoubleLanes; using anywhere = DoubleAnywhere; };
template <class T> using Lanes = typename LanesOf<T>::type;
template <class T> constexpr int WIDTH = VECTOR_BYTES / sizeof(T);

#define HRNN_INLINE inline __attribute__((always_inline))

// Through a type that is allowed anywhere, not through memcpy: GCC splits that into halves.
template <class T> HRNN_INLINE Lanes<T> load(const T* from) {
    return *reinterpret_cast<const typename LanesOf<T>::anywhere*>(from);
}
template <class T> HRNN_INLINE void store(T* to, Lanes<T> value) {
    *reinterpret_cast<typename LanesOf<T>::anywhere*>(to) = value;
}
template <class T> HRNN_INLINE Lanes<T> all(T value) { return value - Lanes<T>{}; }

template <class T> HRNN_INLINE T sum_lanes(Lanes<T> value) {
    T parts[WIDTH<T>];
    store<T>(parts, value);
    for (int step = WIDTH<T> / 2; step > 0; step /= 2)
        for (int i = 0; i < step; i++) parts[i] += parts[i + step];
    return parts[0];
}

HRNN_INLINE IntLanes bits(FloatLanes x) { return (IntLanes)x; }
HRNN_INLINE FloatLanes from_bits(IntLanes x) { return (FloatLanes)x; }

// The second argument comes back where it is not a number.
HRNN_INLINE FloatLanes at_most(float bound, FloatLanes x) {
#if defined(__AVX512F__)
    return _mm512_min_ps(_mm512_set1_ps(bound), x);
#elif defined(__AVX__)
    return _mm256_min_ps(_mm256_set1_ps(bound), x);
#else
    return x > bound ? all<float>(bound) : x;
#endif
}
HRNN_INLINE FloatLanes at_least(float bound, FloatLanes x) {
#if defined(__AVX512F__)
    return _mm512_max_ps(_mm512_set1_ps(bound), x);
#elif defined(__AVX__)
    return _mm256_max_ps(_mm256_set1_ps(bound), x);
#else
    return x < bound ? all<float>(bound) : x;
#endif
}
HRNN_INLINE DoubleLanes at_most(double bound, DoubleLanes x) { return x > bound ? all<double>(bound) : x; }
HRNN_INLINE DoubleLanes at_least(double bound, DoubleLanes x) { return x < bound ? all<double>(bound) : x; }

HRNN_INLINE FloatLanes root(FloatLanes x) {
#if defined(__AVX512F__)
    return _mm512_sqrt_ps(x);
#elif defined(__AVX__)
    return _mm256_sqrt_ps(x);
#else
    for (int i = 0; i < WIDTH<float>; i++) x[i] = std::sqrt(x[i]);
    return x;
#endif
}
HRNN_INLINE DoubleLanes root(DoubleLanes x) {
    for (int i = 0; i < WIDTH<double>; i++) x[i] = std::sqrt(x[i]);
    return x;
}

// Division and square root take ten times as long as a product: with AVX-512, a table of 14 bits and a step of Newton's
// method give 1 / x and 1 / sqrt(x) to 1e-7, of normal numbers.
HRNN_INLINE FloatLanes inverse(FloatLanes x) {
#if defined(__AVX512F__)
    const FloatLanes guess = _mm512_rcp14_ps(x);
    return guess * (2.0f - x * guess);
#else
    return 1.0f / x;
#endif
}
HRNN_INLINE FloatLanes inverse_root(FloatLanes x) {
#if defined(__AVX512F__)
    const FloatLanes guess = _mm512_rsqrt14_ps(x);
    return guess * (1.5f - 0.5f * x * guess * guess);
#else
    return 1.0f / root(x);
#endif
}
HRNN_INLINE DoubleLanes inverse(DoubleLanes x) { return 1.0 / x; }
HRNN_INLINE DoubleLanes inverse_root(DoubleLanes x) { return 1.0 / root(x); }

template <class V> HRNN_INLINE V magnitude(V x) { return x < 0 ? -x : x; }

// Split x = k ln 2 + r, expand exp(r), and put k into the exponent.
HRNN_INLINE FloatLanes exponential(FloatLanes x) {
    x = at_least(-87.0f, at_most(88.0f, x));
    constexpr float rounder = 12582912.0f;  // 1.5 * 2^23: adding it leaves no bits after the point
    FloatLanes k = x * 1.44269504f + rounder;
    const IntLanes exponent = (bits(k) << 23) + (127 << 23);
    k -= rounder;
    FloatLanes r = x - k * 0.693359375f;
    r = r + k * 2.12194440e-4f;
    FloatLanes p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return p * from_bits(exponent);
}

// log(1 + f) for 1 + f in [sqrt(1/2), sqrt(2)].
HRNN_INLINE FloatLanes log_near_one(FloatLanes f, FloatLanes exponent) {
    FloatLanes p = f * 7.0376836292e-2f - 1.1514610310e-1f;
    p = p * f + 1.1676998740e-1f;
    p = p * f - 1.2420140846e-1f;
    p = p * f + 1.4249322787e-1f;
    p = p * f - 1.6668057665e-1f;
    p = p * f + 2.0000714765e-1f;
    p = p * f - 2.4999993993e-1f;
    p = p * f + 3.3333331174e-1f;
    const FloatLanes square = f * f;
    p = p * f * square - exponent * 2.12194440e-4f - 0.5f * square;
    return f + p + exponent * 0.693359375f;
}

constexpr int32_t ROOT_HALF = 0x3f3504f3;  // bits of sqrt(1/2)

// Of positive normal numbers; infinity and what is not a number come back.
HRNN_INLINE FloatLanes logarithm(FloatLanes x) {
    const IntLanes shifted = bits(x) - ROOT_HALF;
    const FloatLanes exponent = __builtin_convertvector(shifted >> 23, FloatLanes);
    const FloatLanes mantissa = from_bits((shifted & 0x007fffff) + ROOT_HALF);
    const FloatLanes result = log_near_one(mantissa - 1.0f, exponent);
    return x < INFINITY ? result : x;
}

// asinh(x) = sign(x) log(1 + w), w = |x| + x^2 / (1 + root); near zero the logarithm takes w itself, unrounded.
HRNN_INLINE FloatLanes arsinh(FloatLanes x, FloatLanes root_of_one_plus_square) {
    const FloatLanes size = magnitude(x);
    const FloatLanes w = size + x * x * inverse(1.0f + root_of_one_plus_square);
    const FloatLanes u = 1.0f + w;
    const IntLanes shifted = bits(u) - ROOT_HALF;
    const IntLanes whole = shifted >> 23;
    const FloatLanes mantissa = from_bits((shifted & 0x007fffff) + ROOT_HALF);
    const FloatLanes f = whole == 0 ? w : mantissa - 1.0f;
    const FloatLanes result = log_near_one(f, __builtin_convertvector(whole, FloatLanes));
    return x < 0 ? -result : result;
}

HRNN_INLINE FloatLanes sigmoid(FloatLanes x) { return inverse(1.0f + exponential(-x)); }
HRNN_INLINE FloatLanes tangent(FloatLanes x) { return 1.0f - 2.0f * inverse(1.0f + exponential(2.0f * x)); }

#define HRNN_EACH_LANE(NAME, EXPRESSION)                                                                               \
    HRNN_INLINE DoubleLanes NAME(DoubleLanes lanes) {                                                                  \
        for (int i = 0; i < WIDTH<double>; i++) {                                                                      \
            const double x = lanes[i];                                                                                 \
            lanes[i] = EXPRESSION;                                                                                     \
        }                                                                                                              \
        return lanes;                                                                                                  \
    }
HRNN_EACH_LANE(exponential, std::exp(x))
HRNN_EACH_LANE(logarithm, std::log(x))
HRNN_EACH_LANE(sigmoid, 1.0 / (1.0 + std::exp(-x)))
HRNN_EACH_LANE(tangent, std::tanh(x))
HRNN_EACH_LANE(arsinh_each, std::asinh(x))
#undef HRNN_EACH_LANE
HRNN_INLINE DoubleLanes arsinh(DoubleLanes x, DoubleLanes) { return arsinh_each(x); }

}  // namespace hrnn
