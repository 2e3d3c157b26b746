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
  impl<MaskedFill<at::Scalar>, masked_fill<at::Scalar>>(m);
  impl<MaskedFill<Tensor>, masked_fill<Tensor>>(m);
  impl<MaskedFill_<at::Scalar>, masked_fill_<at::Scalar>>(m);
  impl<MaskedFill_<Tensor>, masked_fill_<Tensor>>(m);
}

}  // namespace masked_loss::meta
