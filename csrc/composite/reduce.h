#pragma once

#include <functional>

#include "common/checks.h"

namespace masked_loss {

struct CompositeCoefficient {
  Tensor keep;         // bool, less what a divisor of 0 drops
  Tensor coefficient;  // 0 where masked
};

// The value of a 0-d tensor where it can be read without a wait: not on another device, for a compiler or under vmap.
std::optional<double> readable(const Tensor& number);

// What a kept loss of `weight` is multiplied with for the reduction, differentiable in the weights; a mean divides by
// the sum of `counted`. All have the shape of the losses, and are 0 where masked.
CompositeCoefficient composite_coefficient(const char* op, const Tensor& keep, const Tensor& weight,
                                           const Tensor& counted, Reduction reduction,
                                           const OptionalTensor& normalizer);

// Losses without a coefficient -> the result.
Tensor composite_reduce(const Tensor& losses, const Tensor& keep, const Tensor& coefficient, Reduction reduction);

// The gradients of composite(tensors) in its tensors, differentiable where grad mode is on; `grad` is what arrives from
// upstream at its value, undefined for 1, and the value goes to `value` unless that is null.
std::vector<Tensor> composite_gradients(const std::vector<Tensor>& tensors, const Tensor& grad,
                                        const std::function<Tensor(const std::vector<Tensor>&)>& composite,
                                        Tensor* value = nullptr);

// The same of several values, each with what arrives at it.
std::vector<Tensor> composite_gradients(
    const std::vector<Tensor>& tensors, const std::vector<Tensor>& grads,
    const std::function<std::vector<Tensor>(const std::vector<Tensor>&)>& composite);

}  // namespace masked_loss
