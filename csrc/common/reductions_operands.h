#pragma once

#include <algorithm>

#include "checks.h"
#include "reductions_work.h"
#include "strides.h"

namespace masked_loss {

// Tensors of the moments over `dims` as the kernels of any device see them. `mask` has bytes, or is undefined, and has
// the input's sizes by its strides; the input has a dimension.
template <class T>
MomentsWork<T> make_moments_work(const Tensor& input, const Tensor& mask, at::IntArrayRef dims) {
  at::DimVector sizes[2];
  std::array<at::DimVector, 2> strides[2];
  const auto input_strides = row_strides(input);
  const auto mask_strides = mask.defined() ? row_strides(mask) : at::DimVector();
  for (std::int64_t d = 0; d < input.dim(); ++d) {
    const bool reduced = std::find(dims.begin(), dims.end(), d) != dims.end();
    sizes[reduced].push_back(input.size(d));
    strides[reduced][0].push_back(input_strides[d]);
    if (mask.defined()) strides[reduced][1].push_back(mask_strides[d]);
  }
  return {make_rows<2>(sizes[false], strides[false]), make_rows<2>(sizes[true], strides[true]),
          static_cast<const T*>(input.const_data_ptr()),
          mask.defined() ? static_cast<const std::uint8_t*>(mask.const_data_ptr()) : nullptr};
}

// The sizes of what is reduced to 1.
template <class Sizes>
auto reduced_sizes(const Sizes& sizes, at::IntArrayRef dims) {
  auto result = sizes;
  for (const auto d : dims) {
    if (!result.empty()) result[d] = 1;
  }
  return result;
}

}  // namespace masked_loss
