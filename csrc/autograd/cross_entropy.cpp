#include <ATen/SavedTensorHooks.h>
#include <ATen/ops/clone.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "autograd/gradients.h"
#include "common/paths.h"
#include "composite/cross_entropy.h"
#include "composite/reduce.h"

namespace masked_loss::autograd {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

// Whether hooks take what is saved. They may keep a tensor itself, and nobody tells them when it is changed in place.
bool has_hooks() { return at::SavedTensorDefaultHooks::get_hooks().has_value(); }

// What a backward pass needs of the call: the tensors through autograd's saved variables, the rest as it is.
class SavedCall {
 public:
  // `result`: the gradient, if it is made, or the softmax.
  static void save(AutogradContext* ctx, const Tensor& input, const Tensor& target, const OptionalTensor& mask,
                   const CrossEntropyOptions& options, const Tensor& result, bool gradient_is_made) {
    const auto or_none = [](const OptionalTensor& tensor) { return tensor.value_or(Tensor()); };
    ctx->save_for_backward({result, gradient_is_made ? Tensor() : input, target, or_none(mask), or_none(options.weight),
                            or_none(options.sample_weight), or_none(options.class_mask), or_none(options.normalizer)});
    if (gradient_is_made) hold(ctx, input);
    // Few entries, as each costs allocations; lists, as compiled autograd has no hash for a tuple that holds one.
    std::vector<std::int64_t> integers{static_cast<std::int64_t>(options.reduction), options.dim, gradient_is_made};
    integers.insert(integers.end(), options.ignore_index.begin(), options.ignore_index.end());
    ctx->saved_data["integers"] = std::move(integers);
    ctx->saved_data["numbers"] = std::vector<double>{options.label_smoothing, options.z_loss};
  }

  explicit SavedCall(AutogradContext* ctx) : tensors_(ctx->get_saved_variables()), ctx_(ctx) {
    const auto integers = ctx->saved_data["integers"].toIntVector();
    const auto numbers = ctx->saved_data["numbers"].toDoubleVector();
    gradient_is_made = integers[2] != 0;
    options = {.reduction = static_cast<Reduction>(integers[0]),
               .weight = optional(tensors_[4]),
               .sample_weight = optional(tensors_[5]),
               .class_mask = optional(tensors_[6]),
               .normalizer = optional(tensors_[7]),
               .ignore_index = {integers.begin() + 3, integers.end()},
               .label_smoothing = numbers[0],
               .z_loss = numbers[1],
               .dim = integers[1]};
  }

  Tensor& result() { return tensors_[0]; }
  Tensor input() const { return gradient_is_made ? held(ctx_, "cross_entropy") : tensors_[1]; }
  const Tensor& target() const { return tensors_[2]; }
  OptionalTensor mask() const { return optional(tensors_[3]); }
  CrossEntropyOptions options;
  bool gradient_is_made;

 private:
  variable_list tensors_;
  AutogradContext* ctx_;
};

// The loss by the fused ops, which return it in the accumulation dtype.
struct CrossEntropyFunction : Function<CrossEntropyFunction> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& target, const OptionalTensor& mask,
                        const CrossEntropyOptions& options, at::ScalarType type) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const bool gradient_is_made = makes_gradient(input, options);
    auto [loss, result] = gradient_is_made ? call<CrossEntropyForwardGrad>(input, target, mask, options)
                                           : call<CrossEntropyForward>(input, target, mask, options);
    SavedCall::save(ctx, input, target, mask, options, result, gradient_is_made);
    return converted(loss, type);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    SavedCall saved(ctx);
    const auto& grad = grads[0];
    const auto mask = saved.mask();
    Tensor gradient;
    if (differentiated_again(grads)) {
      gradient = composite_cross_entropy_backward(grad, saved.input(), saved.target(), {}, mask, saved.options);
    } else if (saved.gradient_is_made) {
      gradient = scaled_gradient(saved.result(), grad, /*shared=*/false);
    } else {
      gradient = call<CrossEntropyBackward>(grad, saved.input(), saved.target(), saved.result(), mask, saved.options);
    }
    release_held(ctx);
    return {gradient, Tensor(), Tensor(), Tensor(), Tensor()};
  }

  // A scalar's gradient is made while each row is at hand; the losses of 'none' wait for theirs. So does float16, whose
  // small gradients would be lost before a loss scale could save them; and what hooks take, so that they take one
  // tensor of the input's size.
  static bool makes_gradient(const Tensor& input, const CrossEntropyOptions& options) {
    return options.reduction != Reduction::None && input.scalar_type() != at::kHalf && !has_hooks();
  }
};

Tensor fused(const Tensor& input, const Tensor& target, const OptionalTensor& mask, const CrossEntropyOptions& options,
             at::ScalarType type) {
  if (wants_grad(input)) {
    // Hooks are given a copy that nobody else can change.
    return CrossEntropyFunction::apply(has_hooks() ? input.clone() : input, target, mask, options, type);
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return converted(std::get<0>(call<CrossEntropyForward>(input, target, mask, options)), type);
}

// For a sample_weight that is differentiated: fused losses of the rows, and the N-sized rest in ATen ops.
Tensor differentiable_weights(const Tensor& input, const Tensor& target, const OptionalTensor& mask,
                              const CrossEntropyOptions& options) {
  const auto rows = check_cross_entropy(input, target, mask, options);
  const auto type = accumulation_type(input.scalar_type());
  const auto plan = composite_plan(rows, options.reduction, options.normalizer, type);
  auto unweighted = options;
  unweighted.reduction = Reduction::None;
  unweighted.sample_weight = unweighted.normalizer = std::nullopt;
  const auto losses = fused(input, target, plan.keep, unweighted, type);
  return composite_reduce(losses, plan.keep, plan.coefficient, options.reduction);
}

Tensor cross_entropy(const Tensor& input, const Tensor& target, const OptionalTensor& mask,
                     const CrossEntropyOptions& options) {
  static const auto forward = CrossEntropyForward::find(CrossEntropyForward::name);
  check_cross_entropy(input, target, mask, options);
  const auto type = result_type(input, cross_entropy_type(input, target, options.dtype), options.dtype);
  if (functorch_active() || has_tangent(input) || has_tangent(options.sample_weight) || is_differentiated(target) ||
      is_differentiated(options.weight) || !has_kernel(forward, input)) {
    return composite_cross_entropy(input, target, mask, options).to(type);
  }
  const auto [logits, targets] = in_one_dtype(input, target, options.dtype);
  if (is_differentiated(options.sample_weight)) {
    return differentiable_weights(logits, targets, mask, options).to(type);
  }
  return fused(logits, targets, mask, options, type);
}

// Integers, without a derivative: here for its check alone, which has a word for tensors of other layouts.
Tensor check_targets(const Tensor& target, c10::SymInt num_classes, const OptionalTensor& mask,
                     at::IntArrayRef ignore_index) {
  check_check_targets(target, num_classes, mask, ignore_index);
  const at::AutoDispatchBelowADInplaceOrView below;
  return call_check_targets(target, num_classes, mask, ignore_index);
}

// A count, without a derivative.
Tensor loss_normalizer(const Tensor& target, const OptionalTensor& mask, const LossNormalizerOptions& options) {
  check_loss_normalizer(target, mask, options);
  const at::NoGradGuard no_grad;
  const at::AutoDispatchBelowADInplaceOrView below;
  return call<LossNormalizer>(target, mask, options);
}

}  // namespace

TORCH_LIBRARY_IMPL(masked_loss, Autograd, m) {
  m.impl("cross_entropy", CrossEntropy::kernel<cross_entropy>);
  m.impl("check_targets", check_targets);
  m.impl("loss_normalizer", LossNormalizer::kernel<loss_normalizer>);
  for (const auto* op :
       {"_cross_entropy_forward", "_cross_entropy_forward_grad", "_cross_entropy_backward", "_scale_gradient_"}) {
    m.impl(op, torch::autograd::autogradNotImplementedFallback());
  }
}

TORCH_LIBRARY_IMPL(masked_loss, ADInplaceOrView, m) {
  m.impl("_scale_gradient_", torch::autograd::autogradNotImplementedInplaceOrViewFallback());
}

}  // namespace masked_loss::autograd
