#pragma once

#include <masked_loss/masked_fill.h>

#include <array>
#include <cstdint>

#include "checks.h"

namespace masked_loss {

// The value is a number or a tensor.
template <class Value>
struct MaskedFill : Op<Tensor(const Tensor&, const Tensor&, const Value&)> {
  static constexpr auto name = "masked_fill", overload = std::is_same_v<Value, Tensor> ? "Tensor" : "Scalar";
};
template <class Value>
struct MaskedFill_ : Op<void(Tensor&, const Tensor&, const Value&)> {
  static constexpr auto name = "masked_fill_", overload = MaskedFill<Value>::overload;
};
inline const Tensor* tensor_or_null(const Tensor& value) { return &value; }
inline const Tensor* tensor_or_null(const at::Scalar&) { return nullptr; }

void check_masked_fill(const Tensor& input, const Tensor& mask, const Tensor* value);
void check_masked_fill_(const Tensor& input, const Tensor& mask, const Tensor* value);
void check_memory_overlap(const Tensor& input, const Tensor& mask);  // of masked_fill_, on tensors that have memory

// A view of `input` with the shape that it and `mask` broadcast to.
Tensor broadcast_to_mask(const Tensor& input, const Tensor& mask);

// An element is moved as its bits, whatever its dtype: those of `value` in the dtype of `input`, at the front.
using Bits16 = std::array<std::uint64_t, 2>;
Bits16 element_bits(const char* op, const at::Scalar& value, const Tensor& input);

}  // namespace masked_loss
