// The operators of the deployment step, as torch sees them. See step.h.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "step.h"

namespace hrnn {

namespace {

using at::Tensor;
using at::TensorList;

Kind kind_of(const Tensor& value) {
    switch (value.scalar_type()) {
        case at::kFloat: return Kind::Float;
        case at::kBFloat16: return Kind::BFloat16;
        case at::kHalf: return Kind::Half;
        case at::kDouble: return Kind::Double;
        default: TORCH_CHECK(false, "the fused step knows no parameters of type ", value.scalar_type());
    }
}

void check(const Tensor& value, int64_t count) {
    TORCH_CHECK(
        value.is_contiguous() && value.is_cpu() && value.numel() == count,
        "the fused step needs contiguous CPU tensors; got ", value.sizes(), " where ", count, " values belong");
}

// Steps of all tensors lie end to end, [R, n] of each.
void place_steps(std::vector<Work>& work, const Tensor& steps, int64_t readouts) {
    float* at = steps.mutable_data_ptr<float>();
    for (Work& tensor : work) {
        tensor.steps = at;
        at += readouts * tensor.count;
    }
}

std::tuple<Tensor, Tensor> measure_step(
    TensorList params, TensorList grads, TensorList hidden, TensorList average, TensorList square, const Tensor& above,
    const Tensor& log_rates, const Tensor& meta, double bound, int64_t readouts) {
    const int64_t tensors = params.size();
    check(above, ABOVE * tensors);
    check(log_rates, tensors);
    std::vector<Work> work;
    int64_t count = 0;
    for (int64_t t = 0; t < tensors; t++) {
        const int64_t n = params[t].numel();
        check(params[t], n);
        check(grads[t], n);
        check(hidden[t], H * n);
        check(average[t], S * n);
        check(square[t], SQUARES * n);
        TORCH_CHECK(
            hidden[t].scalar_type() == hidden[0].scalar_type() && average[t].scalar_type() == hidden[0].scalar_type() &&
                square[t].scalar_type() == hidden[0].scalar_type(),
            "all states must be kept in one precision");
        work.push_back(
            {params[t].data_ptr(), grads[t].const_data_ptr(), hidden[t].data_ptr(), average[t].data_ptr(),
             square[t].data_ptr(), nullptr, nullptr, n, kind_of(params[t]), kind_of(grads[t])});
        count += n;
    }
    const Tensor steps = at::empty({readouts * count}, above.options());
    const Tensor sums = at::empty({H + F + readouts + 1, tensors}, above.options());
    place_steps(work, steps, readouts);
    const auto run = [&](auto stored, auto number) {
        constexpr int R = decltype(number)::value;
        check(meta, Packed<R>::SIZE);
        const auto rule = std::make_unique<Weights<float, R>>(meta.const_data_ptr<float>(), float(bound));
        measure<decltype(stored), R>(
            *rule, work, above.const_data_ptr<float>(), log_rates.const_data_ptr<float>(),
            sums.mutable_data_ptr<float>());
    };
    const auto run_with = [&](auto stored) {
        if (readouts == 1)
            run(stored, std::integral_constant<int, 1>());
        else
            run(stored, std::integral_constant<int, 2>());
    };
    TORCH_CHECK(readouts == 1 || readouts == 2, "one or two readouts, not ", readouts);
    const auto state_type = hidden[0].scalar_type();
    TORCH_CHECK(state_type == at::kFloat || state_type == at::kBFloat16, "no states of type ", state_type);
    if (state_type == at::kFloat)
        run_with(float());
    else
        run_with(c10::BFloat16());
    return {steps, sums};
}

void apply_step(
    TensorList params, TensorList lookaheads, const Tensor& steps, const Tensor& scale, const Tensor& limit,
    const Tensor& decay) {
    const int64_t tensors = params.size(), readouts = scale.size(0);
    check(scale, readouts * tensors);
    check(limit, readouts * tensors);
    check(decay, tensors);
    std::vector<Work> work;
    int64_t count = 0;
    for (int64_t t = 0; t < tensors; t++) {
        const int64_t n = params[t].numel();
        check(params[t], n);
        Work tensor{};
        tensor.param = params[t].data_ptr();
        tensor.param_kind = kind_of(params[t]);
        tensor.count = n;
        if (!lookaheads.empty()) {
            check(lookaheads[t], n);
            TORCH_CHECK(lookaheads[t].scalar_type() == params[t].scalar_type(), "a lookahead has its parameter's type");
            tensor.lookahead = lookaheads[t].data_ptr();
        }
        work.push_back(tensor);
        count += n;
    }
    check(steps, readouts * count);
    place_steps(work, steps, readouts);
    const float *scales = scale.const_data_ptr<float>(), *limits = limit.const_data_ptr<float>();
    const float* decays = decay.const_data_ptr<float>();
    if (readouts == 1)
        apply<1>(work, scales, limits, decays);
    else
        apply<2>(work, scales, limits, decays);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(HRNN_LIBRARY, library) {
    library.def(
        "measure_step(Tensor[] params, Tensor[] grads, Tensor(a!)[] hidden, Tensor(b!)[] average, Tensor(c!)[] square, "
        "Tensor above, Tensor log_rates, Tensor meta, float bound, int readouts) -> (Tensor, Tensor)",
        &measure_step);
    library.def(
        "apply_step(Tensor(a!)[] params, Tensor(b!)[] lookaheads, Tensor steps, Tensor scale, Tensor limit, "
        "Tensor decay) -> ()",
        &apply_step);
}

}  // namespace hrnn
