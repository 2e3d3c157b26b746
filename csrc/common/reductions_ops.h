#pragma once

#include <masked_loss/reductions.h>

#include "checks.h"

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

struct MaskedSum : OpWithOptions<ReductionOptions, Tensor, const Tensor&, const OptionalTensor&> {
  static constexpr auto name = "masked_sum";
};
struct MaskedMean : OpWithOptions<ReductionOptions, Tensor, const Tensor&, const OptionalTensor&> {
  static constexpr auto name = "masked_mean";
};
struct MaskedVar : OpWithOptions<VarianceOptions, Tensor, const Tensor&, const OptionalTensor&> {
  static constexpr auto name = "masked_var";
};
struct MaskedStd : OpWithOptions<VarianceOptions, Tensor, const Tensor&, const OptionalTensor&> {
  static constexpr auto name = "masked_std";
};
struct MaskedWhiten : OpWithOptions<WhitenOptions, Tensor, const Tensor&, const OptionalTensor&> {
  static constexpr auto name = "masked_whiten";
};

// Of the kept elements: order 0 -> (sum, nothing, nothing), order 1 -> (mean, nothing, count), order 2 -> (mean, sum of
// squared deviations from it, count). In the accumulation dtype, the count in int64; reduced dimensions stay with a
// size of 1.
struct MaskedMoments
    : Op<std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const OptionalTensor&, std::int64_t, at::IntArrayRef)> {
  static constexpr auto name = "_masked_moments";
};
// (scale, input, mean, offset, mask, sizes, dtype) -> scale * (input - mean) + offset, or scale without an input, where
// it is kept, and else 0; all broadcast to `sizes`. Used for the gradients of sums, means and variances, and for
// whitening.
struct MaskedAffine : Op<Tensor(const Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                                const OptionalTensor&, c10::SymIntArrayRef, at::ScalarType)> {
  static constexpr auto name = "_masked_affine";
};

// A call of a reduction: its input in a dtype that its accumulation dtype follows from, and the dtype of its result.
struct ResolvedReduction {
  Tensor input;
  at::ScalarType type;
};
ResolvedReduction resolve_reduction(const char* op, const Tensor& input, const OptionalTensor& mask,
                                    at::IntArrayRef dim, std::optional<at::ScalarType> dtype);

// Of the inner ops. check_moments returns the wrapped dimensions, all of them if `dim` is empty.
at::DimVector check_moments(const Tensor& input, const OptionalTensor& mask, std::int64_t order, at::IntArrayRef dim);
void check_affine(const Tensor& scale, const OptionalTensor& input, const OptionalTensor& mean,
                  const OptionalTensor& offset, const OptionalTensor& mask, c10::SymIntArrayRef sizes,
                  at::ScalarType type);

}  // namespace masked_loss
