#include "composite/linear.h"

#include <ATen/TensorOperators.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <limits>

#include "common/linear.h"
#include "composite/cross_entropy.h"
#include "composite/reduce.h"
#include "composite/softmax.h"

namespace masked_loss {
namespace {

CrossEntropyOptions of_logits(const LinearCrossEntropyOptions& options) {
  return {.reduction = options.reduction,
          .weight = options.weight,
          .sample_weight = options.sample_weight,
          .class_mask = options.class_mask,
          .normalizer = options.normalizer,
          .ignore_index = options.ignore_index,
          .label_smoothing = options.label_smoothing,
          .z_loss = options.z_loss,
          .dim = -1};
}

bool autocasts(const Tensor& tensor) {
  const auto device = tensor.device().type();
  return at::autocast::is_autocast_available(device) && at::autocast::is_autocast_enabled(device);
}

// Logits in the accumulation dtype; where `keep` is false nothing of a row is read.
template <class Options>
Tensor logits_of(const Tensor& input, const Tensor& linear_weight, const OptionalTensor& linear_bias,
                 const Tensor& keep, const Options& options) {
  const auto type = accumulation_type(input.scalar_type());
  // Autocast, which has cast the operands, would round the logits too; functorch forgets that it is excluded, but it
  // leaves double as it is.
  const auto product_type = autocasts(input) ? at::kDouble : type;
  auto hidden = input.to(product_type);
  hidden = at::where(keep.unsqueeze(-1), hidden, at::zeros_like(hidden));
  const auto bias = linear_bias ? OptionalTensor(linear_bias->to(product_type)) : std::nullopt;
  const auto logits = at::linear(hidden, linear_weight.to(product_type), bias).to(type);
  const auto capped = options.softcap ? at::tanh(logits / *options.softcap) * *options.softcap : logits;
  return options.temperature == 1 ? capped : capped / options.temperature;
}

// The gradients of composite(operands) in those of its operands that are wanted, undefined in others.
template <std::size_t n, class Composite>
std::array<Tensor, n> gradients_of(const std::array<Tensor, n>& operands, const std::array<bool, n>& wanted,
                                   const std::vector<Tensor>& grads, const Composite& composite) {
  std::vector<Tensor> leaves;
  for (std::size_t i = 0; i < n; ++i) {
    if (wanted[i]) leaves.push_back(operands[i]);
  }
  const auto with = [&](const std::vector<Tensor>& given, std::array<Tensor, n> all) {
    for (std::size_t i = 0, next = 0; i < n; ++i) {
      if (wanted[i]) all[i] = given[next++];
    }
    return all;
  };
  const auto gradients =
      composite_gradients(leaves, grads, [&](const std::vector<Tensor>& of) { return composite(with(of, operands)); });
  return with(gradients, {});
}

// The divergences of rows; `keep` says which classes count.
Tensor divergence_of(const Tensor& logits, const Tensor& target_logits, const Tensor& keep,
                     const LinearKLOptions& options) {
  const SoftmaxSlices slices{SoftmaxKind::LogSoftmax, -1, /*causal=*/false};
  const auto log_p = composite_softmax(logits, keep, slices), log_q = composite_softmax(target_logits, keep, slices);
  const auto none = at::zeros_like(log_p);
  // 0 log 0 is 0.
  const auto kl = [&](const Tensor& log_a, const Tensor& log_b) {
    const auto a = log_a.exp();
    const auto absent = a.eq(0);
    return at::where(absent, none, a * at::where(absent, none, log_a - log_b)).sum(-1);
  };
  const auto of = [&]() -> Tensor {
    const bool mixes = options.kind == Divergence::JensenShannon;
    if (options.kind == Divergence::Forward || (mixes && options.beta == 0)) return kl(log_q, log_p);
    if (!mixes || options.beta == 1) return kl(log_p, log_q);
    const auto mixture = options.beta * log_q.exp() + (1 - options.beta) * log_p.exp();
    const auto log_m = at::where(mixture.eq(0), none, mixture).add(at::where(mixture.eq(0), none + 1, none)).log();
    return options.beta * kl(log_q, log_m) + (1 - options.beta) * kl(log_p, log_m);
  }();
  // Rounding may leave less than 0.
  return at::where(of.lt(0), of - of.detach(), of);
}

// Of each row; `keep` is false where one is masked.
Tensor entropy_of(const Tensor& logits, const Tensor& keep, const OptionalTensor& class_mask) {
  auto counted = keep.unsqueeze(-1).expand_as(logits);
  if (class_mask) counted = counted.logical_and(class_mask->ne(0));
  const auto none = at::zeros_like(logits);
  if (TORCH_GUARD_OR_FALSE(logits.sym_size(-1).sym_eq(0))) return logits.sum(-1);
  const auto lowest = at::full_like(logits, -std::numeric_limits<double>::infinity());
  const auto max = at::where(keep, at::where(counted, logits, lowest).detach().amax(-1), at::zeros_like(none.sum(-1)));
  const auto shifted = at::where(counted, logits - max.unsqueeze(-1), none);
  const auto exponentials = at::where(counted, shifted.exp(), none);
  auto sum = exponentials.sum(-1);
  sum = at::where(keep, sum, at::ones_like(sum));
  // 0 times -inf is 0 here.
  const auto finite = at::where(exponentials.eq(0), none, shifted);
  const auto entropy = sum.log() - (exponentials * finite).sum(-1) / sum;
  return at::where(keep, entropy, at::zeros_like(entropy));
}

}  // namespace

LinearResult composite_linear(const Tensor& input, const Tensor& linear_weight, const Tensor& target,
                              const OptionalTensor& mask, const LinearOptions& options) {
  const auto rows = check_linear(input, linear_weight, target, mask, options);
  const auto& loss = options.loss;
  // By the op's own name, and for the rows that are read.
  const auto keep = composite_plan(rows, Reduction::None, std::nullopt, accumulation_type(input.scalar_type())).keep;
  const auto logits = logits_of(input, linear_weight, loss.linear_bias, keep, loss);
  LinearResult result;
  result.loss = composite_cross_entropy(logits, target, mask, of_logits(loss));
  if (options.kind == LinearKind::LogProbAndEntropy) result.entropy = entropy_of(logits, keep, loss.class_mask);
  return result;
}

std::array<Tensor, 3> composite_linear_gradients(const Tensor& grad, const Tensor& entropy_grad, const Tensor& input,
                                                 const Tensor& linear_weight, const Tensor& target,
                                                 const OptionalTensor& mask, const LinearOptions& options) {
  const bool has_entropy = options.kind == LinearKind::LogProbAndEntropy;
  std::vector<Tensor> grads{grad};
  if (has_entropy) grads.push_back(entropy_grad);
  return gradients_of<3>({input, linear_weight, options.loss.linear_bias.value_or(Tensor())},
                         {options.input_grad, options.weight_grad, options.bias_grad}, grads, [&](const auto& of) {
                           auto with_bias = options;
                           with_bias.loss.linear_bias = or_nullopt(of[2]);
                           const auto result = composite_linear(of[0], of[1], target, mask, with_bias);
                           std::vector<Tensor> results{result.loss};
                           if (has_entropy) results.push_back(result.entropy);
                           return results;
                         });
}

Tensor composite_linear_kl(const LinearKLOperands& of, const OptionalTensor& mask, const LinearKLOptions& given) {
  auto options = given;
  options.linear_bias = or_nullopt(of[2]);
  options.target_linear_bias = or_nullopt(of[5]);
  const auto index = linear_kl_index(of[0]);
  const auto rows = check_linear_kl(of[0], of[1], of[3], of[4], index, mask, options);
  const auto type = accumulation_type(of[0].scalar_type());
  const auto keep = composite_plan(rows, Reduction::None, std::nullopt, type).keep;
  const auto logits = logits_of(of[0], of[1], options.linear_bias, keep, options);
  const auto target_logits = logits_of(of[3], of[4], options.target_linear_bias, keep, options);
  auto counted = keep.unsqueeze(-1).expand_as(logits);
  if (options.class_mask) counted = counted.logical_and(options.class_mask->ne(0));
  const auto plan = composite_plan(rows, options.reduction, options.normalizer, type);
  return composite_reduce(divergence_of(logits, target_logits, counted, options), plan.keep, plan.coefficient,
                          options.reduction);
}

std::array<Tensor, 6> composite_linear_kl_gradients(const Tensor& grad, const LinearKLOperands& operands,
                                                    const OptionalTensor& mask, const LinearKLCall& call_of) {
  std::array<bool, 6> wanted;
  for (int i = 0; i < 6; ++i) wanted[i] = call_of.wants(i);
  return gradients_of<6>(operands, wanted, {grad}, [&](const auto& of) {
    return std::vector<Tensor>{composite_linear_kl(of, mask, call_of.kl)};
  });
}

LinearKLOperands linear_kl_operands(const Tensor& input, const Tensor& linear_weight, const Tensor& target_input,
                                    const Tensor& target_linear_weight, const LinearKLOptions& options) {
  const auto of = linear_operands(input, linear_weight, options.linear_bias, options.dtype);
  const auto target = linear_operands(target_input, target_linear_weight, options.target_linear_bias, options.dtype);
  return {of.input,     of.linear_weight,     of.linear_bias.value_or(Tensor()),
          target.input, target.linear_weight, target.linear_bias.value_or(Tensor())};
}

LinearOperands linear_operands(const Tensor& input, const Tensor& linear_weight, const OptionalTensor& linear_bias,
                               std::optional<at::ScalarType> dtype) {
  const bool autocast = autocasts(input);
  const auto cast = [&](const Tensor& tensor) -> Tensor {
    if (dtype == at::kDouble) return converted(tensor, at::kDouble);
    if (!autocast || !tensor.is_floating_point() || tensor.scalar_type() == at::kDouble) return tensor;
    return converted(tensor, at::autocast::get_autocast_dtype(input.device().type()));
  };
  return {cast(input), cast(linear_weight), linear_bias ? OptionalTensor(cast(*linear_bias)) : std::nullopt};
}

}  // namespace masked_loss

namespace masked_loss::composite {
namespace {

Tensor empty_unless_defined(const Tensor& gradient, const Tensor& like) {
  return gradient.defined() ? gradient : at::empty({0}, like.options());
}

// Below autograd: by the inner ops, whatever the device.
Tensor linear_cross_entropy(const Tensor& input, const Tensor& linear_weight, const Tensor& target,
                            const OptionalTensor& mask, const LinearCrossEntropyOptions& given) {
  auto options = linear_options(given);
  const auto of = linear_operands(input, linear_weight, given.linear_bias, given.dtype);
  options.loss.linear_bias = of.linear_bias;
  const auto loss = given.reduction == Reduction::None
                        ? std::get<0>(call<LinearRowsForward>(of.input, of.linear_weight, target, mask, options))
                        : std::get<0>(call<LinearForwardGrad>(of.input, of.linear_weight, target, mask, options));
  return converted(loss, linear_result_type(of.input, given.dtype));
}

LinearResult log_prob_of(const Tensor& input, const Tensor& linear_weight, const Tensor& index,
                         const OptionalTensor& mask, const LinearLogProbOptions& given, LinearKind kind) {
  return linear_log_prob_by(input, linear_weight, given, kind, [&](const auto& of, const auto& options) {
    const auto [loss, entropy, states] = call<LinearRowsForward>(of.input, of.linear_weight, index, mask, options);
    return LinearResult{loss, entropy};
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

// Devices without kernels of ours; their rows have no states.
std::tuple<Tensor, Tensor, Tensor, Tensor> forward_grad(const Tensor& input, const Tensor& linear_weight,
                                                        const Tensor& target, const OptionalTensor& mask,
                                                        const LinearOptions& options) {
  const at::NoGradGuard no_graph;
  const auto loss = composite_linear(input, linear_weight, target, mask, options).loss;
  std::array<Tensor, 3> gradients;
  if (options.input_grad || options.weight_grad || options.bias_grad) {
    gradients = composite_linear_gradients(at::ones_like(loss), {}, input, linear_weight, target, mask, options);
  }
  return {loss, empty_unless_defined(gradients[0], input), empty_unless_defined(gradients[1], input),
          empty_unless_defined(gradients[2], input)};
}

std::tuple<Tensor, Tensor, Tensor> rows_forward(const Tensor& input, const Tensor& linear_weight, const Tensor& target,
                                                const OptionalTensor& mask, const LinearOptions& given) {
  auto options = given;
  options.kind = LinearKind::LogProbAndEntropy;  // what the op gives always
  const auto result = composite_linear(input, linear_weight, target, mask, options);
  auto sizes = result.entropy.sym_sizes().vec();
  sizes.push_back(kLinearState);
  return {result.loss, result.entropy, at::zeros_symint(sizes, result.entropy.options())};
}

LinearGradients rows_backward(const Tensor& grad, const OptionalTensor& entropy_grad, const Tensor& input,
                              const Tensor& linear_weight, const Tensor& target, const Tensor&,
                              const OptionalTensor& mask, const LinearOptions& options) {
  const auto gradients =
      composite_linear_gradients(grad, entropy_grad.value_or(Tensor()), input, linear_weight, target, mask, options);
  return {empty_unless_defined(gradients[0], input), empty_unless_defined(gradients[1], input),
          empty_unless_defined(gradients[2], input)};
}

LinearKLCall with_biases(const LinearKLOptions& options, const LinearKLOperands& of) {
  LinearKLCall result{options};
  result.kl.linear_bias = or_nullopt(of[2]);
  result.kl.target_linear_bias = or_nullopt(of[5]);
  return result;
}

Tensor linear_kl(const Tensor& input, const Tensor& linear_weight, const Tensor& target_input,
                 const Tensor& target_linear_weight, const OptionalTensor& mask, const LinearKLOptions& options) {
  const auto of = linear_kl_operands(input, linear_weight, target_input, target_linear_weight, options);
  const auto loss = std::get<0>(
      call<LinearKLGradients>(of[0], of[1], of[3], of[4], mask, OptionalTensor(), with_biases(options, of)));
  return converted(loss, linear_result_type(of[0], options.dtype));
}

LinearKLResults kl_gradients(const Tensor& input, const Tensor& linear_weight, const Tensor& target_input,
                             const Tensor& target_linear_weight, const OptionalTensor& mask, const OptionalTensor& grad,
                             const LinearKLCall& of) {
  const at::NoGradGuard no_graph;
  const LinearKLOperands operands{input,        linear_weight,        of.kl.linear_bias.value_or(Tensor()),
                                  target_input, target_linear_weight, of.kl.target_linear_bias.value_or(Tensor())};
  const auto loss = composite_linear_kl(operands, mask, of.kl);
  std::array<Tensor, 6> gradients;
  if (of.wanted != 0) {
    gradients = composite_linear_kl_gradients(grad ? grad->expand_as(loss) : at::ones_like(loss), operands, mask, of);
  }
  for (auto& gradient : gradients) gradient = empty_unless_defined(gradient, input);
  return std::tuple_cat(std::tuple{loss}, gradients);
}

Tensor linear_kl_batched(const Tensor& input, const Tensor& linear_weight, const Tensor& target_input,
                         const Tensor& target_linear_weight, const OptionalTensor& mask,
                         const LinearKLOptions& options) {
  const auto of = linear_kl_operands(input, linear_weight, target_input, target_linear_weight, options);
  return composite_linear_kl(of, mask, options).to(linear_result_type(of[0], options.dtype));
}

Tensor linear_cross_entropy_batched(const Tensor& input, const Tensor& linear_weight, const Tensor& target,
                                    const OptionalTensor& mask, const LinearCrossEntropyOptions& given) {
  auto options = linear_options(given);
  const auto of = linear_operands(input, linear_weight, given.linear_bias, given.dtype);
  options.loss.linear_bias = of.linear_bias;
  return composite_linear(of.input, of.linear_weight, target, mask, options)
      .loss.to(linear_result_type(of.input, given.dtype));
}

LinearResult log_prob_batched_of(const Tensor& input, const Tensor& linear_weight, const Tensor& index,
                                 const OptionalTensor& mask, const LinearLogProbOptions& given, LinearKind kind) {
  return linear_log_prob_by(input, linear_weight, given, kind, [&](const auto& of, const auto& options) {
    return composite_linear(of.input, of.linear_weight, index, mask, options);
  });
}

Tensor linear_log_prob_batched(const Tensor& input, const Tensor& linear_weight, const Tensor& index,
                               const OptionalTensor& mask, const LinearLogProbOptions& options) {
  return log_prob_batched_of(input, linear_weight, index, mask, options, LinearKind::LogProb).loss;
}

std::tuple<Tensor, Tensor> linear_log_prob_and_entropy_batched(const Tensor& input, const Tensor& linear_weight,
                                                               const Tensor& index, const OptionalTensor& mask,
                                                               const LinearLogProbOptions& options) {
  const auto result = log_prob_batched_of(input, linear_weight, index, mask, options, LinearKind::LogProbAndEntropy);
  return {result.loss, result.entropy};
}

}  // namespace

TORCH_LIBRARY_IMPL(masked_loss, CompositeExplicitAutograd, m) {
  impl<LinearCrossEntropy, linear_cross_entropy>(m);
  impl<LinearLogProb, linear_log_prob>(m);
  impl<LinearLogProbAndEntropy, linear_log_prob_and_entropy>(m);
  impl<LinearForwardGrad, forward_grad>(m);
  impl<LinearRowsForward, rows_forward>(m);
  impl<LinearRowsBackward, rows_backward>(m);
  impl<LinearKL, linear_kl>(m);
  impl<LinearKLGradients, kl_gradients>(m);
}

TORCH_LIBRARY_IMPL(masked_loss, FuncTorchBatched, m) {
  impl<LinearCrossEntropy, linear_cross_entropy_batched>(m);
  impl<LinearLogProb, linear_log_prob_batched>(m);
  impl<LinearLogProbAndEntropy, linear_log_prob_and_entropy_batched>(m);
  impl<LinearRowsBackward, rows_backward>(m);
  impl<LinearKL, linear_kl_batched>(m);
  impl<LinearKLGradients, kl_gradients>(m);
}

}  // namespace masked_loss::composite
