#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/graph_task.h>

#include "common/paths.h"
#include "common/ops.h"
#include "composite/cross_entropy.h"

namespace masked_loss {

// Below autograd an op must not return its input, which Tensor::to does where there is nothing to convert.
inline Tensor converted(const Tensor& loss, at::ScalarType type) {
  return loss.scalar_type() == type ? loss : loss.to(type);
}

// A gradient that the forward pass has made and saved, times the upstream one. `shared`: hooks had it in their hands,
// and may have given the same tensor to others.
inline Tensor scaled_gradient(Tensor gradient, const Tensor& grad, bool shared) {
  if (is_batched(grad)) return composite_scale_gradient(gradient, grad);
  // A graph that is kept may be run again: what it has saved must stay.
  if (shared || torch::autograd::get_current_graph_task_keep_graph()) gradient = gradient.clone();
  static const auto op = find_op<void(Tensor&, const Tensor&)>("masked_loss::_scale_gradient_");
  const at::AutoDispatchBelowADInplaceOrView below;
  op.call(gradient, grad);
  return gradient;
}

}  // namespace masked_loss
