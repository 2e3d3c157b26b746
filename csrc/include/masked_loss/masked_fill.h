#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Scalar.h>
#include <masked_loss/export.h>

namespace masked_loss {

// `input` with `value` where `mask` is true (true = fill, as in torch); both broadcast. Any dtype; `value` may be 0-d.
MASKED_LOSS_API at::Tensor masked_fill(const at::Tensor& input, const at::Tensor& mask, const at::Scalar& value);
MASKED_LOSS_API at::Tensor masked_fill(const at::Tensor& input, const at::Tensor& mask, const at::Tensor& value);

// The same in place; `mask` broadcasts to `input`, which never grows. `input` is const as in torch: the handle is, not
// the memory, so that x[0] can be filled.
MASKED_LOSS_API void masked_fill_(const at::Tensor& input, const at::Tensor& mask, const at::Scalar& value);
MASKED_LOSS_API void masked_fill_(const at::Tensor& input, const at::Tensor& mask, const at::Tensor& value);

}  // namespace masked_loss
