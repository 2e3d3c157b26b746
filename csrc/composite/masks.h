#pragma once

#include "common/checks.h"

namespace masked_loss {

// bool: where a token is none of `ids`.
Tensor none_of(const Tensor& tokens, at::IntArrayRef ids);

// bool [queries, keys]: where the key is not after the query.
Tensor not_after(const c10::SymInt& queries, const c10::SymInt& keys, const at::TensorOptions& options);

// bool with the input's sizes, where `mask` keeps; undefined where there is none.
Tensor kept_elements(const Tensor& input, const OptionalTensor& mask);

// `tensor` where `keep` is true or undefined, else a number.
Tensor kept_or(const Tensor& keep, const Tensor& tensor, double otherwise);

}  // namespace masked_loss
