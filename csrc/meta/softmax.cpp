#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "common/softmax_ops.h"

namespace masked_loss::meta {
namespace {

Tensor softmax_forward(const Tensor& input, const OptionalTensor& mask, const SoftmaxSlices& slices) {
  check_softmax("_softmax_forward", input, mask, slices.dim, slices.causal);
  return at::empty_like(input);
}

Tensor softmax_backward(const Tensor&, const Tensor& result, const OptionalTensor& mask, const SoftmaxSlices& slices) {
  check_softmax("_softmax_backward", result, mask, slices.dim, slices.causal);
  return at::empty_like(result);
}

Tensor logsumexp_forward(const Tensor& input, const OptionalTensor& mask, const LogsumexpSlices& slices) {
  c10::SymDimVector sizes(input.sym_sizes().begin(), input.sym_sizes().end());
  for (const auto d : check_softmax("_logsumexp_forward", input, mask, slices.dim, slices.causal)) {
    if (!sizes.empty()) sizes[d] = 1;
  }
  return at::empty_symint(sizes, input.options().dtype(accumulation_type(input.scalar_type())));
}

Tensor logsumexp_backward(const Tensor&, const Tensor&, const Tensor& input, const OptionalTensor& mask,
                          const LogsumexpSlices& slices) {
  check_softmax("_logsumexp_backward", input, mask, slices.dim, slices.causal);
  return at::empty_like(input);
}

}  // namespace

TORCH_LIBRARY_IMPL(masked_loss, Meta, m) {
  impl<SoftmaxForward, softmax_forward>(m);
  impl<SoftmaxBackward, softmax_backward>(m);
  impl<LogsumexpForward, logsumexp_forward>(m);
  impl<LogsumexpBackward, logsumexp_backward>(m);
}

}  // namespace masked_loss::meta
