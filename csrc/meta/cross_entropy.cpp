#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "common/cross_entropy_ops.h"

namespace masked_loss::meta {
namespace {

Tensor empty_loss(const Tensor& input, const RowArguments& rows, Reduction reduction, at::ScalarType type) {
  const auto options = input.options().dtype(type);
  return reduction == Reduction::None ? at::empty_symint(sym_row_sizes(rows), options) : at::empty({}, options);
}

Tensor cross_entropy(const Tensor& input, const Tensor& target, const OptionalTensor& mask,
                     const CrossEntropyOptions& options) {
  const auto rows = check_cross_entropy(input, target, mask, options);
  return empty_loss(input, rows, options.reduction,
                    result_type(input, cross_entropy_type(input, target, options.dtype), options.dtype));
}

std::tuple<Tensor, Tensor> forward(const Tensor& input, const Tensor& target, const OptionalTensor& mask,
                                   const CrossEntropyOptions& options) {
  const auto rows = check_cross_entropy_operands(input, target, mask, options);
  const auto type = accumulation_type(input.scalar_type());
  auto softmax = sym_row_sizes(rows);
  softmax.push_back(2);
  return {empty_loss(input, rows, options.reduction, type), at::empty_symint(softmax, input.options().dtype(type))};
}

std::tuple<Tensor, Tensor> forward_grad(const Tensor& input, const Tensor& target, const OptionalTensor& mask,
                                        const CrossEntropyOptions& options) {
  const auto rows = check_cross_entropy_operands(input, target, mask, options);
  return {empty_loss(input, rows, options.reduction, accumulation_type(input.scalar_type())), at::empty_like(input)};
}

Tensor backward(const Tensor&, const Tensor& input, const Tensor& target, const Tensor&, const OptionalTensor& mask,
                const CrossEntropyOptions& options) {
  check_cross_entropy_operands(input, target, mask, options);
  return at::empty_like(input);
}

void scale_gradient_(Tensor&, const Tensor&) {}

Tensor loss_normalizer(const Tensor& target, const OptionalTensor& mask, const LossNormalizerOptions& options) {
  check_loss_normalizer(target, mask, options);
  return at::empty({}, target.options().dtype(loss_normalizer_type(options)));
}

Tensor check_targets(const Tensor& target, c10::SymInt num_classes, const OptionalTensor& mask,
                     at::IntArrayRef ignore_index) {
  check_check_targets(target, num_classes, mask, ignore_index);
  return at::empty_like(target);
}

}  // namespace

TORCH_LIBRARY_IMPL(masked_loss, Meta, m) {
  impl<CrossEntropy, cross_entropy>(m);
  impl<CrossEntropyForward, forward>(m);
  impl<CrossEntropyForwardGrad, forward_grad>(m);
  impl<CrossEntropyBackward, backward>(m);
  impl<ScaleGradient_, scale_gradient_>(m);
  impl<LossNormalizer, loss_normalizer>(m);
  impl<CheckTargets, check_targets>(m);
}

}  // namespace masked_loss::meta
