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

// For a sample_weight that is differentiated: losses_of(keep, options), those of the rows, and the N-sized rest in ATen
// ops.
template <class Options, class Losses>
Tensor with_weights(const RowArguments& rows, const Tensor& input, const Options& options, const Losses& losses_of) {
  const auto plan = composite_plan(rows, options.reduction, options.normalizer, accumulation_type(input.scalar_type()));
  auto unweighted = options;
  unweighted.reduction = Reduction::None;
  unweighted.sample_weight = unweighted.normalizer = std::nullopt;
  return composite_reduce(losses_of(OptionalTensor(plan.keep), unweighted), plan.keep, plan.coefficient,
                          options.reduction);
}

Tensor linear_cross_entropy(const Tensor& input, const Tensor& linear_weight, const Tensor& target,
                            const OptionalTensor& mask, const LinearCrossEntropyOptions& given) {
  auto options = linear_options(given);
  const auto of = linear_operands(input, linear_weight, given.linear_bias, given.dtype);
  options.loss.linear_bias = of.linear_bias;
  const auto rows = check_linear(of.input, of.linear_weight, target, mask, options);
  const auto type = linear_result_type(of.input, given.dtype);
  const auto path = path_of_linear(of, given.sample_weight);
  if (path == Path::Composite) return composite_linear(of.input, of.linear_weight, target, mask, options).loss.to(type);
  if (wants_grad(given.sample_weight)) {
    const auto losses_of = [&](const OptionalTensor& keep, const LinearCrossEntropyOptions& unweighted) {
      return rows_of(of, {target, keep, linear_options(unweighted)}).loss;
    };
    return with_weights(rows, of.input, options.loss, losses_of).to(type);
  }
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

// Divergences; what a scalar's gradients are is saved, and those of rows are made in the backward pass.
struct LinearKLFunction : Function<LinearKLFunction> {
  static constexpr auto name = "LinearKLBackward";

  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& linear_weight,
                        const OptionalTensor& linear_bias, const Tensor& target_input,
                        const Tensor& target_linear_weight, const OptionalTensor& target_linear_bias,
                        const OptionalTensor& mask, const LinearKLOptions& options, bool made) {
    const at::AutoDispatchBelowADInplaceOrView below;
    LinearKLCall of{options};
    of.kl.linear_bias = linear_bias;
    of.kl.target_linear_bias = target_linear_bias;
    const auto wants = [](const OptionalTensor& tensor) { return tensor && tensor->requires_grad(); };
    const bool wanted[] = {wants(input),        wants(linear_weight),        wants(linear_bias),
                           wants(target_input), wants(target_linear_weight), wants(target_linear_bias)};
    for (int i = 0; i < 6; ++i) of.wanted |= std::int64_t(wanted[i]) << i;
    auto now = of;
    if (!made) now.wanted = 0;
    const auto results =
        call<LinearKLGradients>(input, linear_weight, target_input, target_linear_weight, mask, OptionalTensor(), now);
    return std::apply(
        [&](const Tensor& loss, const auto&... gradient) {
          variable_list saved{gradient...};
          for (int i = 0; i < 6; ++i) {
            if (!now.wants(i)) saved[i] = Tensor();
          }
          saved.insert(saved.end(), {input, linear_weight, target_input, target_linear_weight, or_undefined(mask)});
          save_call(ctx, std::move(saved), of);
          return loss;
        },
        results);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = load_call<LinearKLCall>(ctx);
    const auto& tensors = saved.tensors;
    const auto& of = saved.options;  // no structured binding: lambdas capture it
    const auto *gradient = tensors.data(), *operand = gradient + 6;
    const auto mask = or_nullopt(operand[4]);
    const auto listed = [&](const auto& gradients) {
      variable_list all(9);  // of mask, options and `made` there are none
      for (int i = 0; i < 6; ++i) {
        if (of.wants(i)) all[i] = gradients[i];
      }
      return all;
    };
    if (differentiated_again(grads)) {
      const LinearKLOperands operands{operand[0], operand[1], or_undefined(of.kl.linear_bias),
                                      operand[2], operand[3], or_undefined(of.kl.target_linear_bias)};
      return listed(composite_linear_kl_gradients(grads[0], operands, mask, of));
    }
    if (std::any_of(gradient, gradient + 6, [](const Tensor& made) { return made.defined(); })) {
      std::array<Tensor, 6> scaled;
      for (int i = 0; i < 6; ++i) {
        if (of.wants(i)) scaled[i] = scaled_gradient(gradient[i], grads[0], /*shared=*/false);
      }
      return listed(scaled);
    }
    const auto results =
        call<LinearKLGradients>(operand[0], operand[1], operand[2], operand[3], mask, OptionalTensor(grads[0]), of);
    return std::apply([&](const Tensor&, const auto&... made) { return listed(std::array<Tensor, 6>{made...}); },
                      results);
  }
};

Tensor linear_kl(const Tensor& input, const Tensor& linear_weight, const Tensor& target_input,
                 const Tensor& target_linear_weight, const OptionalTensor& mask, const LinearKLOptions& given) {
  const auto of = linear_kl_operands(input, linear_weight, target_input, target_linear_weight, given);
  auto options = given;
  options.linear_bias = or_nullopt(of[2]);
  options.target_linear_bias = or_nullopt(of[5]);
  const auto index = linear_kl_index(input);
  const auto rows = check_linear_kl(of[0], of[1], of[3], of[4], index, mask, options);
  const auto type = linear_result_type(of[0], given.dtype);
  const auto path = path_of(
      std::tie(of[0], of[1], options.linear_bias, of[3], of[4], options.target_linear_bias, given.sample_weight));
  if (path == Path::Composite) return composite_linear_kl(of, mask, options).to(type);
  const auto losses_of = [&](const OptionalTensor& keep, const LinearKLOptions& by) {
    if (std::any_of(of.begin(), of.end(),
                    [](const Tensor& operand) { return operand.defined() && wants_grad(operand); })) {
      const bool made = makes_gradient(of[0], by.reduction) && !has_hooks();
      return LinearKLFunction::apply(of[0], of[1], by.linear_bias, of[3], of[4], by.target_linear_bias, keep, by, made);
    }
    const at::AutoDispatchBelowADInplaceOrView below;
    return std::get<0>(call<LinearKLGradients>(of[0], of[1], of[3], of[4], keep, OptionalTensor(), LinearKLCall{by}));
  };
  if (wants_grad(given.sample_weight)) return with_weights(rows, of[0], options, losses_of).to(type);
  if (path == Path::Recorded) return converted(losses_of(mask, options), type);
  options.dtype = type;  // decided here, above a compiled graph
  const at::AutoDispatchBelowADInplaceOrView below;
  return call<LinearKL>(of[0], of[1], of[3], of[4], mask, options);
}

}  // namespace

TORCH_LIBRARY_IMPL(masked_loss, Autograd, m) {
  impl<LinearCrossEntropy, linear_cross_entropy>(m);
  impl<LinearLogProb, linear_log_prob>(m);
  impl<LinearLogProbAndEntropy, linear_log_prob_and_entropy>(m);
  impl<LinearKL, linear_kl>(m);
  implement_inner(
      m, {LinearKLGradients::name, LinearForwardGrad::name, LinearRowsForward::name, LinearRowsBackward::name});
}

}  // namespace masked_loss::autograd
