#pragma once

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>

#include "softmax.h"
#include "softmax_ops.h"
#include "strides.h"

namespace masked_loss {

// The tensors of a pass as the kernels of any device see them; what a pass does not have is left undefined.
struct SoftmaxOperands {
  Tensor input = {}, grad = {}, result = {};
  Tensor reduced = {}, row_grad = {};  // contiguous; the input's sizes, but 1 for `dim`
  OptionalTensor mask = {};
  std::int64_t dim = 0;
  bool causal = false;

  // Brings all of them to one rank of at least 1, and the mask to bytes and the input's sizes, by its strides.
  void resolve() {
    if (mask) mask = byte_mask(*mask).expand(input.sizes());
    if (input.dim() > 0) return;
    for (auto* tensor : {&input, &grad, &result}) {
      if (tensor->defined()) *tensor = tensor->unsqueeze(0);
    }
    if (mask) mask = mask->unsqueeze(0);
  }

  // T is the device's type for the input's dtype, A the one of what is reduced.
  template <class T, class A>
  SoftmaxWork<T, A> work() const {
    SoftmaxWork<T, A> work{};
    std::array<at::DimVector, 4> strides;
    const auto line = [&](const Tensor& tensor, int operand, std::int64_t& stride) -> const void* {
      stride = 1;
      if (!tensor.defined()) return nullptr;
      strides[operand] = row_strides(tensor, dim);
      stride = class_stride(tensor, dim);
      return tensor.const_data_ptr();
    };
    work.classes = input.size(dim);
    work.queries = causal ? input.size(-2) : 0;
    if (work.queries > 0) work.by_queries = Quotient(work.queries);
    work.input = static_cast<const T*>(line(input, 0, work.input_stride));
    work.grad = static_cast<const T*>(line(grad, 3, work.grad_stride));
    line(result, 1, work.result_stride);
    if (result.defined()) work.result = static_cast<T*>(result.mutable_data_ptr());
    work.mask = static_cast<const std::uint8_t*>(line(mask.value_or(Tensor()), 2, work.mask_stride));
    at::DimVector sizes(input.sizes());
    sizes.erase(sizes.begin() + dim);
    work.rows = make_rows<4>(sizes, strides);
    if (reduced.defined()) work.reduced = static_cast<A*>(reduced.mutable_data_ptr());
    if (row_grad.defined()) work.row_grad = static_cast<const A*>(row_grad.const_data_ptr());
    return work;
  }
};

// The inner ops of a device. Backend::output(like) gives memory for a result, and Backend::run(pass, operands) does a
// pass over resolved operands.
template <class Backend>
struct SoftmaxInnerOps {
  static void run(SoftmaxPass pass, SoftmaxOperands operands) {
    operands.resolve();
    Backend::run(pass, operands);
  }

  static Tensor softmax_forward(const Tensor& input, const OptionalTensor& mask, const SoftmaxSlices& slices) {
    const auto dim = check_softmax("_softmax_forward", input, mask, slices.dim, slices.causal)[0];
    const bool log = slices.kind == SoftmaxKind::LogSoftmax;
    check_mask_values(log ? "log_softmax" : "softmax", "mask", mask);
    auto result = Backend::output(input);
    run(log ? SoftmaxPass::LogSoftmax : SoftmaxPass::Softmax,
        {.input = input, .result = result, .mask = mask, .dim = dim, .causal = slices.causal});
    return result;
  }

  static Tensor softmax_backward(const Tensor& grad, const Tensor& result, const OptionalTensor& mask,
                                 const SoftmaxSlices& slices) {
    constexpr auto op = "_softmax_backward";
    const auto dim = check_softmax(op, result, mask, slices.dim, slices.causal)[0];
    check_softmax_grad(op, grad, result);
    auto gradient = Backend::output(result);
    const bool log = slices.kind == SoftmaxKind::LogSoftmax;
    run(log ? SoftmaxPass::LogSoftmaxBackward : SoftmaxPass::SoftmaxBackward,
        {.input = result, .grad = grad, .result = gradient, .mask = mask, .dim = dim, .causal = slices.causal});
    return gradient;
  }

  static Tensor logsumexp_forward(const Tensor& input, const OptionalTensor& mask, const LogsumexpSlices& slices) {
    auto dims = check_softmax("_logsumexp_forward", input, mask, slices.dim, slices.causal);
    check_mask_values("logsumexp", "mask", mask);
    std::sort(dims.begin(), dims.end());
    // The last dimension first, where elements are most likely to be contiguous; then what that has given.
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

  static Tensor logsumexp_backward(const Tensor& grad, const Tensor& result, const Tensor& input,
                                   const OptionalTensor& mask, const LogsumexpSlices& slices) {
    constexpr auto op = "_logsumexp_backward";
    const auto dims = check_softmax(op, input, mask, slices.dim, slices.causal);
    check_softmax_grad(op, grad, result);
    const auto dim = *std::max_element(dims.begin(), dims.end());
    at::DimVector rows(input.sizes());
    if (!rows.empty()) rows[dim] = 1;
    const auto of_rows = [&](const Tensor& tensor) {
      return tensor.to(result.scalar_type()).expand(rows).contiguous();
    };
    auto gradient = Backend::output(input);
    run(SoftmaxPass::LogsumexpBackward, {.input = input,
                                         .result = gradient,
                                         .reduced = of_rows(result),
                                         .row_grad = of_rows(grad),
                                         .mask = mask,
                                         .dim = dim,
                                         .causal = slices.causal});
    return gradient;
  }

  static void implement(torch::Library& m) {
    impl<SoftmaxForward, softmax_forward>(m);
    impl<SoftmaxBackward, softmax_backward>(m);
    impl<LogsumexpForward, logsumexp_forward>(m);
    impl<LogsumexpBackward, logsumexp_backward>(m);
  }
};

}  // namespace masked_loss
