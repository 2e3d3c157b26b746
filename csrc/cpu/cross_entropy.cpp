#include "cpu/cross_entropy.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cpu/huge_pages.h"
#include "cpu/row_plan.h"

namespace masked_loss::cpu {
namespace {

constexpr std::int64_t kElementsPerTask = 1 << 16;

template <class Body>
void dispatch(at::ScalarType type, const Body& body) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, type, "cross_entropy", [&] { body(scalar_t{}); });
}

// -> loss [N, ...] or 0-d, in the accumulation dtype
Tensor forward(const Tensor& input, const Tensor& target, const OptionalTensor& mask,
               const CrossEntropyOptions& options, CrossEntropyMode mode, Tensor* softmax, Tensor* gradient) {
  const auto arguments = check_cross_entropy_operands(input, target, mask, options);
  const auto accumulation = input.options().dtype(accumulation_type(input.scalar_type()));
  const bool reduced = options.reduction != Reduction::None;
  Tensor loss = at::empty(reduced ? at::DimVector() : row_sizes(arguments), accumulation);
  if (softmax != nullptr) *softmax = at::empty(softmax_sizes(arguments), accumulation);
  dispatch(input.scalar_type(), [&](auto t) {
    using A = Accumulation<decltype(t)>;
    const RowView<A> view(arguments);
    const RowPlan<A> plan(view, options.reduction, options.normalizer);
    if (gradient != nullptr) *gradient = empty_output(input);
    auto work = make_cross_entropy_work<decltype(t)>(view, input, options, gradient);
    work.loss = reduced ? nullptr : loss.mutable_data_ptr<A>();
    work.softmax = softmax_of<A>(softmax == nullptr ? Tensor() : *softmax);
    const double total = run_cross_entropy(work, mode, plan);
    if (reduced) *loss.mutable_data_ptr<A>() = static_cast<A>(total);
  });
  return loss;
}

Tensor cross_entropy_backward(const Tensor& grad, const Tensor& input, const Tensor& target, const Tensor& softmax,
                              const OptionalTensor& mask, const CrossEntropyOptions& options) {
  const auto arguments = check_cross_entropy_backward(grad, input, target, softmax, mask, options);
  const auto accumulation = accumulation_type(input.scalar_type());
  const auto upstream = grad.to(accumulation).expand(row_sizes(arguments));
  const auto states = softmax.to(accumulation).contiguous();
  auto gradient = empty_output(input);
  dispatch(input.scalar_type(), [&](auto t) {
    using A = Accumulation<decltype(t)>;
    const RowView<A> view(arguments);
    const RowPlan<A> plan(view, options.reduction, options.normalizer);
    const auto rows = make_rows<1>(view.sizes, {row_strides(upstream)});
    const A* data = upstream.const_data_ptr<A>();
    auto work = make_cross_entropy_work<decltype(t)>(view, input, options, &gradient);
    work.softmax = softmax_of<A>(states);
    run_cross_entropy(work, CrossEntropyMode::Backward, [&](auto begin, auto end, std::int64_t* index, A* coefficient) {
      plan(begin, end, index, coefficient);
      for (auto r = begin; r < end; ++r) coefficient[r - begin] *= data[rows.offsets(r)[0]];
    });
  });
  return gradient;
}

void scale_gradient_(Tensor& gradient, const Tensor& grad) {
  check_scale_gradient_(gradient, grad);
  const double by = grad.scalar_type() == at::kFloat ? *grad.const_data_ptr<float>() : grad.item<double>();
  if (by == 1) return;
  Tensor dense = gradient.is_non_overlapping_and_dense() ? gradient : gradient.contiguous();
  dispatch(gradient.scalar_type(), [&](auto t) {
    using T = decltype(t);
    using A = Accumulation<T>;
    T* data = dense.template mutable_data_ptr<T>();
    const auto& kernel = cross_entropy_kernels().template of<T>();
    at::parallel_for(0, dense.numel(), kElementsPerTask, [&](std::int64_t begin, std::int64_t end) {
      kernel.scale(data + begin, data + begin, end - begin, static_cast<A>(by));
    });
  });
  if (!dense.is_same(gradient)) gradient.copy_(dense);
}

Tensor loss_normalizer(const Tensor& target, const OptionalTensor& mask, const LossNormalizerOptions& options) {
  const auto arguments = check_loss_normalizer(target, mask, options);
  const auto type = loss_normalizer_type(options);
  const double total =
      type == at::kDouble ? sum_of_weights(RowView<double>(arguments)) : sum_of_weights(RowView<float>(arguments));
  auto result = at::empty({}, target.options().dtype(type));
  result.fill_(total);
  return result;
}

Tensor check_targets(const Tensor& target, c10::SymInt num_classes, const OptionalTensor& mask,
                     at::IntArrayRef ignore_index) {
  // The plan looks at every target.
  const auto arguments = check_check_targets(target, num_classes, mask, ignore_index);
  sum_of_weights(RowView<float>(arguments));
  return target.clone();
}

}  // namespace

TORCH_LIBRARY_IMPL(masked_loss, CPU, m) {
  CrossEntropyOps<forward>::implement(m);
  impl<CrossEntropyBackward, cross_entropy_backward>(m);
  impl<ScaleGradient_, scale_gradient_>(m);
  impl<LossNormalizer, loss_normalizer>(m);
  impl<CheckTargets, check_targets>(m);
}

}  // namespace masked_loss::cpu
