#include <ATen/Dispatch.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
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
constexpr std::int64_t kFewRows = 32;   // which threads share where each is long
constexpr std::int64_t kPart = 8;       // blocks of one
constexpr std::int64_t kChunk = 16384;  // losses that are summed together; fixed, as the sum must not depend on threads

template <class Body>
void dispatch(at::ScalarType type, const Body& body) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, type, "cross_entropy", [&] { body(scalar_t{}); });
}

const CrossEntropyKernels& kernels() {
  static const auto& picked = MASKED_LOSS_PICK(cross_entropy_kernels);
  return picked;
}

template <class T, class A>
void run_rows(const CrossEntropyWork<T, A>& work, CrossEntropyMode mode) {
  const auto& kernel = kernels().of<T>();
  const auto rows = work.rows.count, at_once = kernel.rows_at_once(work);
  const auto elements_at_once = std::max<std::int64_t>(1, at_once * work.classes);
  const auto chunk = at_once * std::max<std::int64_t>(1, kElementsPerTask / elements_at_once);
  run_tasks(divide_up(rows, chunk), [&] {
    c10::SmallBuffer<A, 1024> scratch(kernel.scratch_size(work, mode));
    return [&work, mode, chunk, rows, &kernel, scratch = std::move(scratch)](std::int64_t task) mutable {
      kernel.run(work, mode, task * chunk, std::min(rows, (task + 1) * chunk), scratch.data());
    };
  });
}

// Few long rows: threads share each of them.
template <class T, class A>
void run_blocks(const CrossEntropyWork<T, A>& work, CrossEntropyMode mode) {
  const auto& kernel = kernels().of<T>();
  const auto rows = work.rows.count, blocks = divide_up(work.classes, kBlock), parts = divide_up(blocks, kPart);
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
      kernel.visit(work, mode, row, begin, end, visited.data() + row * blocks);
    });
  }
  for (std::int64_t row = 0; row < rows; ++row) {
    ends[row] = kernel.conclude(work, mode, row, visited.data() + row * blocks);
  }
  if (mode == CrossEntropyMode::Forward) return;
  for_parts([&](auto row, auto begin, auto end) {
    kernel.finish(work, mode, row, begin, end, visited.data() + row * blocks, ends[row]);
  });
}

// The sizes alone decide, so that the number of threads changes no bit.
template <class T, class A>
void run(const CrossEntropyWork<T, A>& work, CrossEntropyMode mode) {
  const bool few = work.rows.count <= kFewRows && work.classes >= 2 * kPart * kBlock;
  if (few && kernels().of<T>().in_blocks(work)) return run_blocks(work, mode);
  run_rows(work, mode);
}

template <class A>
A sum(const A* x, std::int64_t n) {
  c10::SmallVector<double, 8> sums(divide_up(n, kChunk));
  run_tasks(divide_up(n, kChunk), [&] {
    return [&](std::int64_t c) {
      double lanes[8] = {};
      const auto end = std::min(n, (c + 1) * kChunk);
      for (auto i = c * kChunk; i < end; ++i) lanes[i % 8] += double(x[i]);
      sums[c] = ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
    };
  });
  double total = 0;
  for (const double s : sums) total += s;
  return static_cast<A>(total);
}

// -> loss [N, ...] or 0-d, in the accumulation dtype
Tensor forward(const Tensor& input, const Tensor& target, const OptionalTensor& mask,
               const CrossEntropyOptions& options, CrossEntropyMode mode, Tensor* softmax, Tensor* gradient) {
  const auto arguments = check_cross_entropy(input, target, mask, options);
  const auto accumulation = input.options().dtype(accumulation_type(input.scalar_type()));
  const bool reduced = options.reduction != Reduction::None;
  Tensor loss = at::empty(reduced ? at::IntArrayRef() : target.sizes(), accumulation);
  if (softmax != nullptr) *softmax = at::empty(softmax_sizes(target), accumulation);
  dispatch(input.scalar_type(), [&](auto t) {
    using A = Accumulation<decltype(t)>;
    const RowView<A> view(arguments);
    const auto plan = make_row_plan(view, options.reduction, options.normalizer);
    if (gradient != nullptr) *gradient = empty_output(input);
    auto work = make_cross_entropy_work<decltype(t)>(view, input, options, gradient);
    c10::SmallBuffer<A, 64> losses(reduced ? work.rows.count : 0);
    work.index = plan.index.data();
    work.coefficient = plan.coefficient.data();
    work.loss = reduced ? losses.data() : loss.mutable_data_ptr<A>();
    work.softmax = softmax_of<A>(softmax == nullptr ? Tensor() : *softmax);
    run(work, mode);
    if (reduced) *loss.mutable_data_ptr<A>() = sum(losses.data(), work.rows.count);
  });
  return loss;
}

Tensor cross_entropy_backward(const Tensor& grad, const Tensor& input, const Tensor& target, const Tensor& softmax,
                              const OptionalTensor& mask, const CrossEntropyOptions& options) {
  const auto arguments = check_cross_entropy_backward(grad, input, target, softmax, mask, options);
  const auto accumulation = accumulation_type(input.scalar_type());
  const auto upstream = grad.to(accumulation).expand(target.sizes()), states = softmax.to(accumulation).contiguous();
  auto gradient = empty_output(input);
  dispatch(input.scalar_type(), [&](auto t) {
    using A = Accumulation<decltype(t)>;
    const RowView<A> view(arguments);
    auto plan = make_row_plan(view, options.reduction, options.normalizer);
    const auto rows = make_rows<1>(target.sizes(), {row_strides(upstream)});
    const A* data = upstream.const_data_ptr<A>();
    at::parallel_for(0, rows.count, kChunk, [&](std::int64_t begin, std::int64_t end) {
      for (auto r = begin; r < end; ++r) plan.coefficient[r] *= data[rows.offsets(r)[0]];
    });
    auto work = make_cross_entropy_work<decltype(t)>(view, input, options, &gradient);
    work.index = plan.index.data();
    work.coefficient = plan.coefficient.data();
    work.softmax = softmax_of<A>(states);
    run(work, CrossEntropyMode::Backward);
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
