#include <ATen/TensorOperators.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <masked_loss/masked_fill.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "common/checks.h"
#include "common/paths.h"
#include "composite/masked_fill.h"

namespace masked_loss::autograd {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

// The gradient of the input is the upstream one filled with 0; that of the value, the sum of what is filled.
variable_list fill_backward(AutogradContext* ctx, const Tensor& grad, bool value_is_tensor) {
  const auto mask = ctx->get_saved_variables()[0];
  Tensor input_grad, value_grad;
  if (ctx->needs_input_grad(0)) input_grad = masked_loss::masked_fill(grad, mask, at::Scalar(0));
  if (value_is_tensor && ctx->needs_input_grad(2)) {
    value_grad = at::where(mask.ne(0), grad, at::zeros_like(grad)).sum();
  }
  return {input_grad, Tensor(), value_grad};
}

// `input` already has the broadcast shape.
template <class Value>
struct MaskedFill : Function<MaskedFill<Value>> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& mask, const Value& value) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({mask});
    return masked_loss::masked_fill(input, mask, value);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    return fill_backward(ctx, grads[0], std::is_same_v<Value, Tensor>);
  }
};

template <class Value>
struct MaskedFill_ : Function<MaskedFill_<Value>> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, Tensor input, const Tensor& mask, const Value& value) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({mask});
    masked_loss::masked_fill_(input, mask, value);
    ctx->mark_dirty({input});
    return input;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    return fill_backward(ctx, grads[0], std::is_same_v<Value, Tensor>);
  }
};

template <class Value>
bool composed(const Tensor& input, const Value& value) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("masked_loss::masked_fill", "Scalar");
  const auto* tensor = tensor_or_null(value);
  return functorch_active() || has_tangent(input) || (tensor != nullptr && has_tangent(*tensor)) ||
         !has_kernel(op, input);
}

template <class Value>
bool wants_grad(const Tensor& input, const Value& value) {
  const auto* tensor = tensor_or_null(value);
  return masked_loss::wants_grad(input) || (tensor != nullptr && masked_loss::wants_grad(*tensor));
}

template <class Value>
Tensor fill(const Tensor& input, const Tensor& mask, const Value& value) {
  check_masked_fill(input, mask, tensor_or_null(value));
  if (composed(input, value)) return composite_masked_fill(input, mask, value);
  if (!wants_grad(input, value)) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return masked_loss::masked_fill(input, mask, value);
  }
  return MaskedFill<Value>::apply(broadcast_to_mask(input, mask), mask, value);
}

template <class Value>
void fill_(Tensor& input, const Tensor& mask, const Value& value) {
  check_masked_fill_(input, mask, tensor_or_null(value));
  if (composed(input, value)) return composite_masked_fill_(input, mask, value);
  torch::autograd::check_inplace(input, wants_grad(input, value));  // before anything is written
  MaskedFill_<Value>::apply(input, mask, value);
}

// Where Autograd is not in charge, as in inference mode: a write is still counted, and refused where torch refuses it.
template <class Value>
void count_fill_(Tensor& input, const Tensor& mask, const Value& value) {
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    masked_loss::masked_fill_(input, mask, value);
  }
  torch::autograd::increment_version(input);
}

}  // namespace

TORCH_LIBRARY_IMPL(masked_loss, ADInplaceOrView, m) {
  m.impl("masked_fill_.Scalar", count_fill_<at::Scalar>);
  m.impl("masked_fill_.Tensor", count_fill_<Tensor>);
}

TORCH_LIBRARY_IMPL(masked_loss, Autograd, m) {
  m.impl("masked_fill.Scalar", fill<at::Scalar>);
  m.impl("masked_fill.Tensor", fill<Tensor>);
  m.impl("masked_fill_.Scalar", fill_<at::Scalar>);
  m.impl("masked_fill_.Tensor", fill_<Tensor>);
}

}  // namespace masked_loss::autograd
