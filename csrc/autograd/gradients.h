#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>

#include "common/ops.h"
#include "common/paths.h"
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

// A tensor that is read only where a backward pass is differentiated, kept beside the saved variables: any backward
// pass unpacks those, all at once, and refuses the ones that were changed in place.
inline void hold(torch::autograd::AutogradContext* ctx, const Tensor& tensor) {
  ctx->saved_data["held"] = tensor;
  ctx->saved_data["version"] = static_cast<std::int64_t>(tensor._version());  // by itself, where compilers lift it
}

inline Tensor held(torch::autograd::AutogradContext* ctx, const char* op) {
  const auto tensor = ctx->saved_data["held"].toTensor();
  const auto saved = ctx->saved_data["version"].toInt(), now = static_cast<std::int64_t>(tensor._version());
  TORCH_CHECK(saved == now, op, ": expected input as it was in the forward pass, which a second derivative needs, got ",
              "one that has been modified by an inplace operation since: it is at version ", now, " instead of ",
              saved);
  return tensor;
}

// After a backward pass, as the saved variables are.
inline void release_held(torch::autograd::AutogradContext* ctx) {
  if (!torch::autograd::get_current_graph_task_keep_graph()) ctx->saved_data.erase("held");
}

}  // namespace masked_loss
