#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <c10/util/SmallBuffer.h>
#include <torch/library.h>

#include "common/huge_pages.h"
#include "common/softmax_operands.h"
#include "cpu/parallel.h"
#include "cpu/softmax_kernel.h"

namespace masked_loss::cpu {
namespace {

constexpr std::int64_t kElementsPerTask = 1 << 16;

template <class T, class A>
void run(const SoftmaxWork<T, A>& work, SoftmaxPass pass) {
  static const auto& kernels = MASKED_LOSS_PICK(softmax_kernels);
  const auto& kernel = kernels.of<T>();
  const auto rows = work.rows.count, at_once = kernel.rows_at_once(work, pass);
  const auto elements_at_once = std::max<std::int64_t>(1, at_once * work.classes);
  const auto chunk = at_once * std::max<std::int64_t>(1, kElementsPerTask / elements_at_once);
  run_tasks(divide_up(rows, chunk), [&] {
    constexpr std::int64_t line = 64;
    c10::SmallBuffer<char, 4096> memory(kernel.scratch_size(work, pass) + line);
    return [&work, pass, chunk, rows, &kernel, memory = std::move(memory)](std::int64_t task) mutable {
      auto* scratch = reinterpret_cast<char*>(divide_up(reinterpret_cast<std::intptr_t>(memory.data()), line) * line);
      kernel.run(work, pass, task * chunk, std::min(rows, (task + 1) * chunk), scratch);
    };
  });
}

void run(SoftmaxPass pass, SoftmaxOperands operands) {
  operands.resolve();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, operands.input.scalar_type(), "softmax", [&] {
    using A = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
    run(operands.work<scalar_t, A>(), pass);
  });
}

Tensor softmax_forward(const Tensor& input, const OptionalTensor& mask, const SoftmaxSlices& slices) {
  const auto dim = check_softmax("_softmax_forward", input, mask, slices.dim, slices.causal)[0];
  auto result = empty_output(input);
  const bool log = slices.kind == SoftmaxKind::LogSoftmax;
  run(log ? SoftmaxPass::LogSoftmax : SoftmaxPass::Softmax,
      {.input = input, .result = result, .mask = mask, .dim = dim, .causal = slices.causal});
  return result;
}

Tensor softmax_backward(const Tensor& grad, const Tensor& result, const OptionalTensor& mask,
                        const SoftmaxSlices& slices) {
  constexpr auto op = "_softmax_backward";
  const auto dim = check_softmax(op, result, mask, slices.dim, slices.causal)[0];
  check_softmax_grad(op, grad, result);
  auto gradient = empty_output(result);
  const bool log = slices.kind == SoftmaxKind::LogSoftmax;
  run(log ? SoftmaxPass::LogSoftmaxBackward : SoftmaxPass::SoftmaxBackward,
      {.input = result, .grad = grad, .result = gradient, .mask = mask, .dim = dim, .causal = slices.causal});
  return gradient;
}

Tensor logsumexp_forward(const Tensor& input, const OptionalTensor& mask, const LogsumexpSlices& slices) {
  auto dims = check_softmax("_logsumexp_forward", input, mask, slices.dim, slices.causal);
  std::sort(dims.begin(), dims.end());
  // The last dimension first, where elements are most likely to lie beside one another; then what that has given.
  Tensor result = input;
  for (auto d = dims.rbegin(); d != dims.rend(); ++d) {
    at::DimVector sizes(result.sizes());
    if (!sizes.empty()) sizes[*d] = 1;
    auto reduced = at::empty(sizes, input.options().dtype(accumulation_type(input.scalar_type())));
    const bool first = d == dims.rbegin();
    run(SoftmaxPass::Logsumexp, {.input = result,
                                 .reduced = reduced,
                                 .mask = first ? mask : std::nullopt,
                                 .dim = *d,
                                 .causal = first && slices.causal});
    result = reduced;
  }
  return result;
}

Tensor logsumexp_backward(const Tensor& grad, const Tensor& result, const Tensor& input, const OptionalTensor& mask,
                          const LogsumexpSlices& slices) {
  constexpr auto op = "_logsumexp_backward";
  const auto dims = check_softmax(op, input, mask, slices.dim, slices.causal);
  check_softmax_grad(op, grad, result);
  const auto dim = *std::max_element(dims.begin(), dims.end());
  at::DimVector rows(input.sizes());
  if (!rows.empty()) rows[dim] = 1;
  const auto of_rows = [&](const Tensor& tensor) { return tensor.to(result.scalar_type()).expand(rows).contiguous(); };
  auto gradient = empty_output(input);
  run(SoftmaxPass::LogsumexpBackward, {.input = input,
                                       .result = gradient,
                                       .reduced = of_rows(result),
                                       .row_grad = of_rows(grad),
                                       .mask = mask,
                                       .dim = dim,
                                       .causal = slices.causal});
  return gradient;
}

}  // namespace

TORCH_LIBRARY_IMPL(masked_loss, CPU, m) {
  m.impl("_softmax_forward", SoftmaxForward::kernel<softmax_forward>);
  m.impl("_softmax_backward", SoftmaxBackward::kernel<softmax_backward>);
  m.impl("_logsumexp_forward", LogsumexpForward::kernel<logsumexp_forward>);
  m.impl("_logsumexp_backward", LogsumexpBackward::kernel<logsumexp_backward>);
}

}  // namespace masked_loss::cpu
