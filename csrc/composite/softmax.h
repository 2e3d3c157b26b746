#pragma once

#include "common/softmax_ops.h"

namespace masked_loss {

// What the inner ops of softmax do in ATen ops: for functorch, forward-mode AD, double backward and devices without
// kernels of ours. The backward ones are made of the results alone, so that no input has to be kept for them.
Tensor composite_softmax(const Tensor& input, const OptionalTensor& mask, const SoftmaxSlices& slices);
Tensor composite_softmax_backward(const Tensor& grad, const Tensor& result, const OptionalTensor& mask,
                                  const SoftmaxSlices& slices);
Tensor composite_logsumexp(const Tensor& input, const OptionalTensor& mask, const LogsumexpSlices& slices);
Tensor composite_logsumexp_backward(const Tensor& grad, const Tensor& result, const Tensor& input,
                                    const OptionalTensor& mask, const LogsumexpSlices& slices);

// What the public op makes of the inner one's result.
Tensor reduced_logsumexp(const Tensor& result, const Tensor& input, const LogsumexpOptions& options);

}  // namespace masked_loss
