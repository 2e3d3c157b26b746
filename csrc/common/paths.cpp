#include "paths.h"

#include <ATen/functorch/BatchedTensorImpl.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>

namespace masked_loss {

bool functorch_active() {
  return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerBackMode);
}

bool is_batched(const at::Tensor& tensor) {
  return tensor.key_set().has_any(c10::DispatchKeySet{c10::DispatchKey::Batched, c10::DispatchKey::FuncTorchBatched});
}

bool is_differentiated(const at::Tensor& tensor) {
  // A batch of vmap's hides what it wraps.
  if (const auto* batched = at::functorch::maybeGetBatchedImpl(tensor)) return is_differentiated(batched->value());
  return wants_grad(tensor) || has_tangent(tensor);
}

bool differentiated_again(const std::vector<at::Tensor>& grads) {
  if (at::GradMode::is_enabled()) return true;
  return std::any_of(grads.begin(), grads.end(),
                     [](const at::Tensor& grad) { return grad.defined() && has_tangent(grad); });
}

}  // namespace masked_loss
