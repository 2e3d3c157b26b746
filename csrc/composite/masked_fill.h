#pragma once

#include "common/masked_fill_ops.h"

namespace masked_loss {

// masked_fill in ATen ops: for functorch, forward-mode AD and devices without kernels of ours.
Tensor composite_masked_fill(const Tensor& input, const Tensor& mask, const at::Scalar& value);
Tensor composite_masked_fill(const Tensor& input, const Tensor& mask, const Tensor& value);
void composite_masked_fill_(Tensor& input, const Tensor& mask, const at::Scalar& value);
void composite_masked_fill_(Tensor& input, const Tensor& mask, const Tensor& value);

}  // namespace masked_loss
