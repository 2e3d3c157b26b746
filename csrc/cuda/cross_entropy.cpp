#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "common/cross_entropy_operands.h"
#include "cuda/cross_entropy_kernel.h"
#include "cuda/dispatch.h"
#include "cuda/row_plan.h"
#include "cuda/stream.h"

namespace masked_loss::cuda {
namespace {

// A call's kernels, once its tensors are there.
template <class T>
class Run {
 public:
  using A = Accumulation<T>;

  Run(const RowView<A>& view, const Tensor& input, const CrossEntropyOptions& options, CrossEntropyMode mode,
      const Tensor* gradient, const Device& device)
      : mode_(mode), device_(device) {
    call_.work = make_cross_entropy_work<T>(view, input, options, gradient);
    const auto& work = call_.work;
    const bool contiguous = work.logits_stride == 1 && work.gradient_stride == 1 && work.class_mask_stride == 1 &&
                            work.probabilities_stride == 1;
    regime_ = pick_cross_entropy_regime(mode, work.rows.count, work.classes, sizeof(T), contiguous, is_plain(work),
                                        device.multiprocessors);
  }

  bool lists_rows() const { return regime_.kind != CrossEntropyRegime::Lanes; }

  // Rows that are split need the softmax for the gradient's pass.
  bool keeps_softmax() const {
    return regime_.kind == CrossEntropyRegime::Slices && mode_ == CrossEntropyMode::ForwardGrad;
  }

  void operator()(const RowPlan<A>& plan, const Tensor& loss, const Tensor& softmax) {
    auto& work = call_.work;
    work.index = plan.index.template const_data_ptr<std::int64_t>();
    work.coefficient = plan.coefficient.template const_data_ptr<A>();
    if (loss.defined()) work.loss = loss.template mutable_data_ptr<A>();
    work.softmax = softmax_of<A>(softmax);
    Tensor parts;
    if (lists_rows()) {
      call_.order = plan.order.template const_data_ptr<std::int64_t>();
      call_.kept = plan.kept.template const_data_ptr<std::int64_t>();
    }
    if (regime_.kind == CrossEntropyRegime::Slices && mode_ != CrossEntropyMode::Backward) {
      const auto bytes = work.rows.count * regime_.slices * static_cast<std::int64_t>(sizeof(RowPart<A>));
      parts = at::empty({bytes}, plan.index.options().dtype(at::kByte));
      call_.parts = reinterpret_cast<RowPart<A>*>(parts.data_ptr<std::uint8_t>());
    }
    run_cross_entropy(call_, mode_, regime_, device_.multiprocessors, device_.stream);
  }

 private:
  const CrossEntropyMode mode_;
  const Device device_;
  CrossEntropyCall<T, A> call_{};
  CrossEntropyRegime regime_;
};

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
    Run<decltype(t)> run(view, input, options, mode, gradient, device);
    if (run.keeps_softmax()) states = at::empty(softmax_sizes(arguments), accumulation);
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
    Run<decltype(t)> run(view, input, options, CrossEntropyMode::Backward, &gradient, device);
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
