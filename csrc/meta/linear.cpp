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

Tensor empty_loss(const Tensor& input, const Tensor& target, Reduction reduction) {
  const auto type = input.options().dtype(accumulation_type(input.scalar_type()));
  return reduction == Reduction::None ? at::empty_symint(target.sym_sizes(), type) : at::empty({}, type);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_forward_grad(const Tensor& input, const Tensor& linear_weight,
                                                               const Tensor& target, const OptionalTensor& mask,
                                                               const LinearOptions& options) {
  check_linear(input, linear_weight, target, mask, options);
  return std::tuple_cat(std::tuple{empty_loss(input, target, options.loss.reduction)},
                        empty_gradients(input, linear_weight, options));
}

std::tuple<Tensor, Tensor, Tensor> linear_rows_forward(const Tensor& input, const Tensor& linear_weight,
                                                       const Tensor& target, const OptionalTensor& mask,
                                                       const LinearOptions& options) {
  check_linear(input, linear_weight, target, mask, options);
  const auto type = input.options().dtype(accumulation_type(input.scalar_type()));
  c10::SymDimVector states(target.sym_sizes().begin(), target.sym_sizes().end());
  states.push_back(kLinearState);
  return {empty_loss(input, target, options.loss.reduction), at::empty_symint(target.sym_sizes(), type),
          at::empty_symint(states, type)};
}

LinearGradients linear_rows_backward(const Tensor&, const OptionalTensor&, const Tensor& input,
                                     const Tensor& linear_weight, const Tensor& target, const Tensor&,
                                     const OptionalTensor& mask, const LinearOptions& options) {
  check_linear(input, linear_weight, target, mask, options);
  return empty_gradients(input, linear_weight, options);
}

LinearKLResults linear_kl_gradients(const Tensor& input, const Tensor& linear_weight, const Tensor& target_input,
                                    const Tensor& target_linear_weight, const OptionalTensor& mask,
                                    const OptionalTensor&, const LinearKLCall& of) {
  const auto index = linear_kl_index(input);
  check_linear_kl(input, linear_weight, target_input, target_linear_weight, index, mask, of.kl);
  return {empty_loss(input, index, of.kl.reduction),
          empty_gradient(input, of.wants(0)),
          empty_gradient(linear_weight, of.wants(1)),
          empty_gradient(of.kl.linear_bias.value_or(input), of.wants(2)),
          empty_gradient(target_input, of.wants(3)),
          empty_gradient(target_linear_weight, of.wants(4)),
          empty_gradient(of.kl.target_linear_bias.value_or(input), of.wants(5))};
}

}  // namespace

TORCH_LIBRARY_IMPL(masked_loss, Meta, m) {
  impl<LinearForwardGrad, linear_forward_grad>(m);
  impl<LinearRowsForward, linear_rows_forward>(m);
  impl<LinearRowsBackward, linear_rows_backward>(m);
  impl<LinearKLGradients, linear_kl_gradients>(m);
}

}  // namespace masked_loss::meta
