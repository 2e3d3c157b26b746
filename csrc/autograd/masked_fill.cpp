#include <ATen/TensorOperators.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/library.h>

#include "autograd/recorded.h"
#include "common/masked_fill_ops.h"
#include "composite/masked_fill.h"

namespace masked_loss::autograd {
namespace {

// The gradient of the input is the upstream one filled with 0; that of the value, the sum of what is filled.
variable_list fill_backward(AutogradContext* ctx, const Tensor& grad, bool value_is_tensor) {
  const auto mask = ctx->get_saved_variables()[0];
  Tensor input_grad, value_grad;
  if (ctx->needs_input_grad(0)) input_grad = masked_loss::masked_fill(grad, mask, at::Scalar(0));
  if (value_is_tensor && ctx->needs_input_grad(1)) {
    value_grad = at::where(mask.ne(0), grad, at::zeros_like(grad)).sum();
  }
  return {input_grad, value_grad, Tensor()};
}

struct FillCall {
  const Tensor& mask;
};

// `input` already has the broadcast shape.
template <class Value>
struct FillFunction : Function<FillFunction<Value>> {
  static constexpr auto name = "MaskedFillBackward";

  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Value& value, const FillCall& of) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({of.mask});
    return call<MaskedFill<Value>>(input, of.mask, value);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    return fill_backward(ctx, grads[0], std::is_same_v<Value, Tensor>);
  }
};

template <class Value>
struct FillFunction_ : torch::autograd::Function<FillFunction_<Value>> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, Tensor input, const Value& value, const FillCall& of) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({of.mask});
    call<MaskedFill_<Value>>(input, of.mask, value);
    ctx->mark_dirty({input});
    return input;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    return fill_backward(ctx, grads[0], std::is_same_v<Value, Tensor>);
  }
};

template <class Value>
Path fill_path(const Tensor& input, const Value& value) {
  const auto* tensor = tensor_or_null(value);
  return tensor == nullptr ? path_of(std::tie(input)) : path_of(std::tie(input, *tensor));
}

template <class Value>
Tensor fill(const Tensor& input, const Tensor& mask, const Value& value) {
  check_masked_fill(input, mask, tensor_or_null(value));
  const auto path = fill_path(input, value);
  if (path == Path::Composite) return composite_masked_fill(input, mask, value);
  if (path == Path::Recorded) {
    return FillFunction<Value>::apply(broadcast_to_mask(input, mask), value, FillCall{mask});
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return call<MaskedFill<Value>>(input, mask, value);
}

template <class Value>
void fill_(Tensor& input, const Tensor& mask, const Value& value) {
  check_masked_fill_(input, mask, tensor_or_null(value));
  const auto path = fill_path(input, value);
  if (path == Path::Composite) return composite_masked_fill_(input, mask, value);
  torch::autograd::check_inplace(input, path == Path::Recorded);  // before anything is written
  FillFunction_<Value>::apply(input, value, FillCall{mask});
}

// Where Autograd is not in charge, as in inference mode: a write is still counted, and refused where torch refuses it.
template <class Value>
void count_fill_(Tensor& input, const Tensor& mask, const Value& value) {
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    call<MaskedFill_<Value>>(input, mask, value);
  }
  torch::autograd::increment_version(input);
}

}  // namespace

TORCH_LIBRARY_IMPL(masked_loss, ADInplaceOrView, m) {
  impl<MaskedFill_<at::Scalar>, count_fill_<at::Scalar>>(m);
  impl<MaskedFill_<Tensor>, count_fill_<Tensor>>(m);
}

TORCH_LIBRARY_IMPL(masked_loss, Autograd, m) {
  impl<MaskedFill<at::Scalar>, fill<at::Scalar>>(m);
  impl<MaskedFill<Tensor>, fill<Tensor>>(m);
  impl<MaskedFill_<at::Scalar>, fill_<at::Scalar>>(m);
  impl<MaskedFill_<Tensor>, fill_<Tensor>>(m);
}

}  // namespace masked_loss::autograd
