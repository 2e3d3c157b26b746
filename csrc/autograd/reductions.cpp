#include <ATen/TensorOperators.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "autograd/paths.h"
#include "composite/reductions.h"

namespace masked_loss::autograd {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

Tensor spread(const Tensor& scale, const OptionalTensor& input, const OptionalTensor& mean,
              const OptionalTensor& offset, const OptionalTensor& mask, c10::SymIntArrayRef sizes,
              at::ScalarType type) {
  if (at::GradMode::is_enabled()) return composite_spread(scale, input, mean, offset, mask, sizes, type);
  return handle_of<MaskedSpread>().call(scale, input, mean, offset, mask, sizes, type);
}

// The gradient of a sum is the upstream one, and that of a mean a share of it. Squared deviations have twice the
// deviation; what reaches them by the mean cancels.
struct MomentsFunction : Function<MomentsFunction> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Tensor& input, const OptionalTensor& mask,
                               std::int64_t order, at::IntArrayRef dim, Tensor* counts) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto [first, second, count] = handle_of<MaskedMoments>().call(input, mask, order, dim);
    *counts = count;
    // A sum does not keep its input.
    const bool squares = order == 2;
    ctx->save_for_backward(
        {mask.value_or(Tensor()), squares ? input : Tensor(), squares ? first : Tensor(), squares ? count : Tensor()});
    ctx->saved_data["sizes"] = input.sym_sizes();
    ctx->saved_data["type"] = static_cast<std::int64_t>(input.scalar_type());
    ctx->set_materialize_grads(false);
    return squares ? variable_list{first, second} : variable_list{first};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const auto mask = saved[0].defined() ? OptionalTensor(saved[0]) : std::nullopt;
    const auto sizes = ctx->saved_data["sizes"].toSymIntVector();
    const auto type = static_cast<at::ScalarType>(ctx->saved_data["type"].toInt());
    const auto &of_first = grads[0], &input = saved[1];
    Tensor gradient;
    OptionalTensor share;
    if (of_first.defined()) share = input.defined() ? of_first / saved[3].clamp_min(1) : of_first;
    if (input.defined() && grads[1].defined()) {
      gradient = spread(2 * grads[1], input, saved[2], share, mask, sizes, type);
    } else if (share) {
      gradient = spread(*share, {}, {}, {}, mask, sizes, type);
    }
    return {gradient, Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

bool wants_grad(const Tensor& input) { return input.requires_grad() && at::GradMode::is_enabled(); }

struct Differentiable {
  static std::tuple<Tensor, Tensor, Tensor> moments(const Tensor& input, const OptionalTensor& mask, std::int64_t order,
                                                    at::IntArrayRef dim) {
    if (wants_grad(input)) {
      Tensor count;  // an integer: no output of something differentiable
      const auto results = MomentsFunction::apply(input, mask, order, dim, &count);
      return {results[0], order == 2 ? results[1] : Tensor(), count};
    }
    const at::AutoDispatchBelowADInplaceOrView below;
    return handle_of<MaskedMoments>().call(input, mask, order, dim);
  }

  // What whitens is differentiated as plain ops.
  static Tensor spread(const Tensor& scale, const OptionalTensor& input, const OptionalTensor& mean,
                       const OptionalTensor& offset, const OptionalTensor& mask, c10::SymIntArrayRef sizes,
                       at::ScalarType type) {
    if (wants_grad(*input)) return composite_spread(scale, input, mean, offset, mask, sizes, type);
    const at::AutoDispatchBelowADInplaceOrView below;
    return handle_of<MaskedSpread>().call(scale, input, mean, offset, mask, sizes, type);
  }

  static ReductionSteps of(const Tensor& input) {
    if (functorch_active() || has_tangent(input) || !has_kernel(handle_of<MaskedMoments>(), input)) {
      return {composite_moments, composite_spread};
    }
    return {moments, spread};
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
