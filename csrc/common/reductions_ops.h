#pragma once

#include <masked_loss/reductions.h>

#include "ops.h"

namespace masked_loss {

inline auto fields(const ReductionOptions& options) {
  const auto& [dim, keepdim, dtype] = options;
  return std::tie(dim, keepdim, dtype);
}
inline constexpr auto kReductionArguments = "int[1] dim=[], bool keepdim=False, ScalarType? dtype=None";

inline auto fields(const VarianceOptions& options) {
  const auto& [dim, keepdim, correction, dtype] = options;
  return std::tie(dim, keepdim, correction, dtype);
}
inline constexpr auto kVarianceArguments =
    "int[1] dim=[], bool keepdim=False, float correction=1., ScalarType? dtype=None";

inline auto fields(const WhitenOptions& options) {
  const auto& [dim, dtype] = options;
  return std::tie(dim, dtype);
}
inline constexpr auto kWhitenArguments = "int[1] dim=[], ScalarType? dtype=None";

struct MaskedSum : Carry<ReductionOptions, Tensor, const Tensor&, const OptionalTensor&> {
  static constexpr auto op = "masked_sum", name = "masked_loss::masked_sum";
};
struct MaskedMean : Carry<ReductionOptions, Tensor, const Tensor&, const OptionalTensor&> {
  static constexpr auto op = "masked_mean", name = "masked_loss::masked_mean";
};
struct MaskedVar : Carry<VarianceOptions, Tensor, const Tensor&, const OptionalTensor&> {
  static constexpr auto op = "masked_var", name = "masked_loss::masked_var";
};
struct MaskedStd : Carry<VarianceOptions, Tensor, const Tensor&, const OptionalTensor&> {
  static constexpr auto op = "masked_std", name = "masked_loss::masked_std";
};
struct MaskedWhiten : Carry<WhitenOptions, Tensor, const Tensor&, const OptionalTensor&> {
  static constexpr auto op = "masked_whiten", name = "masked_loss::masked_whiten";
};

// Of what is kept: order 0 -> (sum, nothing, nothing), order 1 -> (mean, nothing, count), order 2 -> (mean, sum of
// squared deviations from it, count). In the accumulation dtype, the count in int64; what is reduced stays with a size
// of 1.
struct MaskedMoments {
  static constexpr auto name = "masked_loss::_masked_moments";
  using Signature = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const OptionalTensor&, std::int64_t,
                                                       at::IntArrayRef);
};
// (scale, input, mean, offset, mask, sizes, dtype) -> scale * (input - mean) + offset, or scale without an input, where
// it is kept, and else 0; all broadcast to `sizes`. The gradients of the moments, and what whitens.
struct MaskedSpread {
  static constexpr auto name = "masked_loss::_masked_spread";
  using Signature = Tensor(const Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                           const OptionalTensor&, c10::SymIntArrayRef, at::ScalarType);
};

// The typed handle of an op that has a Signature, looked up once.
template <class Op>
const auto& handle_of() {
  static const auto op = find_op<typename Op::Signature>(Op::name);
  return op;
}

}  // namespace masked_loss
