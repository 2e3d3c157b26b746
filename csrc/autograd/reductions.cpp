#include <ATen/TensorOperators.h>
#include <torch/library.h>

#include "autograd/recorded.h"
#include "composite/reductions.h"

namespace masked_loss::autograd {
namespace {

// The inner ops, below autograd.
std::tuple<Tensor, Tensor, Tensor> plain_moments(const Tensor& input, const OptionalTensor& mask, std::int64_t order,
                                                 at::IntArrayRef dim) {
  const at::AutoDispatchBelowADInplaceOrView below;
  // By their numbers: a program of AOTInductor's loses an empty list.
  return call<MaskedMoments>(input, mask, order, wrapped_dims(MaskedMoments::name, dim, input.dim()));
}

Tensor plain_affine(const Tensor& scale, const OptionalTensor& input, const OptionalTensor& mean,
                    const OptionalTensor& offset, const OptionalTensor& mask, c10::SymIntArrayRef sizes,
                    at::ScalarType type) {
  const at::AutoDispatchBelowADInplaceOrView below;
  return call<MaskedAffine>(scale, input, mean, offset, mask, sizes, type);
}

constexpr ReductionSteps kPlain{plain_moments, plain_affine};

// In a backward pass, of which `grads` is what arrives from upstream.
Tensor affine(const variable_list& grads, const Tensor& scale, const OptionalTensor& input, const OptionalTensor& mean,
              const OptionalTensor& offset, const OptionalTensor& mask, c10::SymIntArrayRef sizes,
              at::ScalarType type) {
  const auto& by = differentiated_again(grads) ? kCompositeSteps : kPlain;
  return by.affine(scale, input, mean, offset, mask, sizes, type);
}

// The gradient of a sum is the upstream one, and that of a mean a share of it. Neither keeps its input.
struct SumFunction : Function<SumFunction> {
  static constexpr auto name = "SumBackward";

  static Tensor forward(AutogradContext* ctx, const Tensor& input, const OptionalTensor& mask,
                        const ReductionOptions& options, bool is_mean, at::ScalarType type) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto [value, none, count] = plain_moments(input, mask, is_mean, options.dim);
    save_call(ctx, {or_undefined(mask), is_mean ? count : Tensor()}, options);
    ctx->saved_data["sizes"] = input.sym_sizes();
    ctx->saved_data["type"] = static_cast<std::int64_t>(input.scalar_type());
    return reduced(value, type, options.dim, options.keepdim);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto [tensors, options] = load_call<ReductionOptions>(ctx);
    const auto sizes = ctx->saved_data["sizes"].toSymIntVector();
    const auto type = static_cast<at::ScalarType>(ctx->saved_data["type"].toInt());
    auto share = grads[0].to(accumulation_type(type));
    if (share.dim() > 0) share = share.reshape_symint(reduced_sizes(sizes, options.dim));
    if (tensors[1].defined()) share = share / tensors[1].clamp_min(1);
    const auto gradient = affine(grads, share, {}, {}, {}, or_nullopt(tensors[0]), sizes, type);
    return {gradient, Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

// Squared deviations have twice the deviation for a gradient; what reaches them by the mean cancels.
struct MomentsFunction : Function<MomentsFunction> {
  static constexpr auto name = "MomentsBackward";

  static variable_list forward(AutogradContext* ctx, const Tensor& input, const OptionalTensor& mask,
                               at::IntArrayRef dim, Tensor* counts) {
    const auto [mean, squares, count] = plain_moments(input, mask, 2, dim);
    *counts = count;
    ctx->save_for_backward({input, or_undefined(mask), mean, count});
    ctx->set_materialize_grads(false);
    return {mean, squares};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto tensors = ctx->get_saved_variables();
    const auto &input = tensors[0], &mean = tensors[2];
    const auto mask = or_nullopt(tensors[1]);
    Tensor gradient;
    OptionalTensor share;
    if (grads[0].defined()) share = grads[0] / tensors[3].clamp_min(1);
    if (grads[1].defined()) {
      gradient = affine(grads, 2 * grads[1], input, mean, share, mask, input.sym_sizes(), input.scalar_type());
    } else if (share) {
      gradient = affine(grads, *share, {}, {}, {}, mask, input.sym_sizes(), input.scalar_type());
    }
    return {gradient, Tensor(), Tensor(), Tensor()};
  }
};

// With d = x - mean, s = (sum(d^2) / f + epsilon)^(-1/2) and a gradient g, that of s d is
// s (g - sum(g) / n) - s^3 sum(g d) / f d.
struct WhitenFunction : Function<WhitenFunction> {
  static constexpr auto name = "WhitenBackward";

  static Tensor forward(AutogradContext* ctx, const Tensor& input, const OptionalTensor& mask,
                        const WhitenOptions& options, at::ScalarType type) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto white = whiten_parts(kPlain, input, mask, options.dim, type);
    save_call(ctx, {input, or_undefined(mask), white.mean, white.scale, white.freedom}, options);
    return white.value;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto [tensors, options] = load_call<WhitenOptions>(ctx);
    const auto &input = tensors[0], &grad = grads[0];
    const auto mask = or_nullopt(tensors[1]);
    const auto gradient = differentiated_again(grads)
                              ? composite_whiten_backward(grad, input, mask, options.dim)
                              : plain(grad, input, mask, tensors[2], tensors[3], tensors[4], options.dim);
    return {gradient, Tensor(), Tensor(), Tensor()};
  }

  static Tensor plain(const Tensor& given, const Tensor& input, const OptionalTensor& mask, const Tensor& mean,
                      const Tensor& scale, const Tensor& freedom, at::IntArrayRef dim) {
    const auto sizes = input.sym_sizes();
    const auto type = input.scalar_type(), wide = scale.scalar_type();
    // It has the result's dtype, whose accumulation dtype may be another.
    const auto grad = accumulation_type(given.scalar_type()) == wide ? given : given.to(wide);
    const auto share = std::get<0>(plain_moments(grad, mask, 1, dim));
    const auto products = plain_affine(grad.to(wide), input, mean, {}, mask, sizes, wide);
    const auto along = std::get<0>(plain_moments(products, {}, 0, dim)) * scale.pow(3) / freedom;
    const auto offset = plain_affine(along.neg(), input, mean, {}, mask, sizes, wide);
    // Rounded once.
    const auto computed = grad.scalar_type() == type ? type : wide;
    return plain_affine(scale, grad, share, offset, mask, sizes, computed).to(type);
  }
};

constexpr ReductionSteps kRecorded{
    .moments =
        [](const Tensor& input, const OptionalTensor& mask, std::int64_t, at::IntArrayRef dim) {
          Tensor count;  // an integer: no output of something differentiable
          const auto results = MomentsFunction::apply(input, mask, dim, &count);
          return std::make_tuple(results[0], results[1], count);
        },
    .affine = plain_affine,
    .sum = [](const Tensor& input, const OptionalTensor& mask, const ReductionOptions& options, bool is_mean,
              at::ScalarType type) { return SumFunction::apply(input, mask, options, is_mean, type); },
    .whiten = [](const Tensor& input, const OptionalTensor& mask, const WhitenOptions& options,
                 at::ScalarType type) { return WhitenFunction::apply(input, mask, options, type); }};

const ReductionSteps& steps_of(const Tensor& input) {
  switch (path_of(std::tie(input))) {
    case Path::Composite: return kCompositeSteps;
    case Path::Recorded: return kRecorded;
    default: return kPlain;
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(masked_loss, Autograd, m) {
  implement_reductions<steps_of>(m);
  implement_inner(m, {MaskedMoments::name, MaskedAffine::name});
}

}  // namespace masked_loss::autograd
