#include <ATen/SavedTensorHooks.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "autograd/gradients.h"
#include "common/paths.h"
#include "composite/pointwise.h"

namespace masked_loss::autograd {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

struct PointwiseFunction : Function<PointwiseFunction> {
  static constexpr bool is_traceable = true;

  // `other` is given by itself, as it may be differentiated.
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& target, const OptionalTensor& other,
                        const OptionalTensor& mask, const PointwiseOptions& options, at::ScalarType type) {
    const at::AutoDispatchBelowADInplaceOrView below;
    Tensor loss, gradient, other_gradient;
    if (makes_gradient(input, options)) {
      std::tie(loss, gradient, other_gradient) = call<PointwiseForwardGrad>(input, target, other, mask, options);
    } else {
      loss = call<PointwiseForward>(input, target, other, mask, options);
    }
    const auto or_none = [](const OptionalTensor& tensor) { return tensor.value_or(Tensor()); };
    ctx->save_for_backward({gradient, other_gradient, input, target, or_none(other), or_none(mask),
                            or_none(options.weight), or_none(options.sample_weight), or_none(options.normalizer)});
    ctx->saved_data["reduction"] = static_cast<std::int64_t>(options.reduction);
    ctx->saved_data["loss"] = options.loss;
    ctx->saved_data["numbers"] = options.numbers;
    ctx->saved_data["shared"] = at::SavedTensorDefaultHooks::get_hooks().has_value();
    return converted(loss, type);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const auto &grad = grads[0], &input = saved[2], &target = saved[3];
    const auto other = optional(saved[4]), mask = optional(saved[5]);
    const PointwiseOptions options{static_cast<Reduction>(ctx->saved_data["reduction"].toInt()),
                                   ctx->saved_data["loss"].toInt(),
                                   optional(saved[6]),
                                   optional(saved[7]),
                                   optional(saved[8]),
                                   ctx->saved_data["numbers"].toDoubleVector()};
    Tensor gradient, other_gradient;
    if (differentiated_again(grads)) {
      std::tie(gradient, other_gradient) = composite_pointwise_backward(grad, input, target, other, mask, options);
    } else if (makes_gradient(input, options)) {
      const bool shared = ctx->saved_data["shared"].toBool();
      gradient = scaled_gradient(saved[0], grad, shared);
      if (has_other_slope(options)) other_gradient = scaled_gradient(saved[1], grad, shared);
    } else {
      std::tie(gradient, other_gradient) = call<PointwiseBackward>(grad, input, target, other, mask, options);
    }
    if (!has_other_slope(options)) other_gradient = Tensor();
    return {gradient, Tensor(), other_gradient, Tensor(), Tensor(), Tensor()};
  }

  static bool has_other_slope(const PointwiseOptions& options) {
    return pointwise_traits(options.loss).has_other_slope;
  }

  // As for cross entropy: a scalar's gradient is made in the forward pass, but float16's, which a loss scale must
  // reach.
  static bool makes_gradient(const Tensor& input, const PointwiseOptions& options) {
    return options.reduction != Reduction::None && input.scalar_type() != at::kHalf;
  }
};

Tensor pointwise(const PointwiseCall& public_call) {
  static const auto forward = PointwiseForward::find(PointwiseForward::name);
  const auto call = resolve_pointwise(public_call);
  const auto& options = call.options;
  const auto type = result_type(call.input, call.input.scalar_type(), call.dtype);
  // Kernels have the slopes in input and in a variance; others are the composite's.
  const bool composed = functorch_active() || has_tangent(call.input) || has_tangent(call.other) ||
                        is_differentiated(call.target) || is_differentiated(options.weight) ||
                        is_differentiated(options.sample_weight) || !has_kernel(forward, call.input);
  if (composed) return composite_pointwise(call).to(type);
  if (wants_grad(call.input) || wants_grad(call.other)) {
    return PointwiseFunction::apply(call.input, call.target, call.other, call.mask, options, type);
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return converted(PointwiseForward::call(forward, call.input, call.target, call.other, call.mask, options), type);
}

}  // namespace

TORCH_LIBRARY_IMPL(masked_loss, Autograd, m) {
  implement_pointwise<pointwise>(m);
  for (const auto* op : {"_pointwise_forward", "_pointwise_forward_grad", "_pointwise_backward"}) {
    m.impl(op, torch::autograd::autogradNotImplementedFallback());
  }
}

}  // namespace masked_loss::autograd
