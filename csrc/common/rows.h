#pragma once

#include <array>
#include <cstdint>

#include "host_device.h"

namespace masked_loss {

inline constexpr int kMaxRowDims = 16;

// The row dimensions of several operands, walked together: row r of operand k lies at offsets(r)[k].
template <int Operands>
struct Rows {
  std::int64_t count = 1;
  int dims = 0;
  std::int64_t sizes[kMaxRowDims];
  std::int64_t strides[Operands][kMaxRowDims];

  MASKED_LOSS_HD std::array<std::int64_t, Operands> offsets(std::int64_t row) const {
    std::array<std::int64_t, Operands> result{};
    for (int d = dims - 1; d > 0; --d) {
      const std::int64_t rest = row / sizes[d], index = row - rest * sizes[d];
      for (int k = 0; k < Operands; ++k) result[k] += index * strides[k][d];
      row = rest;
    }
    if (dims > 0) {
      for (int k = 0; k < Operands; ++k) result[k] += row * strides[k][0];
    }
    return result;
  }
};

}  // namespace masked_loss
