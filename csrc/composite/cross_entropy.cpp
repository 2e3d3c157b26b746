#include "composite/cross_entropy.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/any.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/gather.h>
#include <ATen/ops/log.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/library.h>

#include "composite/masks.h"

namespace masked_loss {
namespace {

Tensor zero(const Tensor& like) { return at::zeros_like(like); }

// [C] or the input's rank -> broadcastable with the input, bool.
Tensor class_mask_over(const Tensor& class_mask, std::int64_t dim, std::int64_t rank) {
  const auto allowed = class_mask.ne(0);
  if (class_mask.dim() == rank) return allowed;
  at::DimVector shape(rank, 1);
  shape[dim] = -1;
  return allowed.view(shape);
}

Tensor weight_over(const Tensor& weight, std::int64_t dim, std::int64_t rank) {
  at::DimVector shape(rank, 1);
  shape[dim] = -1;
  return weight.view(shape);
}

// The weights of the targets, [N, ...].
Tensor gather_weight(const Tensor& weight, const Tensor& index) {
  return weight.gather(0, index.reshape({-1})).view_as(index);
}

// at::logsumexp, whose forward derivative cannot be differentiated again. An infinite maximum gives NaN, as torch's
// cross entropy has it.
Tensor log_sum_exp_over(const Tensor& logits, std::int64_t dim) {
  const auto max = logits.detach().amax(dim, /*keepdim=*/true);
  return (logits - max).exp().sum(dim, /*keepdim=*/true).log() + max;
}

// Sums over all but dim 0: one number a sequence, broadcastable with the rows.
Tensor sequence_sum(const Tensor& rows) {
  if (rows.dim() <= 1) return rows;
  at::DimVector dims;
  for (std::int64_t d = 1; d < rows.dim(); ++d) dims.push_back(d);
  return rows.sum(dims, /*keepdim=*/true);
}

}  // namespace

CompositePlan composite_plan(const RowArguments& rows, Reduction reduction, const OptionalTensor& normalizer,
                             at::ScalarType accumulation) {
  Tensor keep = none_of(rows.target, rows.ignore_index);
  if (rows.mask) keep = keep.logical_and(rows.mask->ne(0));
  if (rows.class_mask) {
    const auto rank = rows.target.dim() + 1;
    keep = keep.logical_and(class_mask_over(*rows.class_mask, rows.dim, rank).any(rows.dim));
  }
  Tensor weight = at::ones_like(rows.target, rows.target.options().dtype(accumulation));
  if (rows.sample_weight) {
    // A weight of 0 masks; one that is differentiated has a gradient there, so that its row is read.
    if (!is_differentiated(rows.sample_weight)) keep = keep.logical_and(rows.sample_weight->ne(0));
    weight = weight * rows.sample_weight->to(accumulation);
  }
  weight = at::where(keep, weight, zero(weight));
  const Tensor index = at::where(keep, rows.target.to(at::kLong), zero(rows.target.to(at::kLong)));
  if (reduction == Reduction::None || reduction == Reduction::Sum) return {keep, index, weight};

  Tensor counted = weight;
  if (rows.weight) {
    counted = at::where(keep, counted * gather_weight(rows.weight->to(accumulation), index), zero(counted));
  }
  Tensor divisor;
  if (reduction == Reduction::Mean) {
    divisor = normalizer ? normalizer->to(accumulation) : counted.sum();
  } else {
    const auto any = sequence_sum(keep.to(accumulation)).ne(0);
    const auto sequences = normalizer ? normalizer->to(accumulation) : any.to(accumulation).sum();
    divisor = sequence_sum(counted) * sequences;
  }
  // A divisor of 0 gives 0: the rows it is for are dropped.
  keep = keep.logical_and(divisor.ne(0));
  divisor = at::where(divisor.eq(0), at::ones_like(divisor), divisor);
  return {keep, index, at::where(keep, weight / divisor, zero(weight))};
}

Tensor composite_reduce(const Tensor& losses, const CompositePlan& plan, Reduction reduction) {
  const auto kept = at::where(plan.keep, losses, zero(losses));
  const auto weighted = at::where(plan.keep, kept * plan.coefficient, zero(kept));
  return reduction == Reduction::None ? weighted : weighted.sum();
}

Tensor composite_cross_entropy(const Tensor& input, const Tensor& target, const OptionalTensor& mask,
                               const CrossEntropyOptions& options) {
  const auto rows = check_cross_entropy(input, target, mask, options);
  const auto accumulation = accumulation_type(input.scalar_type());
  const auto plan = composite_plan(rows, options.reduction, options.normalizer, accumulation);
  const auto dim = rows.dim, rank = input.dim();
  const auto keep = plan.keep.unsqueeze(dim), index = plan.index.unsqueeze(dim);

  auto logits = input.to(accumulation);
  logits = at::where(keep, logits, zero(logits));
  Tensor allowed;
  if (rows.class_mask) {
    allowed = class_mask_over(*rows.class_mask, dim, rank);
    // Masked rows keep their zeros, so that no row is without an allowed class.
    const auto excluded = allowed.logical_not().logical_and(keep);
    logits = at::where(excluded, at::full_like(logits, -std::numeric_limits<double>::infinity()), logits);
  }
  const bool no_classes = input.sym_size(dim).sym_eq(0).guard_bool(__FILE__, __LINE__);
  const auto lse = no_classes ? zero(keep.to(accumulation)) : log_sum_exp_over(logits, dim);
  const Tensor weight = rows.weight ? rows.weight->to(accumulation) : Tensor();
  Tensor target_logit = no_classes ? lse : logits.gather(dim, index);
  if (allowed.defined() && !no_classes) {
    // The loss of a target that is not allowed is infinite by a constant, so that its gradients stay finite.
    const auto target_allowed = allowed.expand_as(logits).gather(dim, index);
    const auto infinity = at::full_like(target_logit, -std::numeric_limits<double>::infinity());
    target_logit = at::where(target_allowed, target_logit, infinity);
  }
  Tensor loss = (lse - target_logit).squeeze(dim);
  const auto target_weight = weight.defined() ? gather_weight(weight, plan.index) : Tensor();
  if (target_weight.defined()) loss = loss * target_weight;
  if (options.label_smoothing != 0) {
    auto share = lse - logits;
    if (weight.defined()) {
      const auto over = weight_over(weight, dim, rank);
      share = share * (allowed.defined() ? at::where(allowed, over, zero(over)) : over);
    }
    auto classes = at::ones_like(logits);
    if (allowed.defined()) {
      share = at::where(allowed, share, zero(share));
      classes = at::where(allowed, classes, zero(classes));
    }
    loss = loss * (1 - options.label_smoothing) + share.sum(dim) / classes.sum(dim) * options.label_smoothing;
  }
  if (options.z_loss != 0) {
    auto squared = lse.squeeze(dim).square() * options.z_loss;
    if (target_weight.defined()) squared = squared * target_weight;
    loss = loss + squared;
  }
  return composite_reduce(loss, plan, options.reduction);
}

Tensor composite_cross_entropy_backward(const Tensor& grad, const Tensor& input, const Tensor& target,
                                        const Tensor& log_sum_exp, const OptionalTensor& mask,
                                        const CrossEntropyOptions& options) {
  const bool create_graph = at::GradMode::is_enabled();
  const at::AutoGradMode grad_mode(true);
  const auto variable = input.requires_grad() ? input : input.detach().requires_grad_();
  const auto loss = composite_cross_entropy(variable, target, mask, options);
  return torch::autograd::grad({loss}, {variable}, {grad.to(loss.scalar_type())}, std::nullopt, create_graph)[0];
}

Tensor composite_scale_gradient(const Tensor& gradient, const Tensor& grad) {
  return at::where(gradient.eq(0), zero(gradient), gradient * grad.to(gradient.scalar_type()));
}

}  // namespace masked_loss

namespace masked_loss::composite {
namespace {

Tensor cross_entropy(const Tensor& input, const Tensor& target, const OptionalTensor& mask,
                     const CrossEntropyOptions& options) {
  return composite_cross_entropy(input, target, mask, options).to(result_type(input));
}

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
Tensor check_targets(const Tensor& target, std::int64_t num_classes, const OptionalTensor& mask,
                     at::IntArrayRef ignore_index) {
  check_check_targets(target, num_classes, mask, ignore_index);
  const auto host_mask = mask ? OptionalTensor(mask->cpu()) : std::nullopt;
  masked_loss::check_targets(target.cpu(), num_classes, host_mask, ignore_index);
  return target.clone();
}

// In a batch of vmap's no value can be looked at: gather raises its own IndexError.
Tensor check_targets_batched(const Tensor& target, std::int64_t num_classes, const OptionalTensor& mask,
                             at::IntArrayRef ignore_index) {
  const auto rows = check_check_targets(target, num_classes, mask, ignore_index);
  const auto plan = composite_plan(rows, Reduction::None, std::nullopt, at::kFloat);
  at::zeros({num_classes}, plan.index.options()).gather(0, plan.index.reshape({-1}));
  return target.clone();
}

}  // namespace

// Devices without kernels of ours, and functorch's batches.
TORCH_LIBRARY_IMPL(masked_loss, CompositeExplicitAutograd, m) {
  m.impl("cross_entropy", CrossEntropy::kernel<cross_entropy>);
  m.impl("loss_normalizer", LossNormalizer::kernel<loss_normalizer>);
  m.impl("check_targets", check_targets);
}

TORCH_LIBRARY_IMPL(masked_loss, FuncTorchBatched, m) {
  m.impl("cross_entropy", CrossEntropy::kernel<cross_entropy>);
  m.impl("loss_normalizer", LossNormalizer::kernel<loss_normalizer>);
  m.impl("check_targets", check_targets_batched);
  m.impl("_cross_entropy_backward", CrossEntropyBackward::kernel<composite_cross_entropy_backward>);
}

}  // namespace masked_loss::composite
