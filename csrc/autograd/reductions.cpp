#include <ATen/TensorOperators.h>
#include <ATen/ops/alias.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "common/paths.h"
#include "composite/reductions.h"

namespace masked_loss::autograd {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

// The inner ops, below autograd.
std::tuple<Tensor, Tensor, Tensor> fused_moments(const Tensor& input, const OptionalTensor& mask, std::int64_t order,
                                                 at::IntArrayRef dim) {
  const at::AutoDispatchBelowADInplaceOrView below;
  return handle_of<MaskedMoments>().call(input, mask, order, dim);
}

Tensor fused_spread(const Tensor& scale, const OptionalTensor& input, const OptionalTensor& mean,
                    const OptionalTensor& offset, const OptionalTensor& mask, c10::SymIntArrayRef sizes,
                    at::ScalarType type) {
  const at::AutoDispatchBelowADInplaceOrView below;
  return handle_of<MaskedSpread>().call(scale, input, mean, offset, mask, sizes, type);
}

// Of a backward pass, of which `grads` is what arrives from upstream.
Tensor spread(const variable_list& grads, const Tensor& scale, const OptionalTensor& input, const OptionalTensor& mean,
              const OptionalTensor& offset, const OptionalTensor& mask, c10::SymIntArrayRef sizes,
              at::ScalarType type) {
  const auto by = differentiated_again(grads) ? composite_spread : fused_spread;
  return by(scale, input, mean, offset, mask, sizes, type);
}

// The gradient of a sum is the upstream one, and that of a mean a share of it. Neither keeps its input.
struct SumFunction : Function<SumFunction> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& input, const OptionalTensor& mask,
                        const ReductionOptions& options, bool is_mean, at::ScalarType type) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto [value, none, count] = fused_moments(input, mask, is_mean, options.dim);
    const auto result = finished(value, type, options.dim, options.keepdim);
    ctx->save_for_backward({mask.value_or(Tensor()), is_mean ? count : Tensor()});
    ctx->saved_data["sizes"] = input.sym_sizes();
    if (result.dim() > 0) ctx->saved_data["reduced"] = value.sym_sizes();
    ctx->saved_data["type"] = static_cast<std::int64_t>(input.scalar_type());
    return result;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const auto sizes = ctx->saved_data["sizes"].toSymIntVector();
    const auto type = static_cast<at::ScalarType>(ctx->saved_data["type"].toInt());
    auto share = grads[0].to(accumulation_type(type));
    if (share.dim() > 0) share = share.reshape_symint(ctx->saved_data["reduced"].toSymIntVector());
    if (saved[1].defined()) share = share / saved[1].clamp_min(1);
    const auto gradient = spread(grads, share, {}, {}, {}, optional(saved[0]), sizes, type);
    return {gradient, Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

// Squared deviations have twice the deviation for a gradient; what reaches them by the mean cancels.
struct MomentsFunction : Function<MomentsFunction> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Tensor& input, const OptionalTensor& mask,
                               at::IntArrayRef dim, Tensor* counts) {
    const auto [mean, squares, count] = fused_moments(input, mask, 2, dim);
    *counts = count;
    ctx->save_for_backward({input, mask.value_or(Tensor()), mean, count});
    ctx->set_materialize_grads(false);
    return {mean, squares};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const auto &input = saved[0], &mean = saved[2];
    const auto mask = optional(saved[1]);
    Tensor gradient;
    OptionalTensor share;
    if (grads[0].defined()) share = grads[0] / saved[3].clamp_min(1);
    if (grads[1].defined()) {
      gradient = spread(grads, 2 * grads[1], input, mean, share, mask, input.sym_sizes(), input.scalar_type());
    } else if (share) {
      gradient = spread(grads, *share, {}, {}, {}, mask, input.sym_sizes(), input.scalar_type());
    }
    return {gradient, Tensor(), Tensor(), Tensor()};
  }
};

constexpr ReductionSteps kComposite{composite_moments, composite_spread};
constexpr ReductionSteps kFused{fused_moments, fused_spread};

// With d = x - mean, s = (sum(d^2) / f + epsilon)^(-1/2) and a gradient g, that of s d is
// s (g - sum(g) / n) - s^3 sum(g d) / f d.
struct WhitenFunction : Function<WhitenFunction> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& input, const OptionalTensor& mask, at::IntArrayRef dim,
                        at::ScalarType type) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto white = whiten_parts(kFused, input, mask, dim, type);
    ctx->save_for_backward({input, mask.value_or(Tensor()), white.mean, white.scale, white.freedom});
    ctx->saved_data["dim"] = dim;
    return white.value;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const auto dim = ctx->saved_data["dim"].toIntVector();
    const auto mask = optional(saved[1]);
    auto gradient = differentiated_again(grads) ? composed(grads[0], saved[0], mask, dim)
                                                : fused(grads[0], saved[0], mask, saved[2], saved[3], saved[4], dim);
    return {gradient, Tensor(), Tensor(), Tensor()};
  }

  static Tensor fused(const Tensor& given, const Tensor& input, const OptionalTensor& mask, const Tensor& mean,
                      const Tensor& scale, const Tensor& freedom, at::IntArrayRef dim) {
    const auto sizes = input.sym_sizes();
    const auto type = input.scalar_type(), wide = scale.scalar_type();
    // It has the result's dtype, whose accumulation dtype may be another.
    const auto grad = accumulation_type(given.scalar_type()) == wide ? given : given.to(wide);
    const auto share = std::get<0>(fused_moments(grad, mask, 1, dim));
    const auto products = fused_spread(grad.to(wide), input, mean, {}, mask, sizes, wide);
    const auto along = std::get<0>(fused_moments(products, {}, 0, dim)) * scale.pow(3) / freedom;
    const auto offset = fused_spread(along.neg(), input, mean, {}, mask, sizes, wide);
    // Rounded once.
    const auto computed = grad.scalar_type() == type ? type : wide;
    return fused_spread(scale, grad, share, offset, mask, sizes, computed).to(type);
  }

  static Tensor composed(const Tensor& grad, const Tensor& input, const OptionalTensor& mask, at::IntArrayRef dim) {
    const bool create_graph = at::GradMode::is_enabled();
    const at::AutoGradMode grad_mode(true);
    // An alias: the hooks of the user's tensor are for the gradients that the engine brings to it.
    const auto leaf = input.requires_grad() ? at::alias(input) : input.detach().requires_grad_();
    const auto white = whiten(kComposite, leaf, mask, {.dim = dim.vec(), .dtype = grad.scalar_type()});
    return torch::autograd::grad({white}, {leaf}, {grad}, std::nullopt, create_graph)[0];
  }
};

struct Differentiable {
  static Tensor sum(const Tensor& input, const OptionalTensor& mask, const ReductionOptions& options, bool is_mean,
                    at::ScalarType type) {
    return SumFunction::apply(input, mask, options, is_mean, type);
  }

  static Tensor whiten(const Tensor& input, const OptionalTensor& mask, at::IntArrayRef dim, at::ScalarType type) {
    return WhitenFunction::apply(input, mask, dim, type);
  }

  static std::tuple<Tensor, Tensor, Tensor> moments(const Tensor& input, const OptionalTensor& mask, std::int64_t,
                                                    at::IntArrayRef dim) {
    Tensor count;  // an integer: no output of something differentiable
    const auto results = MomentsFunction::apply(input, mask, dim, &count);
    return {results[0], results[1], count};
  }

  static ReductionSteps of(const Tensor& input) {
    if (functorch_active() || has_tangent(input) || !has_kernel(handle_of<MaskedMoments>(), input)) return kComposite;
    return wants_grad(input) ? ReductionSteps{moments, fused_spread, sum, whiten} : kFused;
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(masked_loss, Autograd, m) {
  Reductions<Differentiable>::implement(m);
  for (const auto* op : {"_masked_moments", "_masked_spread"}) {
    m.impl(op, torch::autograd::autogradNotImplementedFallback());
  }
}

}  // namespace masked_loss::autograd
