#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "common/paths.h"
#include "composite/softmax.h"

namespace masked_loss::autograd {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

// Keeps the result and not the input, as torch's.
struct SoftmaxFunction : Function<SoftmaxFunction> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& input, const OptionalTensor& mask,
                        const SoftmaxSlices& slices) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto result = call<SoftmaxForward>(input, mask, slices);
    ctx->save_for_backward({result, mask.value_or(Tensor())});
    ctx->saved_data["slices"] =
        std::vector<std::int64_t>{static_cast<std::int64_t>(slices.kind), slices.dim, slices.causal};
    return result;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const auto mask = optional(saved[1]);
    const auto numbers = ctx->saved_data["slices"].toIntVector();
    const SoftmaxSlices slices{static_cast<SoftmaxKind>(numbers[0]), numbers[1], numbers[2] != 0};
    auto gradient = differentiated_again(grads) ? composite_softmax_backward(grads[0], saved[0], mask, slices)
                                                : call<SoftmaxBackward>(grads[0], saved[0], mask, slices);
    return {gradient, Tensor(), Tensor()};
  }
};

struct LogsumexpFunction : Function<LogsumexpFunction> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& input, const OptionalTensor& mask,
                        const LogsumexpSlices& slices) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto result = call<LogsumexpForward>(input, mask, slices);
    ctx->save_for_backward({result, input, mask.value_or(Tensor())});
    ctx->saved_data["dim"] = slices.dim;
    ctx->saved_data["causal"] = slices.causal;
    return result;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const auto mask = optional(saved[2]);
    const LogsumexpSlices slices{ctx->saved_data["dim"].toIntVector(), ctx->saved_data["causal"].toBool()};
    auto gradient = differentiated_again(grads)
                        ? composite_logsumexp_backward(grads[0], saved[0], saved[1], mask, slices)
                        : call<LogsumexpBackward>(grads[0], saved[0], saved[1], mask, slices);
    return {gradient, Tensor(), Tensor()};
  }
};

// The inner op `Forward` by whichever way is right for the input.
template <class Forward, class Function, auto composite, class Slices>
Tensor forward(const Tensor& input, const OptionalTensor& mask, const Slices& slices) {
  static const auto op = Forward::find(Forward::name);
  if (functorch_active() || has_tangent(input) || !has_kernel(op, input)) return composite(input, mask, slices);
  if (wants_grad(input)) return Function::apply(input, mask, slices);
  const at::AutoDispatchBelowADInplaceOrView below;
  return Forward::call(op, input, mask, slices);
}

template <SoftmaxKind kind>
Tensor softmax(const Tensor& given, const OptionalTensor& mask, const SoftmaxOptions& options) {
  const auto input = resolve_softmax(SoftmaxOp<kind>::op, given, mask, options.dim, options.causal, options.dtype);
  return forward<SoftmaxForward, SoftmaxFunction, composite_softmax>(input, mask,
                                                                     SoftmaxSlices{kind, options.dim, options.causal});
}

Tensor logsumexp(const Tensor& given, const OptionalTensor& mask, const LogsumexpOptions& options) {
  const auto input = resolve_softmax(Logsumexp::op, given, mask, options.dim, options.causal, options.dtype);
  const auto result = forward<LogsumexpForward, LogsumexpFunction, composite_logsumexp>(
      input, mask, LogsumexpSlices{options.dim, options.causal});
  return reduced_logsumexp(result, input, options);
}

}  // namespace

TORCH_LIBRARY_IMPL(masked_loss, Autograd, m) {
  using enum SoftmaxKind;
  m.impl("softmax", SoftmaxOp<Softmax>::kernel<softmax<Softmax>>);
  m.impl("log_softmax", SoftmaxOp<LogSoftmax>::kernel<softmax<LogSoftmax>>);
  m.impl("logsumexp", Logsumexp::kernel<logsumexp>);
  for (const auto* op : {"_softmax_forward", "_softmax_backward", "_logsumexp_forward", "_logsumexp_backward"}) {
    m.impl(op, torch::autograd::autogradNotImplementedFallback());
  }
}

}  // namespace masked_loss::autograd
