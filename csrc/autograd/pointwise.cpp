#include <torch/library.h>

#include "autograd/recorded.h"
#include "composite/pointwise.h"

namespace masked_loss::autograd {
namespace {

// The kernels have the slopes in the input and in a variance; others are the composite's.
struct PointwiseFunction : Function<PointwiseFunction> {
  static constexpr auto name = "PointwiseBackward";

  static Tensor forward(AutogradContext* ctx, const Tensor& input, const OptionalTensor& other, const PointwiseCall& of,
                        at::ScalarType type) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto& options = of.options;
    Tensor loss, gradient, other_gradient;
    if (makes_gradient(input, options.reduction)) {
      std::tie(loss, gradient, other_gradient) = call<PointwiseForwardGrad>(input, of.target, other, of.mask, options);
    } else {
      loss = call<PointwiseForward>(input, of.target, other, of.mask, options);
    }
    save_call(ctx, {gradient, other_gradient, input, of.target, or_undefined(other), or_undefined(of.mask)}, options);
    ctx->saved_data["shared"] = has_hooks();
    return converted(loss, type);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto [tensors, options] = load_call<PointwiseOptions>(ctx);
    const auto &grad = grads[0], &input = tensors[2], &target = tensors[3];
    const auto other = or_nullopt(tensors[4]), mask = or_nullopt(tensors[5]);
    const bool has_other_slope = pointwise_traits(options.loss).has_other_slope;
    Tensor gradient, other_gradient;
    if (differentiated_again(grads)) {
      std::tie(gradient, other_gradient) = composite_pointwise_backward(grad, input, target, other, mask, options);
    } else if (makes_gradient(input, options.reduction)) {
      const bool shared = ctx->saved_data["shared"].toBool();
      gradient = scaled_gradient(tensors[0], grad, shared);
      if (has_other_slope) other_gradient = scaled_gradient(tensors[1], grad, shared);
    } else {
      std::tie(gradient, other_gradient) = call<PointwiseBackward>(grad, input, target, other, mask, options);
    }
    return {gradient, has_other_slope ? other_gradient : Tensor(), Tensor(), Tensor()};
  }
};

Tensor pointwise(const PointwiseCall& public_call) {
  const auto of = resolve_pointwise(public_call);
  const auto& options = of.options;
  const auto type = result_type(of.input, of.input.scalar_type(), of.dtype);
  const auto path = path_of(std::tie(of.input, of.other), of.target, options.weight, options.sample_weight);
  if (path == Path::Composite) return composite_pointwise(of).to(type);
  if (path == Path::Recorded) return PointwiseFunction::apply(of.input, of.other, of, type);
  const at::AutoDispatchBelowADInplaceOrView below;
  return converted(call<PointwiseForward>(of.input, of.target, of.other, of.mask, options), type);
}

}  // namespace

TORCH_LIBRARY_IMPL(masked_loss, Autograd, m) {
  implement_pointwise<pointwise>(m);
  implement_inner(m, {PointwiseForward::name, PointwiseForwardGrad::name, PointwiseBackward::name});
}

}  // namespace masked_loss::autograd
