#pragma once

#include <ATen/core/Tensor.h>

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

// A tensor's strides over its row dimensions: those of size 1 repeat, and `dim`, if any, is left out.
inline at::DimVector row_strides(const at::Tensor& tensor, std::int64_t left_out = -1) {
  at::DimVector strides;
  for (std::int64_t d = 0; d < tensor.dim(); ++d) {
    if (d != left_out) strides.push_back(tensor.size(d) == 1 ? 0 : tensor.stride(d));
  }
  return strides;
}

// Merges neighbouring dimensions that every operand steps through alike; an operand without strides stays at 0.
template <int Operands>
Rows<Operands> make_rows(at::IntArrayRef sizes, const std::array<at::DimVector, Operands>& strides) {
  Rows<Operands> rows;
  const auto stride = [&](int k, std::size_t d) { return strides[k].empty() ? 0 : strides[k][d]; };
  for (std::size_t d = 0; d < sizes.size(); ++d) {
    rows.count *= sizes[d];
    if (sizes[d] == 1) continue;
    bool merge = rows.dims > 0;
    for (int k = 0; k < Operands && merge; ++k) {
      merge = rows.strides[k][rows.dims - 1] == stride(k, d) * sizes[d];
    }
    if (!merge) {
      TORCH_CHECK(rows.dims < kMaxRowDims, "masked_loss: expected at most ", kMaxRowDims,
                  " dimensions that cannot be merged, got more");
      rows.sizes[rows.dims++] = 1;
    }
    rows.sizes[rows.dims - 1] *= sizes[d];
    for (int k = 0; k < Operands; ++k) rows.strides[k][rows.dims - 1] = stride(k, d);
  }
  return rows;
}

}  // namespace masked_loss
