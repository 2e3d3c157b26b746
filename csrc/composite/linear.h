#pragma once

#include <ATen/ops/rsub.h>

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

// The operands of both heads: input, weight and bias of each, in the order of their gradients.
using LinearKLOperands = std::array<Tensor, 6>;

// As above, of divergences. `operands`: a bias that is not there is undefined.
Tensor composite_linear_kl(const LinearKLOperands& operands, const OptionalTensor& mask,
                           const LinearKLOptions& options);
std::array<Tensor, 6> composite_linear_kl_gradients(const Tensor& grad, const LinearKLOperands& operands,
                                                    const OptionalTensor& mask, const LinearKLCall& of);

// Tensors in the dtypes that the products are made in: autocast's, as torch's linear; or double where that is asked
// for.
struct LinearOperands {
  Tensor input, linear_weight;
  OptionalTensor linear_bias;
};
LinearOperands linear_operands(const Tensor& input, const Tensor& linear_weight, const OptionalTensor& linear_bias,
                               std::optional<at::ScalarType> dtype);

LinearKLOperands linear_kl_operands(const Tensor& input, const Tensor& linear_weight, const Tensor& target_input,
                                    const Tensor& target_linear_weight, const LinearKLOptions& options);

// linear_log_prob and its sibling, by run(operands, options), which gives the losses of rows and, if asked, entropies.
template <class Run>
LinearResult linear_log_prob_by(const Tensor& input, const Tensor& linear_weight, const LinearLogProbOptions& given,
                                LinearKind kind, const Run& run) {
  auto options = linear_options(given, kind);
  const auto of = linear_operands(input, linear_weight, given.linear_bias, given.dtype);
  options.loss.linear_bias = of.linear_bias;
  LinearResult result = run(of, options);
  const auto type = linear_result_type(of.input, given.dtype);
  result.loss = converted(at::rsub(result.loss, 0), type);  // of 0 it is +0
  if (result.entropy.defined()) result.entropy = converted(result.entropy, type);
  return result;
}

}  // namespace masked_loss
