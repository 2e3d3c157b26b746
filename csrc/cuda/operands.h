#pragma once

#include "common/strides.h"
#include "cuda/elements.h"

namespace masked_loss::cuda {

// Kernels walk few dimensions: an operand that does not merge into so many is written out.
inline at::Tensor walkable(const at::Tensor& tensor, at::IntArrayRef shape) {
  const bool few = shape.size() <= kOperandDims || make_operand(tensor, shape).at.dims <= kOperandDims;
  return few ? tensor : tensor.expand(shape).contiguous();
}

}  // namespace masked_loss::cuda
