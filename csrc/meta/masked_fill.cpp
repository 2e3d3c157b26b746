#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "common/masked_fill_ops.h"

namespace masked_loss::meta {
namespace {

template <class Value>
Tensor masked_fill(const Tensor& input, const Tensor& mask, const Value& value) {
  check_masked_fill(input, mask, tensor_or_null(value));
  return at::empty_like(broadcast_to_mask(input, mask), at::MemoryFormat::Contiguous);  // as torch's
}

template <class Value>
void masked_fill_(Tensor& input, const Tensor& mask, const Value& value) {
  check_masked_fill_(input, mask, tensor_or_null(value));
}

}  // namespace

TORCH_LIBRARY_IMPL(masked_loss, Meta, m) {
  m.impl("masked_fill.Scalar", masked_fill<at::Scalar>);
  m.impl("masked_fill.Tensor", masked_fill<Tensor>);
  m.impl("masked_fill_.Scalar", masked_fill_<at::Scalar>);
  m.impl("masked_fill_.Tensor", masked_fill_<Tensor>);
}

}  // namespace masked_loss::meta
