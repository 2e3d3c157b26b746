#pragma once

#include "common/linear_ops.h"

namespace masked_loss {

struct LinearResult {
  Tensor loss;     // 0-d, or [...] for 'none'
  Tensor entropy;  // [...]
};

// Logits that are whole, and what is made of them, in ATen ops and the accumulation dtype.
LinearResult composite_linear(const Tensor& input, const Tensor& linear_weight, const Tensor& target,
                              const OptionalTensor& mask, const LinearOptions& options);

// The gradients of the composite, differentiable where grad mode is on; undefined where not wanted.
std::array<Tensor, 3> composite_linear_gradients(const Tensor& grad, const Tensor& entropy_grad, const Tensor& input,
                                                 const Tensor& linear_weight, const Tensor& target,
                                                 const OptionalTensor& mask, const LinearOptions& options);

// Tensors in the dtypes that the products are made in: autocast's, as torch's linear; or double where that is asked
// for.
struct LinearOperands {
  Tensor input, linear_weight;
  OptionalTensor linear_bias;
};
LinearOperands linear_operands(const Tensor& input, const Tensor& linear_weight, const OptionalTensor& linear_bias,
                               std::optional<at::ScalarType> dtype);

}  // namespace masked_loss
