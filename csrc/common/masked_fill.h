#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>

namespace masked_loss {

// An element is moved as its bits, whatever its dtype.
using Bits16 = std::array<std::uint64_t, 2>;

// The bits of `value` in the dtype of `input`, at the front.
Bits16 element_bits(const char* op, const at::Scalar& value, const at::Tensor& input);

// One byte an element, which is what kernels read: it counts where it is not 0. Not as bool, whose bytes a compiler
// takes for 0 and 1, while a view of other memory may hold any.
at::Tensor byte_mask(const at::Tensor& mask);

}  // namespace masked_loss
