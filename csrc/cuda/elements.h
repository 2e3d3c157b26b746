#pragma once

namespace masked_loss::cuda {

// Of an operand's merged dimensions, so that all operands fit in a kernel's parameters.
inline constexpr int kOperandDims = 8;

}  // namespace masked_loss::cuda
