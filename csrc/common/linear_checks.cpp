#include <cmath>

#include "cross_entropy_ops.h"
#include "linear_ops.h"

namespace masked_loss {

LinearOptions linear_options(const LinearCrossEntropyOptions& options) { return {.loss = options}; }

LinearOptions linear_options(const LinearLogProbOptions& options, LinearKind kind) {
  return {.loss = {.reduction = Reduction::None,
                   .linear_bias = options.linear_bias,
                   .class_mask = options.class_mask,
                   .ignore_index = {},
                   .softcap = options.softcap,
                   .temperature = options.temperature,
                   .chunk_size = options.chunk_size,
                   .max_kept = options.max_kept,
                   .dtype = options.dtype},
          .kind = kind};
}

const char* linear_op_name(LinearKind kind) {
  switch (kind) {
    case LinearKind::CrossEntropy: return LinearCrossEntropy::name;
    case LinearKind::LogProb: return LinearLogProb::name;
    default: return LinearLogProbAndEntropy::name;
  }
}

RowArguments check_linear(const Tensor& input, const Tensor& linear_weight, const Tensor& target,
                          const OptionalTensor& mask, const LinearOptions& given) {
  const auto* op = linear_op_name(given.kind);
  const auto& options = given.loss;
  const char* target_name = given.kind == LinearKind::CrossEntropy ? "target" : "index";
  check_layout(op, "input", input);
  check_floating(op, "input", input);
  TORCH_CHECK(input.dim() >= 1, op, ": expected input with a last dimension of hidden features, got a 0-d tensor");
  const auto check_operand = [&](const char* name, const Tensor& tensor) {
    check_device(op, name, tensor, "input", input);
    check_floating(op, name, tensor);
    TORCH_CHECK_TYPE(tensor.scalar_type() == input.scalar_type(), op, ": expected ", name, " of input's dtype, ",
                     input.scalar_type(), ", got ", tensor.scalar_type());
  };
  check_operand("linear_weight", linear_weight);
  const auto sizes = input.sym_sizes();
  TORCH_CHECK(linear_weight.dim() == 2, op, ": expected linear_weight of shape [C, ", sizes.back(), "], got ",
              linear_weight.sym_sizes());
  TORCH_SYM_CHECK(linear_weight.sym_size(1).sym_eq(sizes.back()), op, ": expected linear_weight of shape [C, ",
                  sizes.back(), "], with the hidden size of input ", sizes, ", got ", linear_weight.sym_sizes());
  const auto classes = linear_weight.sym_size(0);
  if (options.linear_bias) {
    check_operand("linear_bias", *options.linear_bias);
    const auto& bias = *options.linear_bias;
    TORCH_CHECK(bias.dim() == 1, op, ": expected linear_bias of shape [", classes, "], got ", bias.sym_sizes());
    TORCH_SYM_CHECK(bias.sym_size(0).sym_eq(classes), op, ": expected linear_bias of shape [", classes, "], got ",
                    bias.sym_sizes());
  }
  check_device(op, target_name, target, "input", input);
  const c10::SymIntArrayRef rows(sizes.data(), sizes.size() - 1);
  const auto target_sizes = target.sym_sizes();
  TORCH_CHECK_TYPE(!target.is_floating_point(), op, ": expected ", target_name,
                   " of dtype int64, int32 or uint8 (class indices), got ", target.scalar_type(),
                   given.kind == LinearKind::CrossEntropy
                       ? "; class probabilities are for cross_entropy, of logits that are whole"
                       : "");
  TORCH_CHECK(target_sizes.size() == rows.size(), op, ": expected ", target_name, " of shape ", rows, ", input's ",
              sizes, " without the last dimension, got ", target_sizes);
  for (std::size_t d = 0; d < rows.size(); ++d) {
    TORCH_SYM_CHECK(target_sizes[d].sym_eq(rows[d]), op, ": expected ", target_name, " of shape ", rows, ", input's ",
                    sizes, " without the last dimension, got ", target_sizes);
  }
  check_loss_options(op, options.reduction, options.label_smoothing, options.z_loss);
  check_dtype(op, options.dtype);
  const auto softcap = options.softcap.value_or(1);
  TORCH_CHECK_VALUE(softcap > 0 && std::isfinite(softcap), op, ": expected softcap above 0, got ", softcap);
  TORCH_CHECK_VALUE(options.temperature > 0 && std::isfinite(options.temperature), op,
                    ": expected temperature above 0, got ", options.temperature);
  TORCH_CHECK_VALUE(options.chunk_size.value_or(1) > 0, op, ": expected chunk_size of at least 1, got ",
                    options.chunk_size.value_or(1));
  TORCH_CHECK_VALUE(options.max_kept.value_or(0) >= 0, op, ": expected max_kept of at least 0, got ",
                    options.max_kept.value_or(0));
  check_normalizer(op, options.normalizer, options.reduction, input);
  auto arguments = row_arguments(op, target, mask, options, input.dim() - 1, classes);
  arguments.target_name = target_name;
  c10::SymDimVector logits(rows.begin(), rows.end());
  logits.push_back(classes);
  check_row_arguments(arguments, logits);
  check_no_grad(op, "weight", options.weight);
  check_no_grad(op, "normalizer", options.normalizer);
  return arguments;
}

at::ScalarType linear_result_type(const Tensor& input, std::optional<at::ScalarType> dtype) {
  return dtype.value_or(accumulation_type(input.scalar_type()));
}

}  // namespace masked_loss
