#pragma once

#include "common/cross_entropy_ops.h"

namespace masked_loss {

// The row plan in ATen ops, differentiable in sample_weight: [N, ...] below is the shape of the rows. A kept target out
// of range is an error where values are read, and has a coefficient of NaN elsewhere.
struct CompositePlan {
  Tensor keep;         // bool [N, ...]
  Tensor index;        // int64 [N, ...], 0 where masked; undefined with class probabilities
  Tensor coefficient;  // [N, ...], 0 where masked
};
CompositePlan composite_plan(const RowArguments& rows, Reduction reduction, const OptionalTensor& normalizer,
                             at::ScalarType accumulation);

// Cross entropy in ATen ops: for functorch, forward-mode AD, double backward and devices without kernels of ours.
// In the accumulation dtype; the states of the rows, as _cross_entropy_forward gives them, go to `softmax` unless that
// is null.
Tensor composite_cross_entropy(const Tensor& input, const Tensor& target, const OptionalTensor& mask,
                               const CrossEntropyOptions& options, Tensor* softmax = nullptr);

// The gradient of the composite, differentiable where grad mode is on.
Tensor composite_cross_entropy_backward(const Tensor& grad, const Tensor& input, const Tensor& target,
                                        const Tensor& softmax, const OptionalTensor& mask,
                                        const CrossEntropyOptions& options);

// A gradient made in the forward pass times the upstream one; its zeros stay +0.0.
Tensor composite_scale_gradient(const Tensor& gradient, const Tensor& grad);

}  // namespace masked_loss
