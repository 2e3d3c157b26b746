#pragma once

#include <ATen/core/Tensor.h>

#include "rows.h"

namespace masked_loss {

// A tensor's strides over its row dimensions: those of size 1 repeat, and `dim`, if any, is left out.
inline at::DimVector row_strides(const at::Tensor& tensor, std::int64_t left_out = -1) {
  at::DimVector strides;
  for (std::int64_t d = 0; d < tensor.dim(); ++d) {
    if (d != left_out) strides.push_back(tensor.size(d) == 1 ? 0 : tensor.stride(d));
  }
  return strides;
}

// Of a single class any stride is right; 1 is the one that kernels are fast for.
inline std::int64_t class_stride(const at::Tensor& tensor, std::int64_t dim) {
  return tensor.size(dim) <= 1 ? 1 : tensor.stride(dim);
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
  // No row is looked for where there is none.
  for (int d = 1; d < rows.dims && rows.count > 0; ++d) rows.by_size[d] = Quotient(rows.sizes[d]);
  return rows;
}

inline ElementType element_type(at::ScalarType type) {
  switch (type) {
    case at::kFloat: return ElementType::Float;
    case at::kDouble: return ElementType::Double;
    case at::kBFloat16: return ElementType::BFloat16;
    case at::kHalf: return ElementType::Half;
    default: return ElementType::Byte;
  }
}

// `tensor` has the rank of `shape`, and each size equals it or is repeated.
inline Operand make_operand(const at::Tensor& tensor, at::IntArrayRef shape) {
  auto strides = row_strides(tensor);
  for (std::size_t d = 0; d < shape.size(); ++d) {
    if (tensor.size(d) != shape[d]) strides[d] = 0;
  }
  return {tensor.const_data_ptr(), element_type(tensor.scalar_type()), make_rows<1>(shape, {strides})};
}

}  // namespace masked_loss
