#pragma once

#include <masked_loss/cross_entropy.h>

#include "carry.h"

namespace masked_loss {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

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

struct CrossEntropy : Carry<CrossEntropyOptions, Tensor, const Tensor&, const Tensor&, const OptionalTensor&> {
  static constexpr auto name = "masked_loss::cross_entropy";
};
// -> (loss, softmax), both in the accumulation dtype; softmax [..., 2] holds each row's maximum and sum of exp(x -
// maximum): their log-sum-exp as one number would lose the digits of large logits
struct CrossEntropyForward
    : Carry<CrossEntropyOptions, std::tuple<Tensor, Tensor>, const Tensor&, const Tensor&, const OptionalTensor&> {
  static constexpr auto name = "masked_loss::_cross_entropy_forward";
};
// -> (loss in the accumulation dtype, gradient of the input); scalar reductions only
struct CrossEntropyForwardGrad
    : Carry<CrossEntropyOptions, std::tuple<Tensor, Tensor>, const Tensor&, const Tensor&, const OptionalTensor&> {
  static constexpr auto name = "masked_loss::_cross_entropy_forward_grad";
};
// (grad, input, target, softmax, mask) -> gradient of the input
struct CrossEntropyBackward : Carry<CrossEntropyOptions, Tensor, const Tensor&, const Tensor&, const Tensor&,
                                    const Tensor&, const OptionalTensor&> {
  static constexpr auto name = "masked_loss::_cross_entropy_backward";
};
struct LossNormalizer : Carry<LossNormalizerOptions, Tensor, const Tensor&, const OptionalTensor&> {
  static constexpr auto name = "masked_loss::loss_normalizer";
};

// The typed handle of an op without an options struct; `name` and `overload` must be the same at every call.
template <class Signature>
auto find_op(const char* name, const char* overload = "") {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, overload).template typed<Signature>();
}

inline Tensor call_check_targets(const Tensor& target, const c10::SymInt& num_classes, const OptionalTensor& mask,
                                 at::IntArrayRef ignore_index) {
  static const auto op =
      find_op<Tensor(const Tensor&, c10::SymInt, const OptionalTensor&, at::IntArrayRef)>("masked_loss::check_targets");
  return op.call(target, num_classes, mask, ignore_index);
}

template <class Op, class... Arguments>
auto call(const Arguments&... arguments) {
  static const auto op = Op::find(Op::name);
  return Op::call(op, arguments...);
}

}  // namespace masked_loss
