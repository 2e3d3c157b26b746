#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Scalar.h>
#include <masked_loss/export.h>

namespace masked_loss {

// `input` with `value` where `mask` is true: here, as in torch, true = fill. Input of any dtype.
// input and mask broadcast to the shape of the result; value is 0-d.
MASKED_LOSS_API at::Tensor masked_fill(const at::Tensor& input, const at::Tensor& mask, const at::Scalar& value);
MASKED_LOSS_API at::Tensor masked_fill(const at::Tensor& input, const at::Tensor& mask, const at::Tensor& value);

// The same in place; mask broadcasts to input. `input` is a const reference as in torch: it is the handle that is
// const, not the memory, so x[0] can be filled.
MASKED_LOSS_API void masked_fill_(const at::Tensor& input, const at::Tensor& mask, const at::Scalar& value);
MASKED_LOSS_API void masked_fill_(const at::Tensor& input, const at::Tensor& mask, const at::Tensor& value);

}  // namespace masked_loss
