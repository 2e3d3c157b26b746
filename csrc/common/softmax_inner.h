#pragma once

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>

#include "softmax_operands.h"

namespace masked_loss {

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
    m.impl("_softmax_forward", SoftmaxForward::kernel<softmax_forward>);
    m.impl("_softmax_backward", SoftmaxBackward::kernel<softmax_backward>);
    m.impl("_logsumexp_forward", LogsumexpForward::kernel<logsumexp_forward>);
    m.impl("_logsumexp_backward", LogsumexpBackward::kernel<logsumexp_backward>);
  }
};

}  // namespace masked_loss
