#include <torch/library.h>

#include "autograd/recorded.h"
#include "composite/softmax.h"

namespace masked_loss::autograd {
namespace {

// Keeps the result and not the input, as torch's.
struct SoftmaxFunction : Function<SoftmaxFunction> {
  static constexpr auto name = "SoftmaxBackward";

  static Tensor forward(AutogradContext* ctx, const Tensor& input, const OptionalTensor& mask,
                        const SoftmaxSlices& slices) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto result = call<SoftmaxForward>(input, mask, slices);
    save_call(ctx, {result, or_undefined(mask)}, slices);
    return result;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto [tensors, slices] = load_call<SoftmaxSlices>(ctx);
    const auto mask = or_nullopt(tensors[1]);
    const auto gradient = differentiated_again(grads) ? composite_softmax_backward(grads[0], tensors[0], mask, slices)
                                                      : call<SoftmaxBackward>(grads[0], tensors[0], mask, slices);
    return {gradient, Tensor(), Tensor()};
  }
};

struct LogsumexpFunction : Function<LogsumexpFunction> {
  static constexpr auto name = "LogsumexpBackward";

  static Tensor forward(AutogradContext* ctx, const Tensor& input, const OptionalTensor& mask,
                        const LogsumexpSlices& slices) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto result = call<LogsumexpForward>(input, mask, slices);
    save_call(ctx, {result, input, or_undefined(mask)}, slices);
    return result;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto [tensors, slices] = load_call<LogsumexpSlices>(ctx);
    const auto mask = or_nullopt(tensors[2]);
    const auto gradient = differentiated_again(grads)
                              ? composite_logsumexp_backward(grads[0], tensors[0], tensors[1], mask, slices)
                              : call<LogsumexpBackward>(grads[0], tensors[0], tensors[1], mask, slices);
    return {gradient, Tensor(), Tensor()};
  }
};

template <class Forward, class Function, auto composite, class Slices>
Tensor forward(const Tensor& input, const OptionalTensor& mask, const Slices& slices) {
  const auto path = path_of(std::tie(input));
  if (path == Path::Composite) return composite(input, mask, slices);
  if (path == Path::Recorded) return Function::apply(input, mask, slices);
  const at::AutoDispatchBelowADInplaceOrView below;
  return call<Forward>(input, mask, slices);
}

template <SoftmaxKind kind>
Tensor softmax(const Tensor& given, const OptionalTensor& mask, const SoftmaxOptions& options) {
  const auto input = resolve_softmax(SoftmaxOp<kind>::name, given, mask, options.dim, options.causal, options.dtype);
  return forward<SoftmaxForward, SoftmaxFunction, composite_softmax>(input, mask,
                                                                     SoftmaxSlices{kind, options.dim, options.causal});
}

Tensor logsumexp(const Tensor& given, const OptionalTensor& mask, const LogsumexpOptions& options) {
  const auto input = resolve_softmax(Logsumexp::name, given, mask, options.dim, options.causal, options.dtype);
  const auto result =
      forward<LogsumexpForward, LogsumexpFunction, composite_logsumexp>(input, mask, logsumexp_slices(input, options));
  return reduced_logsumexp(result, input, options);
}

}  // namespace

TORCH_LIBRARY_IMPL(masked_loss, Autograd, m) {
  using enum SoftmaxKind;
  impl<SoftmaxOp<Softmax>, softmax<Softmax>>(m);
  impl<SoftmaxOp<LogSoftmax>, softmax<LogSoftmax>>(m);
  impl<Logsumexp, logsumexp>(m);
  implement_inner(m, {SoftmaxForward::name, SoftmaxBackward::name, LogsumexpForward::name, LogsumexpBackward::name});
}

}  // namespace masked_loss::autograd
