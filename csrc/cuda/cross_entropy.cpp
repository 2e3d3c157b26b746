#include "cuda/cross_entropy.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "cuda/dispatch.h"

namespace masked_loss::cuda {
namespace {

// -> loss [N, ...] or 0-d, in the accumulation dtype
Tensor forward(const Tensor& input, const Tensor& target, const OptionalTensor& mask,
               const CrossEntropyOptions& options, CrossEntropyMode mode, Tensor* softmax, Tensor* gradient) {
  const auto arguments = check_cross_entropy_operands(input, target, mask, options);
  const OnDevice on(input);
  const auto device = on.device();
  const auto accumulation = input.options().dtype(accumulation_type(input.scalar_type()));
  Tensor loss = at::empty(row_sizes(arguments), accumulation), states;
  if (softmax != nullptr) states = *softmax = at::empty(softmax_sizes(arguments), accumulation);
  if (gradient != nullptr) *gradient = at::empty_like(input);
  dispatch(input.scalar_type(), [&](auto t, auto) {
    using A = Accumulation<decltype(t)>;
    const RowView<A> view(arguments);
    CrossEntropyRun<decltype(t)> run(make_cross_entropy_work<decltype(t)>(view, input, options, gradient), mode,
                                     device);
    const auto plan = make_row_plan(view,
                                    {.reduction = options.reduction,
                                     .normalizer = options.normalizer,
                                     .order = run.lists_rows(),
                                     .upstream = std::nullopt,
                                     .loss = loss,
                                     .softmax = states},
                                    device);
    run(plan, loss, states);
    if (options.reduction != Reduction::None) loss = sum_of_losses<A>(loss, device);
  });
  return loss;
}

Tensor cross_entropy_backward(const Tensor& grad, const Tensor& input, const Tensor& target, const Tensor& softmax,
                              const OptionalTensor& mask, const CrossEntropyOptions& options) {
  const auto arguments = check_cross_entropy_backward(grad, input, target, softmax, mask, options);
  const OnDevice on(input);
  const auto device = on.device();
  const auto accumulation = accumulation_type(input.scalar_type());
  const auto states = softmax.to(accumulation).contiguous();
  const auto gradient = at::empty_like(input);
  dispatch(input.scalar_type(), [&](auto t, auto) {
    const RowView<Accumulation<decltype(t)>> view(arguments);
    CrossEntropyRun<decltype(t)> run(make_cross_entropy_work<decltype(t)>(view, input, options, &gradient),
                                     CrossEntropyMode::Backward, device);
    const auto plan = make_row_plan(view,
                                    {.reduction = options.reduction,
                                     .normalizer = options.normalizer,
                                     .order = run.lists_rows(),
                                     .upstream = grad.to(accumulation).expand(view.sizes),
                                     .loss = {},
                                     .softmax = {}},
                                    device);
    run(plan, Tensor(), states);
  });
  return gradient;
}

void scale_gradient_(Tensor& gradient, const Tensor& grad) {
  check_scale_gradient_(gradient, grad);
  const OnDevice on(gradient);
  const auto device = on.device();
  Tensor dense = gradient.is_non_overlapping_and_dense() ? gradient : gradient.contiguous();
  const auto by = grad.to(accumulation_type(gradient.scalar_type()));
  dispatch(gradient.scalar_type(), [&](auto t, auto) {
    using T = decltype(t);
    scale_gradient(static_cast<T*>(dense.mutable_data_ptr()), dense.numel(),
                   by.template const_data_ptr<Accumulation<T>>(), device.multiprocessors, device.stream);
  });
  if (!dense.is_same(gradient)) gradient.copy_(dense);
}

Tensor loss_normalizer(const Tensor& target, const OptionalTensor& mask, const LossNormalizerOptions& options) {
  const auto arguments = check_loss_normalizer(target, mask, options);
  const OnDevice on(target);
  return loss_normalizer_type(options) == at::kDouble ? sum_of_weights(RowView<double>(arguments), on.device())
                                                      : sum_of_weights(RowView<float>(arguments), on.device());
}

Tensor check_targets(const Tensor& target, c10::SymInt num_classes, const OptionalTensor& mask,
                     at::IntArrayRef ignore_index) {
  const auto arguments = check_check_targets(target, num_classes, mask, ignore_index);
  const OnDevice on(target);
  check_rows(RowView<float>(arguments), on.device());
  return target.clone();
}

}  // namespace

MASKED_LOSS_CUDA_IMPL(m) {
  CrossEntropyOps<forward>::implement(m);
  impl<CrossEntropyBackward, cross_entropy_backward>(m);
  impl<ScaleGradient_, scale_gradient_>(m);
  impl<LossNormalizer, loss_normalizer>(m);
  impl<CheckTargets, check_targets>(m);
}

}  // namespace masked_loss::cuda
