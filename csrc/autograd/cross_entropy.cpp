#include <torch/library.h>

#include "autograd/recorded.h"
#include "composite/reduce.h"

namespace masked_loss::autograd {
namespace {

struct CrossEntropyCall {
  const Tensor& target;
  const OptionalTensor& mask;
  const CrossEntropyOptions& options;
  at::ScalarType type;  // of the result
};

struct CrossEntropyFunction : Function<CrossEntropyFunction> {
  static constexpr auto name = "CrossEntropyBackward";

  static Tensor forward(AutogradContext* ctx, const Tensor& input, const CrossEntropyCall& of) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto& [target, mask, options, type] = of;
    // What hooks take is not made here, so that they take one tensor of the input's size.
    const bool made = makes_gradient(input, options.reduction) && !has_hooks();
    const auto [loss, result] = made ? call<CrossEntropyForwardGrad>(input, target, mask, options)
                                     : call<CrossEntropyForward>(input, target, mask, options);
    save_call(ctx, {result, made ? Tensor() : input, target, or_undefined(mask)}, options);
    if (made) save_unread(ctx, input);
    return converted(loss, type);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto [tensors, options] = load_call<CrossEntropyOptions>(ctx);
    const auto &grad = grads[0], &result = tensors[0], &saved_input = tensors[1], &target = tensors[2];
    const auto mask = or_nullopt(tensors[3]);
    const bool made = !saved_input.defined();
    Tensor gradient;
    if (differentiated_again(grads)) {
      const auto input = made ? load_unread(ctx, CrossEntropy::name) : saved_input;
      gradient = composite_cross_entropy_backward(grad, input, target, result, mask, options);
    } else if (made) {
      gradient = scaled_gradient(result, grad, /*shared=*/false);
    } else {
      gradient = call<CrossEntropyBackward>(grad, saved_input, target, result, mask, options);
    }
    release_unread(ctx);
    return {gradient, Tensor()};
  }
};

Tensor recorded(const Tensor& input, const CrossEntropyCall& of) {
  // Hooks are given a copy that nobody else can change.
  return CrossEntropyFunction::apply(has_hooks() ? input.clone() : input, of);
}

// The public op, below autograd, which gives no softmax. Its dtype is decided here, above a compiled graph.
Tensor plain(const Tensor& input, const CrossEntropyCall& of) {
  auto options = of.options;
  options.dtype = of.type;
  const at::AutoDispatchBelowADInplaceOrView below;
  return call<CrossEntropy>(input, of.target, of.mask, options);
}

// For a sample_weight that is differentiated: the inner op's losses of the rows, and the N-sized rest in ATen ops.
Tensor with_weights(const Tensor& input, const CrossEntropyCall& of) {
  const auto& options = of.options;
  const auto rows = check_cross_entropy(input, of.target, of.mask, options);
  const auto type = accumulation_type(input.scalar_type());
  const auto plan = composite_plan(rows, options.reduction, options.normalizer, type);
  auto unweighted = options;
  unweighted.reduction = Reduction::None;
  unweighted.sample_weight = unweighted.normalizer = std::nullopt;
  const CrossEntropyCall losses_of{of.target, plan.keep, unweighted, type};
  const auto losses = wants_grad(input) ? recorded(input, losses_of) : plain(input, losses_of);
  return composite_reduce(losses, plan.keep, plan.coefficient, options.reduction).to(of.type);
}

Tensor cross_entropy(const Tensor& input, const Tensor& target, const OptionalTensor& mask,
                     const CrossEntropyOptions& options) {
  check_cross_entropy(input, target, mask, options);
  const auto type = cross_entropy_result_type(input, target, options);
  const auto path = path_of(std::tie(input, options.sample_weight), target, options.weight);
  if (path == Path::Composite) return composite_cross_entropy(input, target, mask, options).to(type);
  const auto [logits, targets] = in_one_dtype(input, target, options.dtype);
  const CrossEntropyCall of{targets, mask, options, type};
  if (wants_grad(options.sample_weight)) return with_weights(logits, of);
  return path == Path::Recorded ? recorded(logits, of) : plain(logits, of);
}

// Integers, without a derivative: here for its check alone, which has a word for tensors of other layouts.
Tensor check_targets(const Tensor& target, c10::SymInt num_classes, const OptionalTensor& mask,
                     at::IntArrayRef ignore_index) {
  check_check_targets(target, num_classes, mask, ignore_index);
  const at::AutoDispatchBelowADInplaceOrView below;
  return call<CheckTargets>(target, num_classes, mask, ignore_index);
}

// A count, without a derivative.
Tensor loss_normalizer(const Tensor& target, const OptionalTensor& mask, const LossNormalizerOptions& options) {
  check_loss_normalizer(target, mask, options);
  const at::NoGradGuard no_grad;
  const at::AutoDispatchBelowADInplaceOrView below;
  return call<LossNormalizer>(target, mask, options);
}

}  // namespace

TORCH_LIBRARY_IMPL(masked_loss, Autograd, m) {
  impl<CrossEntropy, cross_entropy>(m);
  impl<CheckTargets, check_targets>(m);
  impl<LossNormalizer, loss_normalizer>(m);
  implement_inner(
      m, {CrossEntropyForward::name, CrossEntropyForwardGrad::name, CrossEntropyBackward::name, ScaleGradient_::name});
}

TORCH_LIBRARY_IMPL(masked_loss, ADInplaceOrView, m) {
  m.impl(ScaleGradient_::name, torch::autograd::autogradNotImplementedInplaceOrViewFallback());
}

}  // namespace masked_loss::autograd
