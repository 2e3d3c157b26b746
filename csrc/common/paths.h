#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <optional>
#include <vector>

namespace masked_loss {

// A custom autograd function cannot be differentiated by functorch: under it, ops are composites.
inline bool functorch_active() {
  return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerBackMode);
}

// A tensor with a batch dimension of vmap's, as is_grads_batched makes them (with the older key).
inline bool is_batched(const at::Tensor& tensor) {
  return tensor.key_set().has_any(c10::DispatchKeySet{c10::DispatchKey::Batched, c10::DispatchKey::FuncTorchBatched});
}

inline bool has_tangent(const at::Tensor& tensor) { return tensor._fw_grad(/*level=*/0).defined(); }

inline bool has_tangent(const std::optional<at::Tensor>& tensor) { return tensor && has_tangent(*tensor); }

// Whether a backward pass is itself differentiated: backward, as its grad mode tells, or forward, where a tangent may
// come with what arrives from upstream alone. Then it is the composite's, whose ops have derivatives.
inline bool differentiated_again(const std::vector<at::Tensor>& grads) {
  if (at::GradMode::is_enabled()) return true;
  return std::any_of(grads.begin(), grads.end(),
                     [](const at::Tensor& grad) { return grad.defined() && has_tangent(grad); });
}

// A saved tensor that may not have been there.
inline std::optional<at::Tensor> optional(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional<at::Tensor>(tensor) : std::nullopt;
}

// Whether a backward pass for it has to be recorded.
inline bool wants_grad(const at::Tensor& tensor) { return tensor.requires_grad() && at::GradMode::is_enabled(); }

inline bool wants_grad(const std::optional<at::Tensor>& tensor) { return tensor && wants_grad(*tensor); }

// Whether an op has kernels of ours for the device of a tensor; others (MPS, XPU, ...) run the composite.
inline bool has_kernel(const c10::OperatorHandle& op, const at::Tensor& tensor) {
  const auto key = c10::computeDispatchKey(std::nullopt, std::nullopt, tensor.device());
  return op.hasKernelForDispatchKey(key);
}

}  // namespace masked_loss
