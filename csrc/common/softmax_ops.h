#pragma once

#include <masked_loss/softmax.h>

#include "checks.h"

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

// Of the inner ops, whose input has the dtype of the result.
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
// With every dimension by its number: a program of AOTInductor's loses an empty list.
LogsumexpSlices logsumexp_slices(const Tensor& input, const LogsumexpOptions& options);

template <SoftmaxKind kind>
struct SoftmaxOp : OpWithOptions<SoftmaxOptions, Tensor, const Tensor&, const OptionalTensor&> {
  static constexpr auto name = kind == SoftmaxKind::Softmax ? "softmax" : "log_softmax";
};
struct Logsumexp : OpWithOptions<LogsumexpOptions, Tensor, const Tensor&, const OptionalTensor&> {
  static constexpr auto name = "logsumexp";
};
struct SoftmaxForward : OpWithOptions<SoftmaxSlices, Tensor, const Tensor&, const OptionalTensor&> {
  static constexpr auto name = "_softmax_forward";
};
// (grad, result, mask) -> gradient of the input
struct SoftmaxBackward : OpWithOptions<SoftmaxSlices, Tensor, const Tensor&, const Tensor&, const OptionalTensor&> {
  static constexpr auto name = "_softmax_backward";
};
// -> in the accumulation dtype; reduced dimensions stay with a size of 1
struct LogsumexpForward : OpWithOptions<LogsumexpSlices, Tensor, const Tensor&, const OptionalTensor&> {
  static constexpr auto name = "_logsumexp_forward";
};
// (grad, result, input, mask) -> gradient of the input
struct LogsumexpBackward
    : OpWithOptions<LogsumexpSlices, Tensor, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&> {
  static constexpr auto name = "_logsumexp_backward";
};

// Checks a call of softmax, log_softmax or logsumexp, and returns its input in the dtype that it is computed in.
Tensor resolve_softmax(const char* op, const Tensor& input, const OptionalTensor& mask, at::IntArrayRef dim,
                       bool causal, std::optional<at::ScalarType> dtype);

// The same for the inner ops; returns the wrapped dimensions, all of them if `dim` is empty.
at::DimVector check_softmax(const char* op, const Tensor& input, const OptionalTensor& mask, at::IntArrayRef dim,
                            bool causal);
void check_softmax_grad(const char* op, const Tensor& grad, const Tensor& result);

}  // namespace masked_loss
