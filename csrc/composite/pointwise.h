#pragma once

#include "common/pointwise_ops.h"

namespace masked_loss {

// An elementwise loss in ATen ops, of a call that resolve_pointwise has returned: for functorch, forward-mode AD,
// double backward, gradients of targets and weights, and devices without kernels of ours. In the accumulation dtype.
Tensor composite_pointwise(const PointwiseCall& call);

// The gradients of the composite in input and, where the formula has one, in other; differentiable where grad mode is
// on.
std::tuple<Tensor, Tensor> composite_pointwise_backward(const Tensor& grad, const Tensor& input, const Tensor& target,
                                                        const OptionalTensor& other, const OptionalTensor& mask,
                                                        const PointwiseOptions& options);

}  // namespace masked_loss
