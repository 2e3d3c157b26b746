#pragma once

#include "common/reductions_ops.h"

namespace masked_loss {

// The inner ops of the reductions in ATen ops: for functorch, forward-mode AD, double backward and devices without
// kernels of ours.
std::tuple<Tensor, Tensor, Tensor> composite_moments(const Tensor& input, const OptionalTensor& mask,
                                                     std::int64_t order, at::IntArrayRef dim);
Tensor composite_affine(const Tensor& scale, const OptionalTensor& input, const OptionalTensor& mean,
                        const OptionalTensor& offset, const OptionalTensor& mask, c10::SymIntArrayRef sizes,
                        at::ScalarType type);
Tensor composite_whiten_backward(const Tensor& grad, const Tensor& input, const OptionalTensor& mask,
                                 at::IntArrayRef dim);

// The sizes of an input whose dimensions `dim` are reduced to 1.
c10::SymDimVector reduced_sizes(c10::SymIntArrayRef sizes, at::IntArrayRef dim);

// A result in its dtype and shape, from one with all dimensions.
Tensor reduced(const Tensor& value, at::ScalarType type, at::IntArrayRef dim, bool keepdim);

// The whitened input, and in the accumulation dtype what it is made from.
struct Whitened {
  Tensor value, mean, scale, freedom;
};

// The public ops in terms of the inner ones, whoever computes these.
struct ReductionSteps {
  std::tuple<Tensor, Tensor, Tensor> (*moments)(const Tensor& input, const OptionalTensor& mask, std::int64_t order,
                                                at::IntArrayRef dim);
  Tensor (*affine)(const Tensor& scale, const OptionalTensor& input, const OptionalTensor& mean,
                   const OptionalTensor& offset, const OptionalTensor& mask, c10::SymIntArrayRef sizes,
                   at::ScalarType type);
  // Ops as a whole, where that takes less than their parts; or null.
  Tensor (*sum)(const Tensor& input, const OptionalTensor& mask, const ReductionOptions& options, bool is_mean,
                at::ScalarType type) = nullptr;
  Tensor (*whiten)(const Tensor& input, const OptionalTensor& mask, const WhitenOptions& options,
                   at::ScalarType type) = nullptr;
};
inline constexpr ReductionSteps kCompositeSteps{composite_moments, composite_affine};

Tensor reduce_sum(const ReductionSteps& by, const Tensor& input, const OptionalTensor& mask,
                  const ReductionOptions& options);
Tensor reduce_mean(const ReductionSteps& by, const Tensor& input, const OptionalTensor& mask,
                   const ReductionOptions& options);
Tensor reduce_var(const ReductionSteps& by, const Tensor& input, const OptionalTensor& mask,
                  const VarianceOptions& options);
Tensor reduce_std(const ReductionSteps& by, const Tensor& input, const OptionalTensor& mask,
                  const VarianceOptions& options);
Tensor whiten(const ReductionSteps& by, const Tensor& input, const OptionalTensor& mask, const WhitenOptions& options);
// The value in that dtype.
Whitened whiten_parts(const ReductionSteps& by, const Tensor& input, const OptionalTensor& mask, at::IntArrayRef dim,
                      at::ScalarType type);

// A kernel of a public op, which does what steps_of(input) says.
template <auto steps_of, auto reduce, class Options>
Tensor reduce_by(const Tensor& input, const OptionalTensor& mask, const Options& options) {
  return reduce(steps_of(input), input, mask, options);
}

// Registers them for every public op.
template <auto steps_of, class Library>
void implement_reductions(Library& m) {
  impl<MaskedSum, reduce_by<steps_of, reduce_sum, ReductionOptions>>(m);
  impl<MaskedMean, reduce_by<steps_of, reduce_mean, ReductionOptions>>(m);
  impl<MaskedVar, reduce_by<steps_of, reduce_var, VarianceOptions>>(m);
  impl<MaskedStd, reduce_by<steps_of, reduce_std, VarianceOptions>>(m);
  impl<MaskedWhiten, reduce_by<steps_of, whiten, WhitenOptions>>(m);
}

}  // namespace masked_loss
