#pragma once

#include <ATen/ops/empty.h>

#include <algorithm>

#include "reductions.h"
#include "reductions_ops.h"
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

// (first, second, count) of the moments over `dims`; what their order lacks has no elements.
inline std::tuple<Tensor, Tensor, Tensor> empty_moments(const Tensor& input, std::int64_t order, at::IntArrayRef dims) {
  c10::SymDimVector sizes(input.sym_sizes());
  for (const auto d : dims) {
    if (!sizes.empty()) sizes[d] = 1;
  }
  const auto from_order = [&](std::int64_t first, at::ScalarType type) {
    const auto options = input.options().dtype(type);
    return order >= first ? at::empty_symint(sizes, options) : at::empty({0}, options);
  };
  const auto type = accumulation_type(input.scalar_type());
  return {from_order(0, type), from_order(2, type), from_order(1, at::kLong)};
}

// Where kernels write them; a pointer is null where there are no elements.
template <class A>
MomentsResult<A> moments_result(const std::tuple<Tensor, Tensor, Tensor>& moments, std::int64_t order) {
  const auto& [first, second, count] = moments;
  return {first.mutable_data_ptr<A>(), order < 2 ? nullptr : second.mutable_data_ptr<A>(),
          order < 1 ? nullptr : count.mutable_data_ptr<std::int64_t>()};
}

// What `affine` reads its input as: the result's dtype, or one whose accumulation dtype that is.
inline at::ScalarType affine_input_type(const OptionalTensor& input, at::ScalarType type) {
  return input && accumulation_type(input->scalar_type()) == type ? input->scalar_type() : type;
}

}  // namespace masked_loss
