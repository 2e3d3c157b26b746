#pragma once

#include "common/checks.h"

namespace masked_loss {

// What the inner ops of the reductions do in ATen ops: for functorch, forward-mode AD, double backward and devices
// without kernels of ours.
std::tuple<Tensor, Tensor, Tensor> composite_moments(const Tensor& input, const OptionalTensor& mask,
                                                     std::int64_t order, at::IntArrayRef dim);
Tensor composite_spread(const Tensor& scale, const OptionalTensor& input, const OptionalTensor& mean,
                        const OptionalTensor& offset, const OptionalTensor& mask, c10::SymIntArrayRef sizes,
                        at::ScalarType type);

// A result in its dtype, from what was computed, of which each dimension is left.
Tensor finished(const Tensor& value, at::ScalarType type, at::IntArrayRef dim, bool keepdim);

// What whitens, and its parts in the accumulation dtype.
struct Whitened {
  Tensor value, mean, scale, freedom;
};

// The public ops in terms of the first two, whoever computes these.
struct ReductionSteps {
  std::tuple<Tensor, Tensor, Tensor> (*moments)(const Tensor& input, const OptionalTensor& mask, std::int64_t order,
                                                at::IntArrayRef dim);
  Tensor (*spread)(const Tensor& scale, const OptionalTensor& input, const OptionalTensor& mean,
                   const OptionalTensor& offset, const OptionalTensor& mask, c10::SymIntArrayRef sizes,
                   at::ScalarType type);
  // Ops as a whole, where that takes less than their parts; or null.
  Tensor (*sum)(const Tensor& input, const OptionalTensor& mask, const ReductionOptions& options, bool is_mean,
                at::ScalarType type) = nullptr;
  Tensor (*whiten)(const Tensor& input, const OptionalTensor& mask, at::IntArrayRef dim, at::ScalarType type) = nullptr;
};

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

// Registers the public ops, which do what Steps::of(input) says.
template <class Steps>
struct Reductions {
  template <auto reduce, class Options>
  static Tensor op(const Tensor& input, const OptionalTensor& mask, const Options& options) {
    return reduce(Steps::of(input), input, mask, options);
  }

  template <class Library>
  static void implement(Library& m) {
    m.impl(MaskedSum::op, MaskedSum::kernel<op<reduce_sum, ReductionOptions>>);
    m.impl(MaskedMean::op, MaskedMean::kernel<op<reduce_mean, ReductionOptions>>);
    m.impl(MaskedVar::op, MaskedVar::kernel<op<reduce_var, VarianceOptions>>);
    m.impl(MaskedStd::op, MaskedStd::kernel<op<reduce_std, VarianceOptions>>);
    m.impl(MaskedWhiten::op, MaskedWhiten::kernel<op<whiten, WhitenOptions>>);
  }
};

}  // namespace masked_loss
