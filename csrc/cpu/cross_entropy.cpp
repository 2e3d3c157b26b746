#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <c10/util/SmallBuffer.h>
#include <torch/library.h>

#include <vector>

#include "common/cross_entropy_work.h"
#include "common/huge_pages.h"
#include "cpu/cross_entropy_kernel.h"
#include "cpu/parallel.h"
#include "cpu/row_plan.h"

namespace masked_loss::cpu {
namespace {

constexpr std::int64_t kElementsPerTask = 1 << 16;
constexpr std::int64_t kFewRows = 32;     // which threads share where each is long
constexpr std::int64_t kPart = 8;         // blocks of one
constexpr std::int64_t kFewClasses = 16;  // fewer count as so many, for what each row costs besides

template <class Body>
void dispatch(at::ScalarType type, const Body& body) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, type, "cross_entropy", [&] { body(scalar_t{}); });
}

const CrossEntropyKernels& kernels() {
  static const auto& picked = MASKED_LOSS_PICK(cross_entropy_kernels);
  return picked;
}

template <class A>
double sum(const A* x, std::int64_t n) {
  double lanes[8] = {};
  std::int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    for (int k = 0; k < 8; ++k) lanes[k] += double(x[i + k]);
  }
  for (; i < n; ++i) lanes[i % 8] += double(x[i]);
  return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

// What is known of some rows, beginning with their first, where a kernel looks for it.
template <class T, class A>
class PlannedRows {
 public:
  PlannedRows(const CrossEntropyWork<T, A>& work, std::int64_t most)
      : work_(work), index_(most), coefficient_(most), losses_(work.loss == nullptr ? most : 0) {}

  // `plan` is a RowPlan, or like one.
  template <class Plan>
  const CrossEntropyWork<T, A>& operator()(const Plan& plan, std::int64_t begin, std::int64_t end) {
    plan(begin, end, index_.data(), coefficient_.data());
    planned_ = work_;
    planned_.index = index_.data();
    planned_.coefficient = coefficient_.data();
    planned_.loss = work_.loss == nullptr ? losses_.data() : work_.loss + begin;
    return planned_;
  }

 private:
  const CrossEntropyWork<T, A>& work_;
  CrossEntropyWork<T, A> planned_;
  c10::SmallBuffer<std::int64_t, 64> index_;
  c10::SmallBuffer<A, 64> coefficient_, losses_;
};

// -> the sum of the losses, unless `work` says where they go
template <class T, class A, class Plan>
double run_rows(const CrossEntropyWork<T, A>& work, CrossEntropyMode mode, const Plan& plan) {
  const auto& kernel = kernels().of<T>();
  const auto rows = work.rows.count, at_once = kernel.rows_at_once(work);
  const auto elements_at_once = at_once * std::max(work.classes, kFewClasses);
  const auto chunk = at_once * std::max<std::int64_t>(1, kElementsPerTask / elements_at_once);
  const bool sums_losses = work.loss == nullptr && mode != CrossEntropyMode::Backward;
  c10::SmallVector<double, 8> sums(divide_up(rows, chunk));
  run_tasks(divide_up(rows, chunk), [&] {
    c10::SmallBuffer<A, 1024> scratch(kernel.scratch_size(work, mode));
    PlannedRows<T, A> planned_rows(work, std::min(rows, chunk));
    return [&, scratch = std::move(scratch), planned_rows = std::move(planned_rows)](std::int64_t task) mutable {
      const auto begin = task * chunk, end = std::min(rows, begin + chunk);
      const auto& planned = planned_rows(plan, begin, end);
      kernel.run(planned, mode, begin, end, scratch.data());
      if (sums_losses) sums[task] = sum(planned.loss, end - begin);
    };
  });
  return sum(sums.data(), sums.size());
}

// Few long rows: threads share each of them.
template <class T, class A, class Plan>
double run_blocks(const CrossEntropyWork<T, A>& work, CrossEntropyMode mode, const Plan& plan) {
  const auto& kernel = kernels().of<T>();
  const auto rows = work.rows.count, blocks = divide_up(work.classes, kBlock), parts = divide_up(blocks, kPart);
  PlannedRows<T, A> planned_rows(work, rows);
  const auto& planned = planned_rows(plan, 0, rows);
  std::vector<CrossEntropyBlock<A>> visited(rows * blocks);
  std::vector<CrossEntropyEnd<A>> ends(rows);
  const auto for_parts = [&](const auto& visit) {
    run_tasks(rows * parts, [&] {
      return [&](std::int64_t task) {
        const auto row = task / parts, part = task % parts;
        visit(row, part * kPart, std::min(blocks, (part + 1) * kPart));
      };
    });
  };
  if (mode != CrossEntropyMode::Backward) {
    for_parts([&](auto row, auto begin, auto end) {
      kernel.visit(planned, mode, row, begin, end, visited.data() + row * blocks);
    });
  }
  for (std::int64_t row = 0; row < rows; ++row) {
    ends[row] = kernel.conclude(planned, mode, row, visited.data() + row * blocks);
  }
  if (mode != CrossEntropyMode::Forward) {
    for_parts([&](auto row, auto begin, auto end) {
      kernel.finish(planned, mode, row, begin, end, visited.data() + row * blocks, ends[row]);
    });
  }
  return mode == CrossEntropyMode::Backward ? 0 : sum(planned.loss, rows);
}

// The sizes alone decide, so that the number of threads changes no bit.
template <class T, class A, class Plan>
double run(const CrossEntropyWork<T, A>& work, CrossEntropyMode mode, const Plan& plan) {
  const bool few = work.rows.count <= kFewRows && work.classes >= 2 * kPart * kBlock;
  return few && kernels().of<T>().in_blocks(work) ? run_blocks(work, mode, plan) : run_rows(work, mode, plan);
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
    const double total = run(work, mode, plan);
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
    run(work, CrossEntropyMode::Backward, [&](auto begin, auto end, std::int64_t* index, A* coefficient) {
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
    const auto& kernel = kernels().template of<T>();
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
  m.impl("_cross_entropy_backward", CrossEntropyBackward::kernel<cross_entropy_backward>);
  m.impl("_scale_gradient_", scale_gradient_);
  m.impl("loss_normalizer", LossNormalizer::kernel<loss_normalizer>);
  m.impl("check_targets", check_targets);
}

}  // namespace masked_loss::cpu
