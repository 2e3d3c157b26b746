#include "composite/softmax.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/log.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include "composite/masks.h"

namespace masked_loss {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// As kept_elements, of what a mask and causality keep.
Tensor keep_of(const Tensor& input, const OptionalTensor& mask, bool causal) {
  if (!causal) return kept_elements(input, mask);
  const auto seen = not_after(input.sym_size(-2), input.sym_size(-1), at::TensorOptions().device(input.device()));
  return kept_elements(input, mask ? mask->ne(0).logical_and(seen) : seen);
}

bool is_empty(const Tensor& input, at::IntArrayRef dims) {
  for (const auto d : dims) {
    if (input.dim() > 0 && TORCH_GUARD_OR_FALSE(input.sym_size(d).sym_eq(0))) return true;
  }
  return false;
}

// The elements in the accumulation dtype, with -inf where they are masked, but zeros in slices with nothing kept, which
// no gradient is NaN of. `some`: whether anything is kept.
Tensor filled_elements(const Tensor& input, const Tensor& keep, at::IntArrayRef dims, Tensor& some) {
  const auto x = input.to(accumulation_type(input.scalar_type()));
  if (!keep.defined()) return x;
  some = keep.to(x.scalar_type()).amax(dims, /*keepdim=*/true).ne(0);
  const auto zero = at::zeros_like(x);
  return at::where(keep, x, at::where(some, zero - kInfinity, zero));
}

}  // namespace

Tensor composite_softmax(const Tensor& input, const OptionalTensor& mask, const SoftmaxSlices& slices) {
  check_mask_values(slices.kind == SoftmaxKind::Softmax ? "softmax" : "log_softmax", "mask", mask);
  const auto dims = check_softmax("_softmax_forward", input, mask, slices.dim, slices.causal);
  if (is_empty(input, dims)) return at::zeros_like(input);
  const auto keep = keep_of(input, mask, slices.causal);
  Tensor some;
  const auto x = filled_elements(input, keep, dims, some);
  // Of plain ops, whose derivatives torch differentiates again in every order.
  const auto shifted = x - x.detach().amax(dims, /*keepdim=*/true);
  const auto exponentials = shifted.exp(), sum = exponentials.sum(dims, /*keepdim=*/true);
  const auto result = slices.kind == SoftmaxKind::Softmax ? kept_or(keep, exponentials / sum, 0)
                                                          : kept_or(keep, shifted - sum.log(), -kInfinity);
  return result.to(input.scalar_type());
}

Tensor composite_softmax_backward(const Tensor& grad, const Tensor& result, const OptionalTensor& mask,
                                  const SoftmaxSlices& slices) {
  const auto dims = check_softmax("_softmax_backward", result, mask, slices.dim, slices.causal);
  const auto type = accumulation_type(result.scalar_type());
  const auto keep = keep_of(result, mask, slices.causal);
  const auto g = kept_or(keep, grad.to(type), 0), y = kept_or(keep, result.to(type), 0);
  const auto gradient = slices.kind == SoftmaxKind::Softmax ? y * (g - (y * g).sum(dims, /*keepdim=*/true))
                                                            : g - y.exp() * g.sum(dims, /*keepdim=*/true);
  return kept_or(keep, gradient, 0).to(result.scalar_type());
}

Tensor composite_logsumexp(const Tensor& input, const OptionalTensor& mask, const LogsumexpSlices& slices) {
  check_mask_values("logsumexp", "mask", mask);
  const auto dims = check_softmax("_logsumexp_forward", input, mask, slices.dim, slices.causal);
  const auto keep = keep_of(input, mask, slices.causal);
  if (is_empty(input, dims)) {
    return input.to(accumulation_type(input.scalar_type())).sum(dims, /*keepdim=*/true) - kInfinity;
  }
  Tensor some;
  const auto x = filled_elements(input, keep, dims, some);
  const auto largest = x.detach().amax(dims, /*keepdim=*/true);
  const auto max = at::where(largest.abs().eq(kInfinity), at::zeros_like(largest), largest);
  // Beside +inf, what is finite has no share, however large its exponential.
  const auto shifted = at::where(largest.eq(kInfinity).logical_and(x.ne(kInfinity)), largest.neg(), x - max);
  return kept_or(some, shifted.exp().sum(dims, /*keepdim=*/true).log() + max, -kInfinity);
}

Tensor composite_logsumexp_backward(const Tensor& grad, const Tensor& result, const Tensor& input,
                                    const OptionalTensor& mask, const LogsumexpSlices& slices) {
  check_softmax("_logsumexp_backward", input, mask, slices.dim, slices.causal);
  const auto keep = keep_of(input, mask, slices.causal);
  const auto x = input.to(result.scalar_type());
  const auto gradient = kept_or(keep, x - result, -kInfinity).exp() * grad.to(result.scalar_type());
  return kept_or(keep, gradient, 0).to(input.scalar_type());
}

Tensor reduced_logsumexp(const Tensor& result, const Tensor& input, const LogsumexpOptions& options) {
  const auto converted = result.to(input.scalar_type());
  if (options.keepdim || input.dim() == 0) return converted;
  return options.dim.empty() ? converted.squeeze() : converted.squeeze(options.dim);
}

}  // namespace masked_loss

namespace masked_loss::composite {
namespace {

// Below autograd.
template <SoftmaxKind kind>
Tensor softmax(const Tensor& given, const OptionalTensor& mask, const SoftmaxOptions& options) {
  const auto input = resolve_softmax(SoftmaxOp<kind>::name, given, mask, options.dim, options.causal, options.dtype);
  return call<SoftmaxForward>(input, mask, SoftmaxSlices{kind, options.dim, options.causal});
}

Tensor logsumexp(const Tensor& given, const OptionalTensor& mask, const LogsumexpOptions& options) {
  const auto input = resolve_softmax(Logsumexp::name, given, mask, options.dim, options.causal, options.dtype);
  return reduced_logsumexp(call<LogsumexpForward>(input, mask, logsumexp_slices(input, options)), input, options);
}

void implement(torch::Library& m) {
  using enum SoftmaxKind;
  impl<SoftmaxOp<Softmax>, softmax<Softmax>>(m);
  impl<SoftmaxOp<LogSoftmax>, softmax<LogSoftmax>>(m);
  impl<Logsumexp, logsumexp>(m);
  impl<SoftmaxForward, composite_softmax>(m);
  impl<SoftmaxBackward, composite_softmax_backward>(m);
  impl<LogsumexpForward, composite_logsumexp>(m);
  impl<LogsumexpBackward, composite_logsumexp_backward>(m);
}

}  // namespace

TORCH_LIBRARY_IMPL(masked_loss, CompositeExplicitAutograd, m) { implement(m); }

TORCH_LIBRARY_IMPL(masked_loss, FuncTorchBatched, m) { implement(m); }

}  // namespace masked_loss::composite
