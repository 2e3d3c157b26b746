#include "composite/reductions.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/clamp_min.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/sqrt.h>
#include <ATen/ops/square.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include "common/paths.h"
#include "composite/masks.h"
#include "composite/reduce.h"

namespace masked_loss {
namespace {

constexpr double kEpsilon = 1e-8;  // of whiten

Tensor without_dims(const Tensor& reduced, at::IntArrayRef dim, bool keepdim) {
  if (keepdim || reduced.dim() == 0) return reduced;
  return dim.empty() ? reduced.squeeze(every_dim(reduced.dim())) : reduced.squeeze(dim);
}

// What sums of squares are divided by: variances are 0 of nothing, NaN of no more elements than the correction.
Tensor freedom_of(const Tensor& count, at::ScalarType type, double correction) {
  const auto freedom = (count.to(type) - correction).clamp_min(0);
  return at::where(count.eq(0), at::ones_like(freedom), freedom);
}

Tensor variance(const Tensor& squares, const Tensor& count, double correction) {
  return squares / freedom_of(count, squares.scalar_type(), correction);
}

Tensor reduce_to_sum(const ReductionSteps& by, const ResolvedReduction& of, const OptionalTensor& mask,
                     const ReductionOptions& options, bool is_mean) {
  const auto& [input, type] = of;
  const bool is_integral = at::isIntegralType(input.scalar_type(), /*includeBool=*/true);
  if (by.sum != nullptr && !is_integral) return by.sum(input, mask, options, is_mean, type);
  const auto moments = is_integral ? composite_moments : by.moments;
  return reduced(std::get<0>(moments(input, mask, is_mean, options.dim)), type, options.dim, options.keepdim);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> composite_moments(const Tensor& input, const OptionalTensor& mask,
                                                     std::int64_t order, at::IntArrayRef dim) {
  const auto dims = check_moments(input, mask, order, dim);
  const auto keep = kept_elements(input, mask);
  const auto type = input.scalar_type();
  const auto x = kept_or(keep, at::isFloatingType(type) ? input.to(accumulation_type(type)) : input, 0);
  const auto sum = x.sum(dims, /*keepdim=*/true);
  const auto integers = input.options().dtype(at::kLong);
  if (order == 0) return {sum, at::empty({0}, sum.options()), at::empty({0}, integers)};
  const auto counted = keep.defined() ? keep : at::ones_like(input, input.options().dtype(at::kBool));
  const auto count = counted.sum(dims, /*keepdim=*/true);
  const auto mean = sum / count.clamp_min(1);
  if (order == 1) return {mean, at::empty({0}, mean.options()), count};
  // Around a constant: the derivative by way of the mean is a sum that cancels, unless it overflows. The last term is
  // 0, and so is its derivative; its second derivative is that of the mean.
  const auto center = mean.detach();
  const auto off = at::where(center.isfinite(), mean - center, at::zeros_like(mean));
  const auto deviation = kept_or(keep, x - center, 0);
  // A product, as the derivative of a square doubles the deviation first.
  const auto squares = (deviation * deviation).sum(dims, /*keepdim=*/true);
  return {mean, squares - count * off.square(), count};
}

Tensor composite_affine(const Tensor& scale, const OptionalTensor& input, const OptionalTensor& mean,
                        const OptionalTensor& offset, const OptionalTensor& mask, c10::SymIntArrayRef sizes,
                        at::ScalarType type) {
  check_affine(scale, input, mean, offset, mask, sizes, type);
  auto value = scale.expand_symint(sizes);
  const auto keep = kept_elements(value, mask);
  if (input) value = value * kept_or(keep, input->to(scale.scalar_type()) - *mean, 0);
  return kept_or(keep, offset ? value + *offset : value, 0).to(type);
}

Tensor composite_whiten_backward(const Tensor& grad, const Tensor& input, const OptionalTensor& mask,
                                 at::IntArrayRef dim) {
  return composite_gradients({input}, grad, [&](const std::vector<Tensor>& leaves) {
    return whiten(kCompositeSteps, leaves[0], mask, {.dim = dim.vec(), .dtype = grad.scalar_type()});
  })[0];
}

c10::SymDimVector reduced_sizes(c10::SymIntArrayRef sizes, at::IntArrayRef dim) {
  c10::SymDimVector result(sizes.begin(), sizes.end());
  const auto rank = static_cast<std::int64_t>(sizes.size());
  if (dim.empty()) std::fill(result.begin(), result.end(), 1);
  for (const auto d : dim) result[d < 0 ? d + rank : d] = 1;
  return result;
}

Tensor reduced(const Tensor& value, at::ScalarType type, at::IntArrayRef dim, bool keepdim) {
  return converted(without_dims(value, dim, keepdim), type);
}

Tensor reduce_sum(const ReductionSteps& by, const Tensor& given, const OptionalTensor& mask,
                  const ReductionOptions& options) {
  const auto resolved = resolve_reduction(MaskedSum::name, given, mask, options.dim, options.dtype);
  return reduce_to_sum(by, resolved, mask, options, /*is_mean=*/false);
}

Tensor reduce_mean(const ReductionSteps& by, const Tensor& given, const OptionalTensor& mask,
                   const ReductionOptions& options) {
  const auto resolved = resolve_reduction(MaskedMean::name, given, mask, options.dim, options.dtype);
  return reduce_to_sum(by, resolved, mask, options, /*is_mean=*/true);
}

Tensor reduce_var(const ReductionSteps& by, const Tensor& given, const OptionalTensor& mask,
                  const VarianceOptions& options) {
  const auto [input, type] = resolve_reduction(MaskedVar::name, given, mask, options.dim, options.dtype);
  const auto [mean, squares, count] = by.moments(input, mask, 2, options.dim);
  return reduced(variance(squares, count, options.correction), type, options.dim, options.keepdim);
}

Tensor reduce_std(const ReductionSteps& by, const Tensor& given, const OptionalTensor& mask,
                  const VarianceOptions& options) {
  const auto [input, type] = resolve_reduction(MaskedStd::name, given, mask, options.dim, options.dtype);
  const auto [mean, squares, count] = by.moments(input, mask, 2, options.dim);
  const auto var = variance(squares, count, options.correction);
  // The root of 0 has no derivative; as in torch, its gradient is 0.
  const auto zero = var.eq(0), root = at::where(zero, at::ones_like(var), var).sqrt();
  return reduced(at::where(zero, at::zeros_like(var), root), type, options.dim, options.keepdim);
}

Whitened whiten_parts(const ReductionSteps& by, const Tensor& input, const OptionalTensor& mask, at::IntArrayRef dim,
                      at::ScalarType type) {
  const auto [mean, squares, count] = by.moments(input, mask, 2, dim);
  const auto freedom = freedom_of(count, squares.scalar_type(), 1);
  const auto scale = (squares / freedom + kEpsilon).rsqrt();
  // Rounded once: in the input's dtype only if that is the result's.
  const auto computed = type == input.scalar_type() ? type : scale.scalar_type();
  const auto value = by.affine(scale, input, mean, {}, mask, input.sym_sizes(), computed);
  return {computed == type ? value : value.to(type), mean, scale, freedom};
}

Tensor whiten(const ReductionSteps& by, const Tensor& given, const OptionalTensor& mask, const WhitenOptions& options) {
  const auto [input, type] = resolve_reduction(MaskedWhiten::name, given, mask, options.dim, options.dtype);
  if (by.whiten != nullptr) return by.whiten(input, mask, options, type);
  // The gradient has several terms, which are added before they are rounded.
  const auto wide = is_differentiated(input) ? input.to(accumulation_type(input.scalar_type())) : input;
  return whiten_parts(by, wide, mask, options.dim, type).value;
}

}  // namespace masked_loss

namespace masked_loss::composite {
namespace {

std::tuple<Tensor, Tensor, Tensor> moments(const Tensor& input, const OptionalTensor& mask, std::int64_t order,
                                           at::IntArrayRef dim) {
  // By their numbers: a program of AOTInductor's loses an empty list.
  return call<MaskedMoments>(input, mask, order, wrapped_dims(MaskedMoments::name, dim, input.dim()));
}

Tensor affine(const Tensor& scale, const OptionalTensor& input, const OptionalTensor& mean,
              const OptionalTensor& offset, const OptionalTensor& mask, c10::SymIntArrayRef sizes,
              at::ScalarType type) {
  return call<MaskedAffine>(scale, input, mean, offset, mask, sizes, type);
}

// Below autograd.
ReductionSteps steps_of(const Tensor&) { return {moments, affine}; }

void implement(torch::Library& m) {
  implement_reductions<steps_of>(m);
  impl<MaskedMoments, composite_moments>(m);
  impl<MaskedAffine, composite_affine>(m);
}

}  // namespace

TORCH_LIBRARY_IMPL(masked_loss, CompositeExplicitAutograd, m) { implement(m); }

TORCH_LIBRARY_IMPL(masked_loss, FuncTorchBatched, m) { implement(m); }

}  // namespace masked_loss::composite
