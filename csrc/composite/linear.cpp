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

Tensor softened(const Tensor& logits, const LinearCrossEntropyOptions& options) {
  const auto capped = options.softcap ? at::tanh(logits / *options.softcap) * *options.softcap : logits;
  return options.temperature == 1 ? capped : capped / options.temperature;
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
  const auto type = accumulation_type(input.scalar_type());
  // By the op's own name, and for the rows that are read.
  const auto keep = composite_plan(rows, Reduction::None, std::nullopt, type).keep;
  // Autocast, which has cast the operands, would round the logits too; functorch forgets that it is excluded, but it
  // leaves double as it is.
  const auto product_type = autocasts(input) ? at::kDouble : type;
  auto hidden = input.to(product_type);
  hidden = at::where(keep.unsqueeze(-1), hidden, at::zeros_like(hidden));
  const auto bias = loss.linear_bias ? OptionalTensor(loss.linear_bias->to(product_type)) : std::nullopt;
  const auto logits = softened(at::linear(hidden, linear_weight.to(product_type), bias).to(type), loss);
  LinearResult result;
  result.loss = composite_cross_entropy(logits, target, mask, of_logits(loss));
  if (options.kind == LinearKind::LogProbAndEntropy) result.entropy = entropy_of(logits, keep, loss.class_mask);
  return result;
}

std::array<Tensor, 3> composite_linear_gradients(const Tensor& grad, const Tensor& entropy_grad, const Tensor& input,
                                                 const Tensor& linear_weight, const Tensor& target,
                                                 const OptionalTensor& mask, const LinearOptions& options) {
  std::vector<Tensor> wanted;
  if (options.input_grad) wanted.push_back(input);
  if (options.weight_grad) wanted.push_back(linear_weight);
  if (options.bias_grad) wanted.push_back(*options.loss.linear_bias);
  const bool has_entropy = options.kind == LinearKind::LogProbAndEntropy;
  std::vector<Tensor> grads{grad};
  if (has_entropy) grads.push_back(entropy_grad);
  const auto gradients = composite_gradients(wanted, grads, [&](const std::vector<Tensor>& leaves) {
    std::size_t next = 0;
    const auto x = options.input_grad ? leaves[next++] : input;
    const auto w = options.weight_grad ? leaves[next++] : linear_weight;
    auto with_bias = options;
    if (options.bias_grad) with_bias.loss.linear_bias = leaves[next++];
    auto result = composite_linear(x, w, target, mask, with_bias);
    std::vector<Tensor> results{result.loss};
    if (has_entropy) results.push_back(result.entropy);
    return results;
  });
  std::array<Tensor, 3> result;
  std::size_t next = 0;
  const bool wants[] = {options.input_grad, options.weight_grad, options.bias_grad};
  for (int i = 0; i < 3; ++i) {
    if (wants[i]) result[i] = gradients[next++];
  }
  return result;
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
}

TORCH_LIBRARY_IMPL(masked_loss, FuncTorchBatched, m) {
  impl<LinearCrossEntropy, linear_cross_entropy_batched>(m);
  impl<LinearLogProb, linear_log_prob_batched>(m);
  impl<LinearLogProbAndEntropy, linear_log_prob_and_entropy_batched>(m);
  impl<LinearRowsBackward, rows_backward>(m);
}

}  // namespace masked_loss::composite
