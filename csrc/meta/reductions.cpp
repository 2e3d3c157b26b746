#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/reductions_operands.h"

namespace masked_loss::meta {
namespace {

std::tuple<Tensor, Tensor, Tensor> masked_moments(const Tensor& input, const OptionalTensor& mask, std::int64_t order,
                                                  at::IntArrayRef dim) {
  return empty_moments(input, order, check_moments(input, mask, order, dim));
}

Tensor masked_affine(const Tensor& scale, const OptionalTensor& input, const OptionalTensor& mean,
                     const OptionalTensor& offset, const OptionalTensor& mask, c10::SymIntArrayRef sizes,
                     at::ScalarType type) {
  check_affine(scale, input, mean, offset, mask, sizes, type);
  return at::empty_symint(sizes, scale.options().dtype(type));
}

}  // namespace

TORCH_LIBRARY_IMPL(masked_loss, Meta, m) {
  impl<MaskedMoments, masked_moments>(m);
  impl<MaskedAffine, masked_affine>(m);
}

}  // namespace masked_loss::meta
