#pragma once

#include <masked_loss/softmax.h>

#include "ops.h"

namespace masked_loss {

inline auto fields(const SoftmaxOptions& options) {
  const auto& [dim, causal, dtype] = options;
  return std::tie(dim, causal, dtype);
}
inline constexpr auto kSoftmaxArguments = "int dim=-1, bool causal=False, ScalarType? dtype=None";

inline auto fields(const LogsumexpOptions& options) {
  const auto& [dim, keepdim, causal, dtype] = options;
  return std::tie(dim, keepdim, causal, dtype);
}
inline constexpr auto kLogsumexpArguments =
    "int[1] dim=-1, bool keepdim=False, bool causal=False, ScalarType? dtype=None";

enum class SoftmaxKind { Softmax, LogSoftmax };

// What the inner ops take, of an input that has its dtype.
struct SoftmaxSlices {
  SoftmaxKind kind;
  std::int64_t dim;
  bool causal;
};
inline auto fields(const SoftmaxSlices& options) {
  const auto& [kind, dim, causal] = options;
  return std::tie(kind, dim, causal);
}
inline constexpr auto kSoftmaxSlicesArguments = "int kind, int dim, bool causal";

struct LogsumexpSlices {
  std::vector<std::int64_t> dim;
  bool causal;
};
inline auto fields(const LogsumexpSlices& options) {
  const auto& [dim, causal] = options;
  return std::tie(dim, causal);
}
inline constexpr auto kLogsumexpSlicesArguments = "int[] dim, bool causal";

template <SoftmaxKind kind>
struct SoftmaxOp : Carry<SoftmaxOptions, Tensor, const Tensor&, const OptionalTensor&> {
  static constexpr auto op = kind == SoftmaxKind::Softmax ? "softmax" : "log_softmax";
  static constexpr auto name = kind == SoftmaxKind::Softmax ? "masked_loss::softmax" : "masked_loss::log_softmax";
};
struct Logsumexp : Carry<LogsumexpOptions, Tensor, const Tensor&, const OptionalTensor&> {
  static constexpr auto op = "logsumexp";
  static constexpr auto name = "masked_loss::logsumexp";
};
struct SoftmaxForward : Carry<SoftmaxSlices, Tensor, const Tensor&, const OptionalTensor&> {
  static constexpr auto name = "masked_loss::_softmax_forward";
};
// (grad, result, mask) -> gradient of the input
struct SoftmaxBackward : Carry<SoftmaxSlices, Tensor, const Tensor&, const Tensor&, const OptionalTensor&> {
  static constexpr auto name = "masked_loss::_softmax_backward";
};
// -> in the accumulation dtype; what is reduced stays with a size of 1
struct LogsumexpForward : Carry<LogsumexpSlices, Tensor, const Tensor&, const OptionalTensor&> {
  static constexpr auto name = "masked_loss::_logsumexp_forward";
};
// (grad, result, input, mask) -> gradient of the input
struct LogsumexpBackward
    : Carry<LogsumexpSlices, Tensor, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&> {
  static constexpr auto name = "masked_loss::_logsumexp_backward";
};

}  // namespace masked_loss
