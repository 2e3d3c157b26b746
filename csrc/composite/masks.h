#pragma once

#include "common/ops.h"

namespace masked_loss {

// bool: where a token is none of `ids`.
Tensor none_of(const Tensor& tokens, at::IntArrayRef ids);

// bool [queries, keys]: where the key is not after the query.
Tensor not_after(const c10::SymInt& queries, const c10::SymInt& keys, const at::TensorOptions& options);

}  // namespace masked_loss
