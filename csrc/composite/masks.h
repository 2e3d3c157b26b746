#pragma once

#include "common/ops.h"

namespace masked_loss {

// bool: where a token is none of `ids`.
Tensor none_of(const Tensor& tokens, at::IntArrayRef ids);

}  // namespace masked_loss
