// The operators that torch sees.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "param_level.h"

namespace hrnn {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

namespace {

Offsets offsets_of(const Tensor& params_in) {
    TORCH_CHECK(params_in.is_cpu(), "the fused param level needs CPU tensors");
    const Tensor counts = params_in.contiguous();
    Offsets offsets(1, 0);
    const auto add_up = [&](const auto* sizes) {
        for (int64_t t = 0; t < counts.numel(); t++) offsets.push_back(offsets.back() + int64_t(sizes[t]));
    };
    if (counts.scalar_type() == at::kFloat)
        add_up(counts.const_data_ptr<float>());
    else
        add_up(counts.const_data_ptr<double>());
    return offsets;
}

void check(const Tensor& value, int64_t rows, int64_t columns, const Tensor& like) {
    TORCH_CHECK(
        value.is_contiguous() && value.numel() == rows * columns && value.scalar_type() == like.scalar_type() &&
            value.is_cpu(),
        "the fused param level needs contiguous CPU tensors of one type; got ", value.sizes(), " for [", rows, ", ",
        columns, "]");
}

template <class Work> void with_types(const Tensor& like, int64_t readouts, Work work) {
    const auto with_readouts = [&](auto zero) {
        using T = decltype(zero);
        if (readouts == 1)
            work.template operator()<T, 1>();
        else
            work.template operator()<T, 2>();
    };
    TORCH_CHECK(readouts == 1 || readouts == 2, "one or two readouts, not ", readouts);
    if (like.scalar_type() == at::kFloat)
        with_readouts(0.0f);
    else
        with_readouts(0.0);
}

template <class T> const T* data(const MaybeTensor& value) {
    return value.has_value() ? value->const_data_ptr<T>() : nullptr;
}

using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using Six = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Take the forward step of models, with one row of `metas` each. All that belongs to a model lies together, model after
// model: its hidden states [H, P of the model], and so on.
Six forward_models(
    const Tensor& grad, const Tensor& hidden, const Tensor& average, const Tensor& square, const Tensor& above,
    const Offsets& offsets, const Offsets& models, const Tensor& metas, double bound, int64_t readouts, bool scales) {
    const int64_t params = offsets.back(), tensors = offsets.size() - 1, count = models.size() - 1;
    check(grad, 1, params, grad);
    check(hidden, H, params, grad);
    check(average, S, params, grad);
    check(square, SQUARES, params, grad);
    check(above, ABOVE, tensors, grad);
    const auto empty = [&](int64_t rows, int64_t columns) { return at::empty({rows, columns}, grad.options()); };
    Six made = {at::empty_like(hidden),   at::empty_like(average),  at::empty_like(square),
                empty(H + F, tensors),    empty(readouts, params),  empty(readouts, tensors)};
    with_types(grad, readouts, [&]<class T, int R>() {
        check(metas, count, Packed<R>::SIZE, grad);
        const auto to = [](const Tensor& value, int64_t at) { return value.mutable_data_ptr<T>() + at; };
        const auto from = [](const Tensor& value, int64_t at) { return value.const_data_ptr<T>() + at; };
        const auto& [hidden_out, average_out, square_out, pooled, steps, inverse_rms] = made;
        for (int64_t model = 0; model < count; model++) {
            const int64_t t = models[model], p = offsets[t];
            Offsets own(offsets.begin() + t, offsets.begin() + models[model + 1] + 1);
            for (int64_t& offset : own) offset -= p;
            const auto rule = std::make_unique<Weights<T, R>>(from(metas, model * Packed<R>::SIZE), T(bound));
            forward<T, R>(
                *rule,
                {from(grad, p), {from(hidden, H * p), from(average, S * p), from(square, SQUARES * p)},
                 from(above, ABOVE * t), {to(hidden_out, H * p), to(average_out, S * p), to(square_out, SQUARES * p)},
                 to(pooled, (H + F) * t), to(steps, readouts * p), to(inverse_rms, readouts * t), scales},
                own);
        }
    });
    return made;
}

Six param_level(
    const Tensor& grad, const Tensor& hidden, const Tensor& average, const Tensor& square, const Tensor& above,
    const Tensor& params_in, const Tensor& meta, double bound, int64_t readouts, bool scales) {
    const Offsets offsets = offsets_of(params_in), one = {0, params_in.numel()};
    return forward_models(grad, hidden, average, square, above, offsets, one, meta, bound, readouts, scales);
}

// The same where models have meta-parameters of their own, as evolution strategies try them side by side.
Six param_levels(
    const Tensor& grad, const Tensor& hidden, const Tensor& average, const Tensor& square, const Tensor& above,
    const Tensor& params_in, const Tensor& tensors_in, const Tensor& metas, double bound, int64_t readouts,
    bool scales) {
    const Offsets offsets = offsets_of(params_in), models = offsets_of(tensors_in);
    TORCH_CHECK(
        models.back() == params_in.numel(), "models of ", models.back(), " tensors together, but there are ",
        params_in.numel());
    return forward_models(grad, hidden, average, square, above, offsets, models, metas, bound, readouts, scales);
}

Six param_level_backward(
    const MaybeTensor& to_hidden, const MaybeTensor& to_average, const MaybeTensor& to_square,
    const MaybeTensor& to_pooled, const MaybeTensor& to_steps, const Tensor& grad, const Tensor& hidden,
    const Tensor& average, const Tensor& square, const Tensor& above, const Tensor& params_in, const Tensor& meta,
    const Tensor& steps, const Tensor& inverse_rms, double bound, bool scales, bool with_grad) {
    const Offsets offsets = offsets_of(params_in);
    const int64_t params = offsets.back(), tensors = params_in.numel(), readouts = steps.size(0);
    const auto check_given = [&](const MaybeTensor& value, int64_t rows, int64_t columns) {
        if (value.has_value()) check(*value, rows, columns, grad);
    };
    check_given(to_hidden, H, params);
    check_given(to_average, S, params);
    check_given(to_square, SQUARES, params);
    check_given(to_pooled, H + F, tensors);
    check_given(to_steps, readouts, params);
    Six made = {at::empty({with_grad ? params : 0}, grad.options()), at::empty_like(hidden), at::empty_like(average),
                at::empty_like(square), at::empty({3 * H + 1 + LONG, tensors}, grad.options()), at::empty_like(meta)};
    with_types(grad, readouts, [&]<class T, int R>() {
        const auto rule = std::make_unique<Weights<T, R>>(meta.const_data_ptr<T>(), T(bound));
        const auto to = [](const Tensor& value) { return value.mutable_data_ptr<T>(); };
        const auto from = [](const Tensor& value) { return value.const_data_ptr<T>(); };
        const auto& [out_grad, out_hidden, out_average, out_square, out_above, out_rule] = made;
        backward<T, R>(
            *rule,
            {from(grad), {from(hidden), from(average), from(square)}, from(above), from(steps), from(inverse_rms), scales,
             {data<T>(to_hidden), data<T>(to_average), data<T>(to_square)}, data<T>(to_pooled), data<T>(to_steps),
             with_grad ? to(out_grad) : nullptr, {to(out_hidden), to(out_average), to(out_square)}, to(out_above),
             to(out_rule)},
            offsets);
    });
    return made;
}

}  // namespace

TORCH_LIBRARY(HRNN_LIBRARY, library) {
    library.def("param_level", &param_level);
    library.def("param_level_backward", &param_level_backward);
    library.def("param_levels", &param_levels);
}

}  // namespace hrnn
