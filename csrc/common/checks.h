#pragma once

#include "ops.h"
#include "pointwise_ops.h"
#include "reductions_ops.h"
#include "softmax_ops.h"

namespace masked_loss {

// What decides which rows count, and for how much: the arguments that cross_entropy, loss_normalizer and
// check_targets have in common. Refers to what it was made from, which must outlive it. `dim` counts among the
// dimensions of the input and is not negative.
struct RowArguments {
  const char* op;
  const Tensor& target;
  const OptionalTensor& mask;
  const OptionalTensor& weight;
  const OptionalTensor& sample_weight;
  const OptionalTensor& class_mask;
  at::IntArrayRef ignore_index;
  std::int64_t dim;
  std::optional<c10::SymInt> classes;  // where known
  bool probabilities = false;          // of the classes, which the target holds instead of an index
};

// The target's shape, without `dim` where it holds probabilities.
at::DimVector row_sizes(const RowArguments& rows);
c10::SymDimVector sym_row_sizes(const RowArguments& rows);

// Each checks its arguments, on shapes that may be symbolic and never on values, and returns them resolved.
RowArguments check_cross_entropy(const Tensor& input, const Tensor& target, const OptionalTensor& mask,
                                 const CrossEntropyOptions& options);
// Of the inner ops: class probabilities are in the input's dtype.
RowArguments check_cross_entropy_operands(const Tensor& input, const Tensor& target, const OptionalTensor& mask,
                                          const CrossEntropyOptions& options);
RowArguments check_cross_entropy_backward(const Tensor& grad, const Tensor& input, const Tensor& target,
                                          const Tensor& softmax, const OptionalTensor& mask,
                                          const CrossEntropyOptions& options);
RowArguments check_loss_normalizer(const Tensor& target, const OptionalTensor& mask,
                                   const LossNormalizerOptions& options);
RowArguments check_check_targets(const Tensor& target, const c10::SymInt& num_classes, const OptionalTensor& mask,
                                 at::IntArrayRef ignore_index);

void check_scale_gradient_(const Tensor& gradient, const Tensor& grad);

// MASKED_LOSS_CHECK=1 in the environment, which is read once: values are checked on devices too, where they have to be
// waited for.
bool checks_values();

// Whether values can be looked at without a wait: memory of the CPU, and not that of a fake, functional or wrapped
// tensor.
bool is_readable(const Tensor& tensor);

// An integer mask holds 0 and 1 alone, where its values are read: on the CPU, and with MASKED_LOSS_CHECK=1 elsewhere. A
// bool mask is not looked at: its bytes may be any. By an op, whose kernels the dispatcher finds beneath any wrapper.
void check_mask_values(const char* op, const char* name, const OptionalTensor& mask);
void check_readable_mask(std::string_view op, std::string_view name, const Tensor& mask);  // that kernel on the CPU

// The values of a normalizer, where it can be read without a wait.
void check_normalizer_value(const char* op, double normalizer);

// Checks a call of a loss of elements, and gives it with input, target and other in one dtype and the loss's shape.
PointwiseCall resolve_pointwise(PointwiseCall call);

// Of the inner ops: operands as resolve_pointwise gives them.
void check_pointwise(const Tensor& input, const Tensor& target, const OptionalTensor& other, const OptionalTensor& mask,
                     const PointwiseOptions& options);

// For a kept element that does not fit its formula: `at` counts the elements of the loss.
[[noreturn]] void throw_unfit(const char* op, const char* name, const Domain& domain, double value, std::int64_t at,
                              at::IntArrayRef shape);

[[noreturn]] void throw_out_of_range(const RowArguments& arguments, std::int64_t row, std::int64_t index,
                                     std::int64_t classes);

// Checks a call of softmax, log_softmax or logsumexp, and gives its input in the dtype that it is computed in.
Tensor resolve_softmax(const char* op, const Tensor& input, const OptionalTensor& mask, at::IntArrayRef dim,
                       bool causal, std::optional<at::ScalarType> dtype);

// Of the inner ops: gives the dimensions as numbers that are not negative, of no dimension all.
at::DimVector check_softmax(const char* op, const Tensor& input, const OptionalTensor& mask, at::IntArrayRef dim,
                            bool causal);
void check_softmax_grad(const char* op, const Tensor& grad, const Tensor& result);

// A call of a reduction: its input in a dtype that its accumulation dtype follows from, and the dtype of its result.
struct ResolvedReduction {
  Tensor input;
  at::ScalarType type;
};
ResolvedReduction resolve_reduction(const char* op, const Tensor& input, const OptionalTensor& mask,
                                    at::IntArrayRef dim, std::optional<at::ScalarType> dtype);

// Of the inner ops; the dimensions as check_softmax gives them.
at::DimVector check_moments(const Tensor& input, const OptionalTensor& mask, std::int64_t order, at::IntArrayRef dim);
void check_spread(const Tensor& scale, const OptionalTensor& input, const OptionalTensor& mean,
                  const OptionalTensor& offset, const OptionalTensor& mask, c10::SymIntArrayRef sizes,
                  at::ScalarType type);

// 0, 1, ... rank - 1.
at::DimVector every_dim(std::int64_t rank);

// The value of masked_fill is a number or a tensor.
inline const Tensor* tensor_or_null(const Tensor& value) { return &value; }
inline const Tensor* tensor_or_null(const at::Scalar&) { return nullptr; }

void check_masked_fill(const Tensor& input, const Tensor& mask, const Tensor* value);
void check_masked_fill_(const Tensor& input, const Tensor& mask, const Tensor* value);
void check_memory_overlap(const Tensor& input, const Tensor& mask);  // of masked_fill_, on tensors that have memory

// A view of `input` with the shape that it and `mask` broadcast to.
Tensor broadcast_to_mask(const Tensor& input, const Tensor& mask);

void check_integers(const char* op, const char* name, const Tensor& tensor);
void check_not_negative(const char* op, const char* name, const c10::SymInt& value);

// Whether a derivative for the argument is wanted, backward or forward.
bool is_differentiated(const OptionalTensor& tensor);

// float for half types, else the input's own.
at::ScalarType accumulation_type(at::ScalarType type);

at::ScalarType loss_normalizer_type(const LossNormalizerOptions& options);

// The dtype of a loss: the input's, and float for half types under autocast. Asked once, above the dispatcher's
// backend keys: a compiled graph runs with autocast off.
at::ScalarType result_type(const Tensor& input);
at::ScalarType result_type(const Tensor& input, at::ScalarType type);  // of one that is computed in another dtype
// Of a call that may ask for one, which wins.
at::ScalarType result_type(const Tensor& input, at::ScalarType computed, std::optional<at::ScalarType> dtype);

// What cross_entropy is computed in: the input's dtype, or what it and class probabilities promote to.
// A result in double is of sums in double; other dtypes are rounded from what the accumulation gives.
at::ScalarType cross_entropy_type(const Tensor& input, const Tensor& target, std::optional<at::ScalarType> dtype);

// Both in that dtype, or as they are where the target holds class indices.
std::pair<Tensor, Tensor> in_one_dtype(const Tensor& input, const Tensor& target, std::optional<at::ScalarType> dtype);

}  // namespace masked_loss
