// The operator that torch sees.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "network_tasks.h"

namespace hrnn {

using at::Tensor;
using at::TensorList;

namespace {

void check(const Tensor& value, int64_t count, at::ScalarType type) {
    TORCH_CHECK(
        value.is_contiguous() && value.is_cpu() && value.numel() == count && value.scalar_type() == type,
        "fused tasks need contiguous CPU tensors; got ", value.sizes(), " of ", value.scalar_type(), " where ", count,
        " values of ", type, " belong");
}

// A program is what `programs.py` writes: of each task the numbers of `Task`, then those of its operations.
template <class T>
std::vector<Task<T>> read_tasks(
    const Tensor& program, TensorList inputs, TensorList targets, TensorList picked, at::ScalarType type) {
    check(program, program.numel(), at::kLong);
    const int64_t *at = program.const_data_ptr<int64_t>(), *end = at + program.numel();
    std::vector<Task<T>> tasks;
    for (size_t t = 0; at < end; t++) {
        Task<T> task{};
        task.first_model = *at++;
        task.instances = *at++;
        task.points = *at++;
        task.examples = *at++;
        task.features = *at++;
        task.tokens = *at++;
        task.score = Score(*at++);
        task.outputs = *at++;
        task.at_outputs = *at++;
        task.rows = *at++;
        const int64_t operations = *at++;
        for (int64_t i = 0; i < operations; i++, at += 7)
            task.operations.push_back({Kind(at[0]), at[1], at[2], at[3], at[4], at[5], at[6]});
        const bool classes = task.score == Score::CrossEntropy;
        check(inputs[t], task.instances * task.points * task.features, task.tokens ? at::kLong : type);
        check(targets[t], task.instances * task.points * (classes ? 1 : task.outputs), classes ? at::kLong : type);
        task.inputs = inputs[t].const_data_ptr();
        task.targets = targets[t].const_data_ptr();
        if (picked[t].numel() > 0) {
            check(picked[t], task.instances * task.examples, at::kLong);
            task.picked = picked[t].const_data_ptr<int64_t>();
        }
        tasks.push_back(std::move(task));
    }
    return tasks;
}

std::tuple<Tensor, Tensor> task_losses_of(
    const Tensor& params, int64_t models, const Tensor& program, TensorList inputs, TensorList targets,
    TensorList picked, bool with_grad) {
    check(params, params.numel(), params.scalar_type());
    const Tensor losses = at::empty({models}, params.options());
    const Tensor grads = at::zeros({with_grad ? params.numel() : 0}, params.options());
    const auto run = [&](auto zero) {
        using T = decltype(zero);
        task_losses<T>(
            read_tasks<T>(program, inputs, targets, picked, params.scalar_type()), params.const_data_ptr<T>(),
            losses.mutable_data_ptr<T>(), with_grad ? grads.mutable_data_ptr<T>() : nullptr);
    };
    if (params.scalar_type() == at::kFloat)
        run(0.0f);
    else
        run(0.0);
    return {losses, grads};
}

}  // namespace

TORCH_LIBRARY(HRNN_LIBRARY, library) {
    library.def(
        "task_losses(Tensor params, int models, Tensor program, Tensor[] inputs, Tensor[] targets, Tensor[] picked, "
        "bool with_grad) -> (Tensor, Tensor)",
        &task_losses_of);
}

}  // namespace hrnn
