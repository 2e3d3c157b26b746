#pragma once

#include <masked_loss/linear.h>

#include "checks.h"
#include "row_view.h"

namespace masked_loss {

inline auto fields(const LinearCrossEntropyOptions& options) {
  const auto& [reduction, linear_bias, weight, sample_weight, class_mask, normalizer, ignore_index, label_smoothing,
               z_loss, softcap, temperature, chunk_size, max_kept, dtype] = options;
  return std::tie(reduction, linear_bias, weight, sample_weight, class_mask, normalizer, ignore_index, label_smoothing,
                  z_loss, softcap, temperature, chunk_size, max_kept, dtype);
}
inline constexpr auto kLinearCrossEntropyArguments =
    "int reduction=1, Tensor? linear_bias=None, Tensor? weight=None, Tensor? sample_weight=None, "
    "Tensor? class_mask=None, Tensor? normalizer=None, int[1] ignore_index=-100, float label_smoothing=0., "
    "float z_loss=0., float? softcap=None, float temperature=1., int? chunk_size=None, int? max_kept=None, "
    "ScalarType? dtype=None";

inline auto fields(const LinearLogProbOptions& options) {
  const auto& [linear_bias, class_mask, softcap, temperature, chunk_size, max_kept, dtype] = options;
  return std::tie(linear_bias, class_mask, softcap, temperature, chunk_size, max_kept, dtype);
}
inline constexpr auto kLinearLogProbArguments =
    "Tensor? linear_bias=None, Tensor? class_mask=None, float? softcap=None, float temperature=1., "
    "int? chunk_size=None, int? max_kept=None, ScalarType? dtype=None";

inline auto fields(const LinearKLOptions& options) {
  const auto& [reduction, linear_bias, target_linear_bias, sample_weight, class_mask, normalizer, kind, beta, softcap,
               temperature, chunk_size, max_kept, dtype] = options;
  return std::tie(reduction, linear_bias, target_linear_bias, sample_weight, class_mask, normalizer, kind, beta,
                  softcap, temperature, chunk_size, max_kept, dtype);
}
inline constexpr auto kLinearKLArguments =
    "int reduction=1, Tensor? linear_bias=None, Tensor? target_linear_bias=None, Tensor? sample_weight=None, "
    "Tensor? class_mask=None, Tensor? normalizer=None, int kind=0, float beta=0.5, float? softcap=None, "
    "float temperature=1., int? chunk_size=None, int? max_kept=None, ScalarType? dtype=None";

// The options of the inner op.
struct LinearKLCall {
  LinearKLOptions kl = {};
  std::int64_t wanted = 0;  // a bit for each gradient, in the order of the results

  bool wants(int gradient) const { return wanted >> gradient & 1; }
};
inline auto fields(const LinearKLCall& of) { return std::tuple_cat(fields(of.kl), std::tie(of.wanted)); }

enum class LinearKind { CrossEntropy, LogProb, LogProbAndEntropy };

// The options of the inner ops, which all public ops share: a log-probability is minus a cross entropy.
struct LinearOptions {
  LinearCrossEntropyOptions loss = {};
  LinearKind kind = LinearKind::CrossEntropy;                       // of the public op, for messages
  bool input_grad = false, weight_grad = false, bias_grad = false;  // which gradients are wanted
};
inline auto fields(const LinearOptions& options) {
  return std::tuple_cat(fields(options.loss),
                        std::tie(options.kind, options.input_grad, options.weight_grad, options.bias_grad));
}
inline std::string linear_arguments() {
  return std::string(kLinearCrossEntropyArguments) +
         ", int kind=0, bool input_grad=False, bool weight_grad=False, bool bias_grad=False";
}

LinearOptions linear_options(const LinearCrossEntropyOptions& options);
LinearOptions linear_options(const LinearLogProbOptions& options, LinearKind kind);

using LinearGradients = std::tuple<Tensor, Tensor, Tensor>;  // of input, weight and bias

struct LinearCrossEntropy : OpWithOptions<LinearCrossEntropyOptions, Tensor, const Tensor&, const Tensor&,
                                          const Tensor&, const OptionalTensor&> {
  static constexpr auto name = "linear_cross_entropy";
};
struct LinearLogProb
    : OpWithOptions<LinearLogProbOptions, Tensor, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&> {
  static constexpr auto name = "linear_log_prob";
};
struct LinearLogProbAndEntropy : OpWithOptions<LinearLogProbOptions, std::tuple<Tensor, Tensor>, const Tensor&,
                                               const Tensor&, const Tensor&, const OptionalTensor&> {
  static constexpr auto name = "linear_log_prob_and_entropy";
};
struct LinearKL : OpWithOptions<LinearKLOptions, Tensor, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                const OptionalTensor&> {
  static constexpr auto name = "linear_kl";
};
// (input, linear_weight, target_input, target_linear_weight, mask, grad of the loss or none) -> (loss in the
// accumulation dtype, gradients of both heads' input, weight and bias, [0] where not wanted)
using LinearKLResults = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
struct LinearKLGradients : OpWithOptions<LinearKLCall, LinearKLResults, const Tensor&, const Tensor&, const Tensor&,
                                         const Tensor&, const OptionalTensor&, const OptionalTensor&> {
  static constexpr auto name = "_linear_kl_gradients";
};
// -> (loss in the accumulation dtype, gradients of input, weight and bias, [0] where not wanted); scalar reductions
// only
struct LinearForwardGrad : OpWithOptions<LinearOptions, std::tuple<Tensor, Tensor, Tensor, Tensor>, const Tensor&,
                                         const Tensor&, const Tensor&, const OptionalTensor&> {
  static constexpr auto name = "_linear_forward_grad";
};
// -> (loss, entropy [...], states [..., kLinearState]), in the accumulation dtype
struct LinearRowsForward : OpWithOptions<LinearOptions, std::tuple<Tensor, Tensor, Tensor>, const Tensor&,
                                         const Tensor&, const Tensor&, const OptionalTensor&> {
  static constexpr auto name = "_linear_rows_forward";
};
// (grad of the loss, grad of the entropy if it has one, input, linear_weight, target, states, mask) -> gradients, as
// above
struct LinearRowsBackward
    : OpWithOptions<LinearOptions, LinearGradients, const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&,
                    const Tensor&, const Tensor&, const OptionalTensor&> {
  static constexpr auto name = "_linear_rows_backward";
};

const char* linear_op_name(LinearKind kind);

// Checks the arguments, on shapes that may be symbolic and never on values, and returns those of the rows.
RowArguments check_linear(const Tensor& input, const Tensor& linear_weight, const Tensor& target,
                          const OptionalTensor& mask, const LinearOptions& options);

// The class index that each row of a divergence is planned with: one that no class lies outside of.
Tensor linear_kl_index(const Tensor& input);
RowArguments check_linear_kl(const Tensor& input, const Tensor& linear_weight, const Tensor& target_input,
                             const Tensor& target_linear_weight, const Tensor& index, const OptionalTensor& mask,
                             const LinearKLOptions& options);

// The dtype of a result: the accumulation's unless another one is asked for.
at::ScalarType linear_result_type(const Tensor& input, std::optional<at::ScalarType> dtype);

}  // namespace masked_loss
