#pragma once

#include <array>
#include <cstdint>

#include "host_device.h"

namespace masked_loss {

// Dimensions that cannot be merged have two elements at least: more of them than this do not fit in a memory.
inline constexpr int kMaxRowDims = 32;

// Division by a number that is known before many divisions: a multiplication and two shifts, exact for every dividend
// of 64 bits (Granlund and Montgomery, Division by Invariant Integers using Multiplication, 1994, figure 4.1).
class Quotient {
 public:
  Quotient() = default;
  explicit Quotient(std::int64_t divisor) {
    int bits = 0;
    while (bits < 63 && (std::int64_t{1} << bits) < divisor) ++bits;
    const unsigned __int128 over = (static_cast<unsigned __int128>(1) << bits) - divisor;
    multiplier_ = static_cast<std::uint64_t>((over << 64) / divisor + 1);
    first_ = bits < 1 ? bits : 1;
    second_ = bits < 1 ? 0 : bits - 1;
  }

  MASKED_LOSS_HD std::int64_t operator()(std::int64_t dividend) const {
    const auto n = static_cast<std::uint64_t>(dividend);
    const auto high = static_cast<std::uint64_t>(static_cast<unsigned __int128>(multiplier_) * n >> 64);
    return static_cast<std::int64_t>((high + ((n - high) >> first_)) >> second_);
  }

 private:
  std::uint64_t multiplier_;
  int first_, second_;
};

// The row dimensions of several operands, walked together: row r of operand k lies at offsets(r)[k].
template <int Operands, int MaxDims = kMaxRowDims>
struct Rows {
  std::int64_t count = 1;
  int dims = 0;
  std::int64_t sizes[MaxDims];
  Quotient by_size[MaxDims];
  std::int64_t strides[Operands][MaxDims];

  MASKED_LOSS_HD std::array<std::int64_t, Operands> offsets(std::int64_t row) const { return offsets(row, dims); }

  // Of a row of the first so many dimensions alone.
  MASKED_LOSS_HD std::array<std::int64_t, Operands> offsets(std::int64_t row, int first_dims) const {
    std::array<std::int64_t, Operands> result{};
    for (int d = first_dims - 1; d > 0; --d) {
      const std::int64_t rest = by_size[d](row), index = row - rest * sizes[d];
      for (int k = 0; k < Operands; ++k) result[k] += index * strides[k][d];
      row = rest;
    }
    if (first_dims > 0) {
      for (int k = 0; k < Operands; ++k) result[k] += row * strides[k][0];
    }
    return result;
  }
};

enum class ElementType { Float, Double, BFloat16, Half, Byte };

constexpr std::int64_t element_bytes(ElementType type) {
  switch (type) {
    case ElementType::Double: return 8;
    case ElementType::Float: return 4;
    case ElementType::Byte: return 1;
    default: return 2;
  }
}

// A tensor with the result's shape, whatever its strides; without data there is none.
struct Operand {
  const void* data = nullptr;
  ElementType type;
  Rows<1> at;  // its elements in the order of the result's
};

}  // namespace masked_loss
