#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/pointwise_ops.h"

namespace masked_loss::meta {
namespace {

Tensor forward(const Tensor& input, const Tensor& target, const OptionalTensor& other, const OptionalTensor& mask,
               const PointwiseOptions& options) {
  check_pointwise(input, target, other, mask, options);
  const auto type = input.options().dtype(accumulation_type(input.scalar_type()));
  return options.reduction == Reduction::None ? at::empty_symint(input.sym_sizes(), type) : at::empty({}, type);
}

Tensor empty_gradient(const Tensor& input) { return at::empty_symint(input.sym_sizes(), input.options()); }

Tensor empty_other_gradient(const Tensor& input, const PointwiseOptions& options) {
  return pointwise_traits(options.loss).has_other_slope ? empty_gradient(input) : at::empty({0}, input.options());
}

std::tuple<Tensor, Tensor, Tensor> forward_grad(const Tensor& input, const Tensor& target, const OptionalTensor& other,
                                                const OptionalTensor& mask, const PointwiseOptions& options) {
  return {forward(input, target, other, mask, options), empty_gradient(input), empty_other_gradient(input, options)};
}

std::tuple<Tensor, Tensor> backward(const Tensor&, const Tensor& input, const Tensor& target,
                                    const OptionalTensor& other, const OptionalTensor& mask,
                                    const PointwiseOptions& options) {
  check_pointwise(input, target, other, mask, options);
  return {empty_gradient(input), empty_other_gradient(input, options)};
}

}  // namespace

TORCH_LIBRARY_IMPL(masked_loss, Meta, m) {
  impl<PointwiseForward, forward>(m);
  impl<PointwiseForwardGrad, forward_grad>(m);
  impl<PointwiseBackward, backward>(m);
}

}  // namespace masked_loss::meta
