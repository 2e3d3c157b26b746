#include "composite/reduce.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/alias.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>

#include "common/paths.h"

namespace masked_loss {
namespace {

Tensor zero(const Tensor& like) { return at::zeros_like(like); }

// Sums over all but dim 0: one number a sequence, broadcastable with the losses.
Tensor sequence_sum(const Tensor& losses) {
  if (losses.dim() <= 1) return losses;
  at::DimVector dims;
  for (std::int64_t d = 1; d < losses.dim(); ++d) dims.push_back(d);
  return losses.sum(dims, /*keepdim=*/true);
}

// double where the device has it.
at::ScalarType widest(const at::Device& device) {
  if (device.is_cpu() || device.is_cuda()) return at::kDouble;
  const c10::impl::VirtualGuardImpl guard(device.type());
  return guard.getDeviceCapability(device).capability_data.supported_scalar_types.has_Double ? at::kDouble : at::kFloat;
}

}  // namespace

std::optional<double> readable(const Tensor& number) {
  constexpr c10::DispatchKeySet of_compilers{c10::DispatchKey::Python, c10::DispatchKey::Functionalize};
  if (!number.is_cpu() || is_batched(number) || number.key_set().has_any(of_compilers)) return std::nullopt;
  if (c10::impl::TorchDispatchModeTLS::any_modes_set()) return std::nullopt;
  if (!functorch_active()) return number.item<double>();
  try {
    return number.item<double>();
  } catch (const c10::Error&) {  // what a transform wraps may be a batch
    return std::nullopt;
  }
}

CompositeCoefficient composite_coefficient(const char* op, const Tensor& keep, const Tensor& weight,
                                           const Tensor& counted, Reduction reduction,
                                           const OptionalTensor& normalizer) {
  if (reduction == Reduction::None || reduction == Reduction::Sum) return {keep, weight};
  // As the kernels: a sum of signed weights is 0 or not by its last digits.
  const auto wide = widest(weight.device());
  Tensor divisor;
  if (normalizer) {
    divisor = normalizer->to(wide);
    if (const auto value = readable(divisor)) check_normalizer_value(op, *value);
    divisor = at::where(divisor.lt(0), at::full_like(divisor, std::nan("")), divisor);
  } else if (reduction == Reduction::Mean) {
    divisor = counted.sum(wide);
  } else {
    divisor = sequence_sum(keep.to(wide)).ne(0).to(wide).sum();
  }
  if (reduction == Reduction::SequenceMean) divisor = sequence_sum(counted.to(wide)) * divisor;
  // A divisor of 0 gives 0: what it is for is dropped.
  const auto kept = keep.logical_and(divisor.ne(0));
  divisor = at::where(divisor.eq(0), at::ones_like(divisor), divisor);
  return {kept, at::where(kept, (weight / divisor).to(weight.scalar_type()), zero(weight))};
}

Tensor composite_reduce(const Tensor& losses, const Tensor& keep, const Tensor& coefficient, Reduction reduction) {
  const auto kept = at::where(keep, losses, zero(losses));
  const auto weighted = at::where(keep, kept * coefficient, zero(kept));
  return reduction == Reduction::None ? weighted : weighted.sum();
}

std::vector<Tensor> composite_gradients(const std::vector<Tensor>& tensors, const Tensor& grad,
                                        const std::function<Tensor(const std::vector<Tensor>&)>& composite,
                                        Tensor* value) {
  return composite_gradients(tensors, std::vector<Tensor>{grad}, [&](const std::vector<Tensor>& leaves) {
    auto result = composite(leaves);
    if (value != nullptr) *value = result.detach();
    return std::vector<Tensor>{result};
  });
}

std::vector<Tensor> composite_gradients(
    const std::vector<Tensor>& tensors, const std::vector<Tensor>& grads,
    const std::function<std::vector<Tensor>(const std::vector<Tensor>&)>& composite) {
  const bool create_graph = at::GradMode::is_enabled();
  const at::AutoGradMode grad_mode(true);
  // As a kernel of an inner op this runs below autograd.
  const auto keys = c10::impl::tls_local_dispatch_key_set();
  const c10::impl::ForceDispatchKeyGuard with_autograd(
      keys.included_, keys.excluded_ - c10::autograd_dispatch_keyset_with_ADInplaceOrView);
  std::vector<Tensor> leaves;
  for (const auto& tensor : tensors) {
    // Aliases: the hooks of the user's tensors are for the gradients that the engine brings to them.
    leaves.push_back(tensor.requires_grad() ? at::alias(tensor) : tensor.detach().requires_grad_());
  }
  const auto results = composite(leaves);
  std::vector<Tensor> upstream;
  for (std::size_t i = 0; i < results.size(); ++i) {
    upstream.push_back(grads[i].defined() ? grads[i].to(results[i].scalar_type()) : at::ones_like(results[i]));
  }
  return torch::autograd::grad(results, leaves, upstream, std::nullopt, create_graph);
}

}  // namespace masked_loss
