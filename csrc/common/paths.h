#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>

#include <optional>
#include <tuple>
#include <vector>

namespace masked_loss {

// How a call of a public op is computed, above the dispatcher's backend keys.
enum class Path {
  Composite,  // in ATen ops, which every transform of torch's differentiates
  Recorded,   // by a custom autograd function, which calls the inner ops
  Plain,      // by the kernels of an op, below autograd: those of the inner ones, or of cross_entropy itself
};

// A custom autograd function cannot be differentiated by functorch.
bool functorch_active();

// A tensor with a batch dimension of vmap's, as is_grads_batched makes them (with the older key).
bool is_batched(const at::Tensor& tensor);

inline bool has_tangent(const at::Tensor& tensor) { return tensor._fw_grad(/*level=*/0).defined(); }
inline bool has_tangent(const std::optional<at::Tensor>& tensor) { return tensor && has_tangent(*tensor); }

// Whether a backward pass for it has to be recorded.
inline bool wants_grad(const at::Tensor& tensor) { return tensor.requires_grad() && at::GradMode::is_enabled(); }
inline bool wants_grad(const std::optional<at::Tensor>& tensor) { return tensor && wants_grad(*tensor); }

// Whether a derivative for the argument is wanted, backward or forward.
bool is_differentiated(const at::Tensor& tensor);
inline bool is_differentiated(const std::optional<at::Tensor>& tensor) { return tensor && is_differentiated(*tensor); }

// `recorded`: the arguments that the custom function has gradients for; `composed`: those for which only the composite
// has them. All other arguments have no derivative.
template <class... Recorded, class... Composed>
Path path_of(const std::tuple<Recorded...>& recorded, const Composed&... composed) {
  return std::apply(
      [&](const auto&... tensor) {
        if (functorch_active() || (has_tangent(tensor) || ...) || (is_differentiated(composed) || ...)) {
          return Path::Composite;
        }
        return (wants_grad(tensor) || ...) ? Path::Recorded : Path::Plain;
      },
      recorded);
}

// Whether a backward pass is itself differentiated: backward, as its grad mode tells, or forward, where a tangent may
// come with what arrives from upstream alone. Then it is the composite's, whose ops have derivatives.
bool differentiated_again(const std::vector<at::Tensor>& grads);

}  // namespace masked_loss
