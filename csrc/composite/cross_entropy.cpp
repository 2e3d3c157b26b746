#include "composite/cross_entropy.h"

#include <ATen/TensorOperators.h>
#include <ATen/functorch/BatchedTensorImpl.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/any.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/gather.h>
#include <ATen/ops/log.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/paths.h"
#include "composite/masks.h"
#include "composite/reduce.h"

namespace masked_loss {
namespace {

Tensor zero(const Tensor& like) { return at::zeros_like(like); }

// [C] or the input's rank -> broadcastable with the input.
Tensor classes_over(const Tensor& tensor, std::int64_t dim, std::int64_t rank) {
  if (tensor.dim() == rank) return tensor;
  at::DimVector shape(rank, 1);
  shape[dim] = -1;
  return tensor.view(shape);
}

// The weights of the targets, [N, ...].
Tensor gather_weight(const Tensor& weight, const Tensor& index) {
  return weight.gather(0, index.reshape({-1})).view_as(index);
}

// Of each row, [N, ..., 2]; (0, 1) where it is masked.
Tensor state_of(const Tensor& keep, const Tensor& max, const Tensor& sum) {
  return at::stack({at::where(keep, max, zero(max)), at::where(keep, sum, at::ones_like(sum))}, -1);
}

// By the op of that name, whose error is told in the name of the loss.
void check_in_range(const RowArguments& rows, const c10::SymInt& classes, const Tensor& keep) {
  try {
    call<CheckTargets>(rows.target, classes, keep, at::IntArrayRef());
  } catch (const c10::IndexError& error) {
    const std::string message = error.what_without_backtrace();
    TORCH_CHECK_INDEX(false, rows.op, message.substr(std::min(message.find(':'), message.size())));
  }
}

}  // namespace

CompositePlan composite_plan(const RowArguments& rows, Reduction reduction, const OptionalTensor& normalizer,
                             at::ScalarType accumulation) {
  const auto each =
      rows.probabilities ? at::zeros_symint(sym_row_sizes(rows), rows.target.options()) : rows.target;  // [N, ...]
  Tensor keep = rows.probabilities ? each.eq(0) : none_of(each, rows.ignore_index);
  check_mask_values(rows.op, "mask", rows.mask);
  check_mask_values(rows.op, "class_mask", rows.class_mask);
  if (rows.mask) keep = keep.logical_and(rows.mask->ne(0));
  if (rows.class_mask) {
    const auto rank = each.dim() + 1;
    keep = keep.logical_and(classes_over(rows.class_mask->ne(0), rows.dim, rank).any(rows.dim));
  }
  Tensor weight = at::ones_like(each, each.options().dtype(accumulation));
  if (rows.sample_weight) {
    // A weight of 0 masks; one that is differentiated has a gradient there, so that its row is read.
    const auto given = rows.sample_weight->to(accumulation);
    if (!is_differentiated(rows.sample_weight)) keep = keep.logical_and(given.ne(0));
    weight = weight * given;
  }
  weight = at::where(keep, weight, zero(weight));
  Tensor index, outside;
  if (!rows.probabilities) {
    const auto classes = rows.classes.value_or(std::numeric_limits<std::int64_t>::max());
    // Where values are read, by an op, as functorch unwraps the tensors of a call. A compiler, which reads none, drops
    // it.
    if (rows.target.is_cpu() || checks_values()) check_in_range(rows, classes, keep);
    // As in the kernels: a gather there would end the process's use of the device.
    const auto target = rows.target.to(at::kLong);
    outside = keep.logical_and(target.lt(0).logical_or(target.ge(classes)));
    index = at::where(keep.logical_and(outside.logical_not()), target, zero(target));
  }
  Tensor counted = weight;
  if (rows.weight && !rows.probabilities) {
    const auto of_target = gather_weight(rows.weight->to(accumulation), index);
    counted = at::where(keep.logical_and(outside.logical_not()), counted * of_target, counted);
  }
  auto [kept, coefficient] = composite_coefficient(rows.op, keep, weight, counted, reduction, normalizer);
  if (outside.defined()) {
    coefficient = at::where(outside, at::full_like(coefficient, std::numeric_limits<double>::quiet_NaN()), coefficient);
  }
  return {kept, index, coefficient};
}

Tensor composite_cross_entropy(const Tensor& input, const Tensor& target, const OptionalTensor& mask,
                               const CrossEntropyOptions& options, Tensor* softmax) {
  const auto rows = check_cross_entropy(input, target, mask, options);
  const auto accumulation = accumulation_type(cross_entropy_type(input, target, options.dtype));
  const auto plan = composite_plan(rows, options.reduction, options.normalizer, accumulation);
  const auto dim = rows.dim, rank = input.dim();
  const auto keep = plan.keep.unsqueeze(dim);

  auto logits = input.to(accumulation);
  logits = at::where(keep, logits, zero(logits));
  Tensor allowed;
  if (rows.class_mask) {
    allowed = classes_over(rows.class_mask->ne(0), dim, rank);
    // Masked rows keep their zeros, so that no row is without an allowed class.
    const auto excluded = allowed.logical_not().logical_and(keep);
    logits = at::where(excluded, at::full_like(logits, -std::numeric_limits<double>::infinity()), logits);
  }
  if (TORCH_GUARD_OR_FALSE(input.sym_size(dim).sym_eq(0))) {
    // No class, so no row is kept: zeros that stay attached to the graph.
    auto none = rows.probabilities ? logits * target.to(accumulation) : logits;
    if (softmax != nullptr) *softmax = state_of(plan.keep, none.sum(dim), none.sum(dim));
    if (rows.weight) none = none * classes_over(rows.weight->to(accumulation), dim, rank);
    return composite_reduce(none.sum(dim), plan.keep, plan.coefficient, options.reduction);
  }
  // Not at::logsumexp: its forward derivative cannot be differentiated again, and large logits would lose digits.
  const auto max = logits.detach().amax(dim, /*keepdim=*/true);
  const auto shifted = logits - max;
  const auto sum = shifted.exp().sum(dim, /*keepdim=*/true), log_sum = sum.log();
  if (softmax != nullptr) *softmax = state_of(plan.keep, max.squeeze(dim), sum.squeeze(dim));
  const Tensor weight = rows.weight ? rows.weight->to(accumulation) : Tensor();
  const auto of_allowed = [&](const Tensor& tensor) {
    return allowed.defined() ? at::where(allowed, tensor, zero(tensor)) : tensor;
  };
  // The sum of p_c w_c (lse - x_c), with probabilities first, which large costs are lessened by.
  const auto cost_of = [&](const Tensor& probabilities) {
    const auto cost = of_allowed(log_sum - shifted) * of_allowed(probabilities);
    return (weight.defined() ? cost * classes_over(weight, dim, rank) : cost).sum(dim);
  };
  const double smoothing = options.label_smoothing;
  Tensor each, classes;  // 1 for an allowed class, and their number, [N, 1, ...]
  if (smoothing != 0) {
    each = of_allowed(at::ones_like(logits));
    classes = each.sum(dim, /*keepdim=*/true);
  }

  Tensor loss, target_weight, infinite;
  if (rows.probabilities) {
    auto probabilities = target.to(accumulation);
    probabilities = at::where(keep, probabilities, zero(probabilities));
    if (allowed.defined()) infinite = probabilities.gt(0).logical_and(allowed.logical_not()).any(dim);
    if (smoothing != 0) probabilities = probabilities * (1 - smoothing) + smoothing / classes;
    loss = cost_of(probabilities);
  } else {
    const auto index = plan.index.unsqueeze(dim);
    Tensor target_logit = shifted.gather(dim, index);
    if (allowed.defined()) {
      const auto target_allowed = allowed.expand_as(logits).gather(dim, index);
      target_logit = at::where(target_allowed, target_logit, zero(target_logit));
      infinite = target_allowed.logical_not().squeeze(dim);
    }
    loss = (log_sum - target_logit).squeeze(dim);
    if (weight.defined()) {
      target_weight = gather_weight(weight, plan.index);
      loss = loss * target_weight;
    }
    if (smoothing != 0) loss = loss * (1 - smoothing) + cost_of(each) / classes.squeeze(dim) * smoothing;
  }
  if (options.z_loss != 0) {
    // The root in front, so that the derivative of a large one overflows no sooner than it must.
    auto squared = ((log_sum + max).squeeze(dim) * std::sqrt(options.z_loss)).square();
    if (target_weight.defined()) squared = squared * target_weight;
    loss = loss + squared;
  }
  if (infinite.defined()) {
    // Infinite by a constant, so that the gradients stay finite.
    loss = loss + at::where(infinite, at::full_like(loss, std::numeric_limits<double>::infinity()), zero(loss));
  }
  return composite_reduce(loss, plan.keep, plan.coefficient, options.reduction);
}

Tensor composite_cross_entropy_backward(const Tensor& grad, const Tensor& input, const Tensor& target,
                                        const Tensor& softmax, const OptionalTensor& mask,
                                        const CrossEntropyOptions& options) {
  return composite_gradients({input}, grad, [&](const std::vector<Tensor>& leaves) {
    return composite_cross_entropy(leaves[0], target, mask, options);
  })[0];
}

Tensor composite_scale_gradient(const Tensor& gradient, const Tensor& grad) {
  return at::where(gradient.eq(0), zero(gradient), gradient * grad.to(gradient.scalar_type()));
}

}  // namespace masked_loss

namespace masked_loss::composite {
namespace {

// Below autograd.
Tensor cross_entropy(const Tensor& input, const Tensor& target, const OptionalTensor& mask,
                     const CrossEntropyOptions& options) {
  check_cross_entropy(input, target, mask, options);
  const auto [logits, targets] = in_one_dtype(input, target, options.dtype);
  return std::get<0>(call<CrossEntropyForward>(logits, targets, mask, options))
      .to(cross_entropy_result_type(input, target, options));
}

Tensor cross_entropy_batched(const Tensor& input, const Tensor& target, const OptionalTensor& mask,
                             const CrossEntropyOptions& options) {
  return composite_cross_entropy(input, target, mask, options).to(cross_entropy_result_type(input, target, options));
}

std::tuple<Tensor, Tensor> forward(const Tensor& input, const Tensor& target, const OptionalTensor& mask,
                                   const CrossEntropyOptions& options) {
  Tensor softmax;
  const auto loss = composite_cross_entropy(input, target, mask, options, &softmax);
  return {loss, softmax};
}

std::tuple<Tensor, Tensor> forward_grad(const Tensor& input, const Tensor& target, const OptionalTensor& mask,
                                        const CrossEntropyOptions& options) {
  const at::NoGradGuard no_graph;
  Tensor loss;
  const auto composite = [&](const std::vector<Tensor>& leaves) {
    return composite_cross_entropy(leaves[0], target, mask, options);
  };
  const auto gradient = composite_gradients({input}, {}, composite, &loss)[0];
  return {loss, gradient};
}

void scale_gradient_(Tensor& gradient, const Tensor& grad) { gradient.copy_(composite_scale_gradient(gradient, grad)); }

Tensor loss_normalizer(const Tensor& target, const OptionalTensor& mask, const LossNormalizerOptions& options) {
  const at::NoGradGuard no_grad;
  const auto rows = check_loss_normalizer(target, mask, options);
  const auto type = loss_normalizer_type(options);
  auto [keep, index, weight] = composite_plan(rows, Reduction::None, std::nullopt, type);
  if (rows.weight) {
    weight = at::where(keep, weight * gather_weight(rows.weight->to(type), index), zero(weight));
  }
  return weight.sum();
}

// Values are looked at on the host, whatever the device.
Tensor check_targets(const Tensor& target, c10::SymInt num_classes, const OptionalTensor& mask,
                     at::IntArrayRef ignore_index) {
  check_check_targets(target, num_classes, mask, ignore_index);
  const auto host_mask = mask ? OptionalTensor(mask->cpu()) : std::nullopt;
  call<CheckTargets>(target.cpu(), num_classes, host_mask, ignore_index);
  return target.clone();
}

// A batch of vmap's is one more dimension of the target and of the mask.
Tensor check_targets_batched(const Tensor& target, c10::SymInt num_classes, const OptionalTensor& mask,
                             at::IntArrayRef ignore_index) {
  using at::functorch::maybeGetBatchedImpl;
  check_check_targets(target, num_classes, mask, ignore_index);
  const auto level_of = [](const Tensor& tensor) {
    const auto* batched = maybeGetBatchedImpl(tensor);
    return batched == nullptr ? std::int64_t{-1} : batched->level();
  };
  const auto level = std::max(level_of(target), mask ? level_of(*mask) : -1);
  // What is called without the key is passed on to the level below.
  const c10::impl::ExcludeDispatchKeyGuard below(c10::DispatchKey::FuncTorchBatched);
  const auto unwrapped = [&](const Tensor& tensor) {
    if (level_of(tensor) != level) return tensor.unsqueeze(0);
    const auto* batched = maybeGetBatchedImpl(tensor);
    return batched->value().movedim(batched->bdim(), 0);
  };
  auto all = unwrapped(target);
  const auto all_mask = mask ? OptionalTensor(unwrapped(*mask)) : std::nullopt;
  if (level_of(target) != level && all_mask) {
    c10::SymDimVector sizes(all.sym_sizes().begin(), all.sym_sizes().end());
    sizes[0] = all_mask->sym_size(0);
    all = all.expand_symint(sizes);
  }
  return at::functorch::makeBatched(call<CheckTargets>(all, num_classes, all_mask, ignore_index), 0, level);
}

}  // namespace

// Devices without kernels of ours.
TORCH_LIBRARY_IMPL(masked_loss, CompositeExplicitAutograd, m) {
  impl<CrossEntropy, cross_entropy>(m);
  impl<CrossEntropyForward, forward>(m);
  impl<CrossEntropyForwardGrad, forward_grad>(m);
  impl<CrossEntropyBackward, composite_cross_entropy_backward>(m);
  impl<ScaleGradient_, scale_gradient_>(m);
  impl<LossNormalizer, loss_normalizer>(m);
  impl<CheckTargets, check_targets>(m);
}

// functorch's batches.
TORCH_LIBRARY_IMPL(masked_loss, FuncTorchBatched, m) {
  impl<CrossEntropy, cross_entropy_batched>(m);
  impl<CrossEntropyBackward, composite_cross_entropy_backward>(m);
  impl<LossNormalizer, loss_normalizer>(m);
  impl<CheckTargets, check_targets_batched>(m);
}

}  // namespace masked_loss::composite
