// Vectors of parameters, one a lane, and the functions the rule needs of them.
//
// Width follows the target the file is compiled for. Every function is plain arithmetic that any compiler must keep as
// written: the file must not be compiled with -ffast-math, which would fold the rounding in `power` away. A `Pack` is a
// few vectors that take every operation one after the other, so that none waits for the result of the one before.
//
// Largest errors found in single precision, relative: exp 2.1e-7, asinh 1.7e-7, 1/x 1.2e-7, 1/sqrt 1.5e-7, log 1.2e-6
// where it is small and 1e-7 elsewhere; absolute: sigmoid 1.5e-7, tanh 3e-7. What is not a number stays so; powers of
// two are for arguments up to +-126. In double precision the functions are those of the C library.

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
template <> struct LanesOf<int32_t> { using type = IntLanes; };
template <class V> struct ElementOf;
template <> struct ElementOf<FloatLanes> { using type = float; };
template <> struct ElementOf<DoubleLanes> { using type = double; };
template <> struct ElementOf<IntLanes> { using type = int32_t; };
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

// ------------------------------------------------------------------ single vectors

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
HRNN_INLINE FloatLanes as_floats(IntLanes x) { return __builtin_convertvector(x, FloatLanes); }
#if defined(__AVX512F__)
HRNN_INLINE FloatLanes inverse_guess(FloatLanes x) { return _mm512_rcp14_ps(x); }
HRNN_INLINE FloatLanes inverse_root_guess(FloatLanes x) { return _mm512_rsqrt14_ps(x); }
#endif

// ------------------------------------------------------------------ packs

template <class T, int K> struct Pack {
    Lanes<T> at[K];
};

template <class T, int K> HRNN_INLINE Pack<T, K> load_pack(const T* from) {
    Pack<T, K> result;
#pragma GCC unroll 16
    for (int k = 0; k < K; k++) result.at[k] = load<T>(from + k * WIDTH<T>);
    return result;
}
template <class T, int K> HRNN_INLINE void store(T* to, Pack<T, K> value) {
#pragma GCC unroll 16
    for (int k = 0; k < K; k++) store<T>(to + k * WIDTH<T>, value.at[k]);
}
template <class T, int K> HRNN_INLINE Pack<T, K> all_of(T value) {
    Pack<T, K> result;
#pragma GCC unroll 16
    for (int k = 0; k < K; k++) result.at[k] = all<T>(value);
    return result;
}

// Apply a function of vectors to each of a pack.
template <class Work, class T, int K, class... Others>
HRNN_INLINE auto each(Work work, Pack<T, K> a, Others... others) {
    Pack<typename ElementOf<decltype(work(a.at[0], others.at[0]...))>::type, K> result;
#pragma GCC unroll 16
    for (int k = 0; k < K; k++) result.at[k] = work(a.at[k], others.at[k]...);
    return result;
}

#define HRNN_OPERATOR(OP)                                                                                              \
    template <class T, int K> HRNN_INLINE Pack<T, K> operator OP(Pack<T, K> a, Pack<T, K> b) {                         \
        return each([](auto x, auto y) { return x OP y; }, a, b);                                                      \
    }                                                                                                                  \
    template <class T, int K> HRNN_INLINE Pack<T, K> operator OP(Pack<T, K> a, std::type_identity_t<T> b) {            \
        return each([b](auto x) { return x OP b; }, a);                                                                \
    }                                                                                                                  \
    template <class T, int K> HRNN_INLINE Pack<T, K> operator OP(std::type_identity_t<T> a, Pack<T, K> b) {            \
        return each([a](auto x) { return a OP x; }, b);                                                                \
    }
HRNN_OPERATOR(+)
HRNN_OPERATOR(-)
HRNN_OPERATOR(*)
HRNN_OPERATOR(&)
HRNN_OPERATOR(|)
HRNN_OPERATOR(^)
HRNN_OPERATOR(<<)
HRNN_OPERATOR(>>)
#undef HRNN_OPERATOR
template <class T, int K> HRNN_INLINE Pack<T, K>& operator+=(Pack<T, K>& a, Pack<T, K> b) { return a = a + b; }

template <class T, int K> HRNN_INLINE Pack<T, K> at_most(std::type_identity_t<T> bound, Pack<T, K> x) {
    return each([bound](auto v) { return at_most(bound, v); }, x);
}
template <class T, int K> HRNN_INLINE Pack<T, K> at_least(std::type_identity_t<T> bound, Pack<T, K> x) {
    return each([bound](auto v) { return at_least(bound, v); }, x);
}
template <class T, int K> HRNN_INLINE Pack<T, K> root(Pack<T, K> x) {
    return each([](auto v) { return root(v); }, x);
}
template <int K> HRNN_INLINE Pack<int32_t, K> bits(Pack<float, K> x) {
    return each([](auto v) { return bits(v); }, x);
}
template <int K> HRNN_INLINE Pack<float, K> from_bits(Pack<int32_t, K> x) {
    return each([](auto v) { return from_bits(v); }, x);
}

// ------------------------------------------------------------------ functions, single precision

// Division and square root take several times as long as a product: with AVX-512, a table of 14 bits and a step of
// Newton's method give 1 / x and 1 / sqrt(x) to 1e-7, of normal numbers.
template <int K> HRNN_INLINE Pack<float, K> inverse(Pack<float, K> x) {
#if defined(__AVX512F__)
    const Pack<float, K> guess = each([](auto v) { return inverse_guess(v); }, x);
    return guess * (2.0f - x * guess);
#else
    return each([](auto v) { return 1.0f / v; }, x);
#endif
}
template <int K> HRNN_INLINE Pack<float, K> inverse_root(Pack<float, K> x) {
#if defined(__AVX512F__)
    const Pack<float, K> guess = each([](auto v) { return inverse_root_guess(v); }, x);
    return guess * (1.5f - (0.5f * x) * (guess * guess));
#else
    return each([](auto v) { return 1.0f / root(v); }, x);
#endif
}

// Powers are taken of two, and of e in double precision: `power(NATURAL<T> * x)` is exp(x), and the factor can go into
// the weights of what `x` is made from.
template <class T> constexpr T NATURAL = 1;
template <> inline constexpr float NATURAL<float> = 1.44269504f;

// 2^x for x in [-126, 126]: round x to a whole number, expand the rest, and add the whole number to the exponent.
template <int K> HRNN_INLINE Pack<float, K> power(Pack<float, K> x) {
    constexpr float rounder = 12582912.0f;  // 1.5 * 2^23: adding it leaves no bits after the point
    const Pack<float, K> shifted = x + rounder;
    const Pack<float, K> rest = x - (shifted - rounder);
    Pack<float, K> p = rest * 0.001326472725f + 0.009671512786f;
    p = p * rest + 0.05550733744f;
    p = p * rest + 0.2402224208f;
    p = p * rest + 0.6931469776f;
    p = p * rest + 1.0f;
    return from_bits(bits(p) + (bits(shifted) << 23));
}

// Logarithms: x = 2^e (1 + f), with 1 + f from MANTISSA on. `shifted` is bits(x) - MANTISSA, whose exponent is e.
constexpr int32_t EXPONENT = int32_t(0xff800000), SIGN = int32_t(0x80000000), ONE = 0x3f800000;

#if defined(__AVX512F__)
// A table divides 1 + f by one of 16 numbers, which leaves 1 + r for a short series. From 63/64 to 33/32 that is 1.
constexpr int32_t MANTISSA = 0x3f7c0000;
template <int K> HRNN_INLINE Pack<float, K> log_of_split(Pack<float, K> f, Pack<int32_t, K> shifted) {
    alignas(64) static constexpr float factors[16] = {
        1.0f, 0.941176474f, 0.888888896f, 0.842105269f, 0.800000012f, 0.761904776f, 0.727272749f, 0.695652187f,
        0.666666687f, 0.639999986f, 0.615384638f, 0.592592597f, 0.571428597f, 0.551724136f, 0.533333361f, 0.516129017f};
    alignas(64) static constexpr float logs[16] = {  // of 1 / factor
        -0.0f, 0.0606246181f, 0.117783025f, 0.171850249f, 0.223143533f, 0.271933705f, 0.318453699f, 0.362905473f,
        0.405465066f, 0.446287125f, 0.485507786f, 0.523248136f, 0.559615731f, 0.594707131f, 0.628608584f, 0.66139853f};
    const auto find = [](const float* table) {
        return [table](IntLanes place) -> FloatLanes {
            return _mm512_permutexvar_ps((__m512i)place, _mm512_load_ps(table));
        };
    };
    const Pack<int32_t, K> place = shifted >> 19;  // the lowest 4 bits count
    const Pack<float, K> factor = each(find(factors), place), r = f * factor + (factor - 1.0f);
    const Pack<float, K> exponent = each([](IntLanes v) { return as_floats(v); }, shifted >> 23);
    const Pack<float, K> whole = exponent * 0.693147181f + each(find(logs), place);
    const Pack<float, K> p = (r * -0.250173092f + 0.333495229f) * r + -0.49999997f;
    return whole + ((r * r) * p + r);
}
#else
constexpr int32_t MANTISSA = 0x3f3504f3;  // sqrt(1/2)
template <int K> HRNN_INLINE Pack<float, K> log_of_split(Pack<float, K> f, Pack<int32_t, K> shifted) {
    const Pack<float, K> exponent = each([](IntLanes v) { return as_floats(v); }, shifted >> 23);
    Pack<float, K> p = f * 7.0376836292e-2f - 1.1514610310e-1f;
    p = p * f + 1.1676998740e-1f;
    p = p * f - 1.2420140846e-1f;
    p = p * f + 1.4249322787e-1f;
    p = p * f - 1.6668057665e-1f;
    p = p * f + 2.0000714765e-1f;
    p = p * f - 2.4999993993e-1f;
    p = p * f + 3.3333331174e-1f;
    const Pack<float, K> square = f * f;
    p = (p * f) * square + (exponent * -2.12194440e-4f - 0.5f * square);
    return (f + p) + exponent * 0.693359375f;
}
#endif

template <int K> HRNN_INLINE Pack<float, K> inverse_power_of(Pack<int32_t, K> shifted) {
    return from_bits(ONE - (shifted & EXPONENT));
}

// Of positive normal numbers.
template <int K> HRNN_INLINE Pack<float, K> logarithm(Pack<float, K> x) {
    const Pack<int32_t, K> shifted = bits(x) - MANTISSA;
    return log_of_split(x * inverse_power_of(shifted) - 1.0f, shifted);
}

// asinh(x) = sign(x) log(1 + w), w = |x| + x^2 / (1 + root); near zero f is w, unrounded.
template <int K> HRNN_INLINE Pack<float, K> arsinh(Pack<float, K> x, Pack<float, K> root_of_one_plus_square) {
    const Pack<float, K> size = from_bits(bits(x) & ~SIGN);
    const Pack<float, K> w = size + (x * x) * inverse(1.0f + root_of_one_plus_square);
    const Pack<int32_t, K> shifted = bits(1.0f + w) - MANTISSA;
    const Pack<float, K> scale = inverse_power_of(shifted);
    const Pack<float, K> result = log_of_split(w * scale + (scale - 1.0f), shifted);
    return from_bits(bits(result) | (bits(x) & SIGN));
}

// ------------------------------------------------------------------ functions, double precision

template <class Work, int K> HRNN_INLINE Pack<double, K> each_lane(Work work, Pack<double, K> x) {
    return each(
        [work](DoubleLanes lanes) {
            for (int i = 0; i < WIDTH<double>; i++) lanes[i] = work(lanes[i]);
            return lanes;
        },
        x);
}
template <int K> HRNN_INLINE Pack<double, K> inverse(Pack<double, K> x) {
    return each([](auto v) { return 1.0 / v; }, x);
}
template <int K> HRNN_INLINE Pack<double, K> inverse_root(Pack<double, K> x) {
    return each([](auto v) { return 1.0 / root(v); }, x);
}
template <int K> HRNN_INLINE Pack<double, K> power(Pack<double, K> x) {
    return each_lane([](double v) { return std::exp(v); }, x);
}
template <int K> HRNN_INLINE Pack<double, K> logarithm(Pack<double, K> x) {
    return each_lane([](double v) { return std::log(v); }, x);
}
template <int K> HRNN_INLINE Pack<double, K> arsinh(Pack<double, K> x, Pack<double, K>) {
    return each_lane([](double v) { return std::asinh(v); }, x);
}

// ------------------------------------------------------------------ functions, either

constexpr int MOST_POWER = 60;  // beyond, sigmoid and tanh have long arrived at their limits; products are finite still

// Cut off, so that 1 + 2^x is finite.
template <class T, int K> HRNN_INLINE Pack<T, K> bounded_power(Pack<T, K> x) {
    return power(at_least(T(-MOST_POWER), at_most(T(MOST_POWER), x)));
}
template <class T, int K> HRNN_INLINE Pack<T, K> sigmoid(Pack<T, K> x) {
    return inverse(T(1) + bounded_power(-NATURAL<T> * x));
}
template <class T, int K> HRNN_INLINE Pack<T, K> tangent(Pack<T, K> x) {
    return T(1) - T(2) * inverse(T(1) + bounded_power(2 * NATURAL<T> * x));
}

}  // namespace hrnn
