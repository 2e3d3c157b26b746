#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/linear.h"
#include "common/linear_ops.h"

namespace masked_loss::meta {
namespace {

// Contiguous, as the kernels'; of no elements where it is not wanted.
Tensor empty_gradient(const Tensor& like, bool wanted) {
  return wanted ? at::empty_symint(like.sym_sizes(), like.options()) : at::empty({0}, like.options());
}

LinearGradients empty_gradients(const Tensor& input, const Tensor& linear_weight, const LinearOptions& options) {
  return {empty_gradient(input, options.input_grad), empty_gradient(linear_weight, options.weight_grad),
          empty_gradient(options.loss.linear_bias.value_or(input), options.bias_grad)};
}

Tensor empty_loss(const Tensor& input, const Tensor& target, const LinearOptions& options) {
  const auto type = input.options().dtype(accumulation_type(input.scalar_type()));
  return options.loss.reduction == Reduction::None ? at::empty_symint(target.sym_sizes(), type) : at::empty({}, type);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_forward_grad(const Tensor& input, const Tensor& linear_weight,
                                                               const Tensor& target, const OptionalTensor& mask,
                                                               const LinearOptions& options) {
  check_linear(input, linear_weight, target, mask, options);
  return std::tuple_cat(std::tuple{empty_loss(input, target, options)}, empty_gradients(input, linear_weight, options));
}

std::tuple<Tensor, Tensor, Tensor> linear_rows_forward(const Tensor& input, const Tensor& linear_weight,
                                                       const Tensor& target, const OptionalTensor& mask,
                                                       const LinearOptions& options) {
  check_linear(input, linear_weight, target, mask, options);
  const auto type = input.options().dtype(accumulation_type(input.scalar_type()));
  c10::SymDimVector states(target.sym_sizes().begin(), target.sym_sizes().end());
  states.push_back(kLinearState);
  return {empty_loss(input, target, options), at::empty_symint(target.sym_sizes(), type),
          at::empty_symint(states, type)};
}

LinearGradients linear_rows_backward(const Tensor&, const OptionalTensor&, const Tensor& input,
                                     const Tensor& linear_weight, const Tensor& target, const Tensor&,
                                     const OptionalTensor& mask, const LinearOptions& options) {
  check_linear(input, linear_weight, target, mask, options);
  return empty_gradients(input, linear_weight, options);
}

}  // namespace

TORCH_LIBRARY_IMPL(masked_loss, Meta, m) {
  impl<LinearForwardGrad, linear_forward_grad>(m);
  impl<LinearRowsForward, linear_rows_forward>(m);
  impl<LinearRowsBackward, linear_rows_backward>(m);
}

}  // namespace masked_loss::meta
