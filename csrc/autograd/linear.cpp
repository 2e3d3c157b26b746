#include <torch/library.h>

#include "autograd/recorded.h"
#include "composite/linear.h"
#include "composite/reduce.h"

namespace masked_loss::autograd {
namespace {

// What the custom functions are given beside the tensors that they have gradients for.
struct LinearCall {
  const Tensor& target;
  const OptionalTensor& mask;
  const LinearOptions& options;
};

// With the bias as autograd gives it to the function, and what has a gradient.
LinearOptions options_of(const LinearCall& of, const Tensor& input, const Tensor& linear_weight,
                         const OptionalTensor& linear_bias) {
  auto options = of.options;
  options.loss.linear_bias = linear_bias;
  options.input_grad = input.requires_grad();
  options.weight_grad = linear_weight.requires_grad();
  options.bias_grad = linear_bias && linear_bias->requires_grad();
  return options;
}

variable_list composite_backward(const variable_list& grads, const Tensor& input, const Tensor& linear_weight,
                                 const Tensor& target, const OptionalTensor& mask, const LinearOptions& options) {
  const auto [input_gradient, weight_gradient, bias_gradient] = composite_linear_gradients(
      grads[0], grads.size() > 1 ? grads[1] : Tensor(), input, linear_weight, target, mask, options);
  return {input_gradient, weight_gradient, bias_gradient, Tensor()};
}

// A scalar, whose gradients are made chunk by chunk, while the logits are at hand.
struct LinearScalarFunction : Function<LinearScalarFunction> {
  static constexpr auto name = "LinearCrossEntropyBackward";

  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& linear_weight,
                        const OptionalTensor& linear_bias, const LinearCall& of) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto options = options_of(of, input, linear_weight, linear_bias);
    const auto [loss, input_gradient, weight_gradient, bias_gradient] =
        call<LinearForwardGrad>(input, linear_weight, of.target, of.mask, options);
    const auto if_wanted = [](const Tensor& gradient, bool wanted) { return wanted ? gradient : Tensor(); };
    save_call(ctx,
              {if_wanted(input_gradient, options.input_grad), if_wanted(weight_gradient, options.weight_grad),
               if_wanted(bias_gradient, options.bias_grad), input, linear_weight, of.target, or_undefined(of.mask)},
              options);
    return loss;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto [tensors, options] = load_call<LinearOptions>(ctx);
    if (differentiated_again(grads)) {
      return composite_backward(grads, tensors[3], tensors[4], tensors[5], or_nullopt(tensors[6]), options);
    }
    variable_list gradients(4);
    for (int i = 0; i < 3; ++i) {
      if (tensors[i].defined()) gradients[i] = scaled_gradient(tensors[i], grads[0], /*shared=*/false);
    }
    return gradients;
  }
};

// Losses and entropies of rows, or a scalar of float16: the backward pass makes the logits again.
struct LinearRowsFunction : Function<LinearRowsFunction> {
  static constexpr auto name = "LinearRowsBackward";

  static variable_list forward(AutogradContext* ctx, const Tensor& input, const Tensor& linear_weight,
                               const OptionalTensor& linear_bias, const LinearCall& of) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto options = options_of(of, input, linear_weight, linear_bias);
    const auto [loss, entropy, states] = call<LinearRowsForward>(input, linear_weight, of.target, of.mask, options);
    save_call(ctx, {states, input, linear_weight, of.target, or_undefined(of.mask)}, options);
    if (options.kind != LinearKind::LogProbAndEntropy) return {loss};
    return {loss, entropy};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto [tensors, options] = load_call<LinearOptions>(ctx);
    const auto &states = tensors[0], &input = tensors[1], &linear_weight = tensors[2], &target = tensors[3];
    const auto mask = or_nullopt(tensors[4]);
    if (differentiated_again(grads)) {
      return composite_backward(grads, input, linear_weight, target, mask, options);
    }
    const auto& entropy_grad = grads.size() > 1 ? OptionalTensor(grads[1]) : std::nullopt;
    const auto [input_gradient, weight_gradient, bias_gradient] =
        call<LinearRowsBackward>(grads[0], entropy_grad, input, linear_weight, target, states, mask, options);
    return {options.input_grad ? input_gradient : Tensor(), options.weight_grad ? weight_gradient : Tensor(),
            options.bias_grad ? bias_gradient : Tensor(), Tensor()};
  }
};

// Loss and, of its kind, entropy, in the accumulation dtype; recorded or not.
LinearResult rows_of(const LinearOperands& of, const LinearCall& call_of) {
  if (wants_grad(of.input) || wants_grad(of.linear_weight) || wants_grad(of.linear_bias)) {
    const auto results = LinearRowsFunction::apply(of.input, of.linear_weight, of.linear_bias, call_of);
    return {results[0], results.size() > 1 ? results[1] : Tensor()};
  }
  auto options = call_of.options;
  options.loss.linear_bias = of.linear_bias;
  const at::AutoDispatchBelowADInplaceOrView below;
  const auto [loss, entropy, states] =
      call<LinearRowsForward>(of.input, of.linear_weight, call_of.target, call_of.mask, options);
  return {loss, entropy};
}

Path path_of_linear(const LinearOperands& of, const OptionalTensor& sample_weight) {
  return path_of(std::tie(of.input, of.linear_weight, of.linear_bias, sample_weight));
}

// For a sample_weight that is differentiated: the losses of the rows, and the N-sized rest in ATen ops.
Tensor with_weights(const LinearOperands& of, const Tensor& target, const OptionalTensor& mask,
                    const LinearOptions& options) {
  const auto rows = check_linear(of.input, of.linear_weight, target, mask, options);
  const auto& loss = options.loss;
  const auto plan = composite_plan(rows, loss.reduction, loss.normalizer, accumulation_type(of.input.scalar_type()));
  auto unweighted = options;
  unweighted.loss.reduction = Reduction::None;
  unweighted.loss.sample_weight = unweighted.loss.normalizer = std::nullopt;
  const OptionalTensor keep = plan.keep;
  const auto losses = rows_of(of, {target, keep, unweighted}).loss;
  return composite_reduce(losses, plan.keep, plan.coefficient, loss.reduction);
}

Tensor linear_cross_entropy(const Tensor& input, const Tensor& linear_weight, const Tensor& target,
                            const OptionalTensor& mask, const LinearCrossEntropyOptions& given) {
  auto options = linear_options(given);
  const auto of = linear_operands(input, linear_weight, given.linear_bias, given.dtype);
  options.loss.linear_bias = of.linear_bias;
  check_linear(of.input, of.linear_weight, target, mask, options);
  const auto type = linear_result_type(of.input, given.dtype);
  const auto path = path_of_linear(of, given.sample_weight);
  if (path == Path::Composite) return composite_linear(of.input, of.linear_weight, target, mask, options).loss.to(type);
  if (wants_grad(given.sample_weight)) return with_weights(of, target, mask, options).to(type);
  if (path == Path::Plain) {
    options.loss.dtype = type;  // decided here, above a compiled graph
    const at::AutoDispatchBelowADInplaceOrView below;
    return call<LinearCrossEntropy>(of.input, of.linear_weight, target, mask, options.loss);
  }
  const LinearCall call_of{target, mask, options};
  // What hooks take is not made here, so that they take no gradient of a head.
  const bool made = makes_gradient(of.input, given.reduction) && !has_hooks();
  const auto loss = made ? LinearScalarFunction::apply(of.input, of.linear_weight, of.linear_bias, call_of)
                         : rows_of(of, call_of).loss;
  return converted(loss, type);
}

LinearResult log_prob_of(const Tensor& input, const Tensor& linear_weight, const Tensor& index,
                         const OptionalTensor& mask, const LinearLogProbOptions& given, LinearKind kind) {
  return linear_log_prob_by(input, linear_weight, given, kind, [&](const auto& of, const auto& options) {
    check_linear(of.input, of.linear_weight, index, mask, options);
    return path_of_linear(of, std::nullopt) == Path::Composite
               ? composite_linear(of.input, of.linear_weight, index, mask, options)
               : rows_of(of, {index, mask, options});
  });
}

Tensor linear_log_prob(const Tensor& input, const Tensor& linear_weight, const Tensor& index,
                       const OptionalTensor& mask, const LinearLogProbOptions& options) {
  return log_prob_of(input, linear_weight, index, mask, options, LinearKind::LogProb).loss;
}

std::tuple<Tensor, Tensor> linear_log_prob_and_entropy(const Tensor& input, const Tensor& linear_weight,
                                                       const Tensor& index, const OptionalTensor& mask,
                                                       const LinearLogProbOptions& options) {
  const auto result = log_prob_of(input, linear_weight, index, mask, options, LinearKind::LogProbAndEntropy);
  return {result.loss, result.entropy};
}

}  // namespace

TORCH_LIBRARY_IMPL(masked_loss, Autograd, m) {
  impl<LinearCrossEntropy, linear_cross_entropy>(m);
  impl<LinearLogProb, linear_log_prob>(m);
  impl<LinearLogProbAndEntropy, linear_log_prob_and_entropy>(m);
  implement_inner(m, {LinearForwardGrad::name, LinearRowsForward::name, LinearRowsBackward::name});
}

}  // namespace masked_loss::autograd
