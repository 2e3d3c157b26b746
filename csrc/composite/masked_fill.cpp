#include "composite/masked_fill.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/masked_fill.h>
#include <ATen/ops/where.h>
#include <torch/library.h>

namespace masked_loss {
namespace {

// Of bool too, whose bytes may be any.
Tensor filled(const char* op, const Tensor& mask) {
  check_mask_values(op, "mask", mask);
  return mask.ne(0);
}

}  // namespace

Tensor composite_masked_fill(const Tensor& input, const Tensor& mask, const at::Scalar& value) {
  check_masked_fill(input, mask, nullptr);
  return at::masked_fill(input, filled("masked_fill", mask), value);
}

Tensor composite_masked_fill(const Tensor& input, const Tensor& mask, const Tensor& value) {
  check_masked_fill(input, mask, &value);
  // where, because at::masked_fill has no batching rule for a tensor.
  return at::where(filled("masked_fill", mask), value.to(input.scalar_type()), input);
}

void composite_masked_fill_(Tensor& input, const Tensor& mask, const at::Scalar& value) {
  check_masked_fill_(input, mask, nullptr);
  input.masked_fill_(filled("masked_fill_", mask), value);
}

void composite_masked_fill_(Tensor& input, const Tensor& mask, const Tensor& value) {
  check_masked_fill_(input, mask, &value);
  input.copy_(at::where(filled("masked_fill_", mask), value.to(input.scalar_type()), input));
}

namespace {

void implement_in_place(torch::Library& m) {
  impl<MaskedFill_<at::Scalar>, composite_masked_fill_>(m);
  impl<MaskedFill_<Tensor>, composite_masked_fill_>(m);
}

void implement(torch::Library& m) {
  impl<MaskedFill<at::Scalar>, composite_masked_fill>(m);
  impl<MaskedFill<Tensor>, composite_masked_fill>(m);
  implement_in_place(m);
}

}  // namespace

TORCH_LIBRARY_IMPL(masked_loss, CompositeExplicitAutograd, m) { implement(m); }

TORCH_LIBRARY_IMPL(masked_loss, FuncTorchBatched, m) { implement(m); }

// torch's fallbacks for lazily conjugated and negated tensors look for what an op has changed among its returns, and an
// in-place op of ours has none.
TORCH_LIBRARY_IMPL(masked_loss, Conjugate, m) { implement_in_place(m); }

TORCH_LIBRARY_IMPL(masked_loss, Negative, m) { implement_in_place(m); }

}  // namespace masked_loss
