#pragma once

#include <masked_loss/cross_entropy.h>

#include "checks.h"
#include "row_view.h"

namespace masked_loss {

// The only list of an options struct's members, and beside it the schema arguments in the same order.
inline auto fields(const CrossEntropyOptions& options) {
  const auto& [reduction, weight, sample_weight, class_mask, normalizer, ignore_index, label_smoothing, z_loss, dim,
               dtype] = options;
  return std::tie(reduction, weight, sample_weight, class_mask, normalizer, ignore_index, label_smoothing, z_loss, dim,
                  dtype);
}
inline constexpr auto kCrossEntropyArguments =
    "int reduction=1, Tensor? weight=None, Tensor? sample_weight=None, Tensor? class_mask=None, "
    "Tensor? normalizer=None, int[1] ignore_index=-100, float label_smoothing=0., float z_loss=0., int dim=1, "
    "ScalarType? dtype=None";

inline auto fields(const LossNormalizerOptions& options) {
  const auto& [weight, sample_weight, class_mask, ignore_index, dim] = options;
  return std::tie(weight, sample_weight, class_mask, ignore_index, dim);
}
inline constexpr auto kLossNormalizerArguments =
    "Tensor? weight=None, Tensor? sample_weight=None, Tensor? class_mask=None, int[1] ignore_index=-100, int dim=1";

struct CrossEntropy : OpWithOptions<CrossEntropyOptions, Tensor, const Tensor&, const Tensor&, const OptionalTensor&> {
  static constexpr auto name = "cross_entropy";
};
// -> (loss, softmax), both in the accumulation dtype; softmax [..., 2] holds each row's maximum and sum of exp(x -
// maximum): their log-sum-exp as one number would lose the digits of large logits
struct CrossEntropyForward : OpWithOptions<CrossEntropyOptions, std::tuple<Tensor, Tensor>, const Tensor&,
                                           const Tensor&, const OptionalTensor&> {
  static constexpr auto name = "_cross_entropy_forward";
};
// -> (loss in the accumulation dtype, gradient of the input); scalar reductions only
struct CrossEntropyForwardGrad : OpWithOptions<CrossEntropyOptions, std::tuple<Tensor, Tensor>, const Tensor&,
                                               const Tensor&, const OptionalTensor&> {
  static constexpr auto name = "_cross_entropy_forward_grad";
};
// (grad, input, target, softmax, mask) -> gradient of the input
struct CrossEntropyBackward : OpWithOptions<CrossEntropyOptions, Tensor, const Tensor&, const Tensor&, const Tensor&,
                                            const Tensor&, const OptionalTensor&> {
  static constexpr auto name = "_cross_entropy_backward";
};
struct LossNormalizer : OpWithOptions<LossNormalizerOptions, Tensor, const Tensor&, const OptionalTensor&> {
  static constexpr auto name = "loss_normalizer";
};
struct CheckTargets : Op<Tensor(const Tensor&, c10::SymInt, const OptionalTensor&, at::IntArrayRef)> {
  static constexpr auto name = "check_targets";
};
// (gradient, grad): a gradient that the forward pass has made, times the upstream one; a zero stays +0.0 whatever it is
struct ScaleGradient_ : Op<void(Tensor&, const Tensor&)> {
  static constexpr auto name = "_scale_gradient_";
};

// Each checks its arguments, on shapes that may be symbolic and never on values, and returns them resolved.
RowArguments check_cross_entropy(const Tensor& input, const Tensor& target, const OptionalTensor& mask,
                                 const CrossEntropyOptions& options);
// Arguments of the inner ops, where class probabilities have the input's dtype.
RowArguments check_cross_entropy_operands(const Tensor& input, const Tensor& target, const OptionalTensor& mask,
                                          const CrossEntropyOptions& options);
RowArguments check_cross_entropy_backward(const Tensor& grad, const Tensor& input, const Tensor& target,
                                          const Tensor& softmax, const OptionalTensor& mask,
                                          const CrossEntropyOptions& options);
RowArguments check_loss_normalizer(const Tensor& target, const OptionalTensor& mask,
                                   const LossNormalizerOptions& options);
RowArguments check_check_targets(const Tensor& target, const c10::SymInt& num_classes, const OptionalTensor& mask,
                                 at::IntArrayRef ignore_index);
// Of the arguments that decide about rows, beside logits of those sizes.
void check_row_arguments(const RowArguments& rows, c10::SymIntArrayRef input_sizes);
void check_loss_options(const char* op, Reduction reduction, double label_smoothing, double z_loss);
void check_scale_gradient_(const Tensor& gradient, const Tensor& grad);

at::ScalarType loss_normalizer_type(const LossNormalizerOptions& options);

// The dtype that cross entropy is computed in: the input's, or what it and class probabilities promote to. A result in
// double is a sum of doubles; other dtypes are rounded from what the accumulation gives.
at::ScalarType cross_entropy_type(const Tensor& input, const Tensor& target, std::optional<at::ScalarType> dtype);

// The dtype of its result.
at::ScalarType cross_entropy_result_type(const Tensor& input, const Tensor& target, const CrossEntropyOptions& options);

// Input and class probabilities in the dtype that the loss is computed in; class indices stay as they are.
std::pair<Tensor, Tensor> in_one_dtype(const Tensor& input, const Tensor& target, std::optional<at::ScalarType> dtype);

}  // namespace masked_loss
