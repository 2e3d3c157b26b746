#include <ATen/ops/zeros.h>

#include <cmath>

#include "cross_entropy_ops.h"
#include "linear_ops.h"

namespace masked_loss {

LinearOptions linear_options(const LinearCrossEntropyOptions& options) { return {.loss = options}; }

LinearOptions linear_options(const LinearLogProbOptions& options, LinearKind kind) {
  return {.loss = {.reduction = Reduction::None,
                   .linear_bias = options.linear_bias,
                   .class_mask = options.class_mask,
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

namespace {

// Hidden states, and the weights and bias that make logits of them.
void check_head(const char* op, const char* input_name, const Tensor& input, const char* weight_name,
                const Tensor& linear_weight, const char* bias_name, const OptionalTensor& linear_bias) {
  check_layout(op, input_name, input);
  check_floating(op, input_name, input);
  TORCH_CHECK(input.dim() >= 1, op, ": expected ", input_name,
              " with a last dimension of hidden features, got a 0-d tensor");
  const auto check_operand = [&](const char* name, const Tensor& tensor) {
    check_device(op, name, tensor, input_name, input);
    check_floating(op, name, tensor);
    TORCH_CHECK_TYPE(tensor.scalar_type() == input.scalar_type(), op, ": expected ", name, " of ", input_name,
                     "'s dtype, ", input.scalar_type(), ", got ", tensor.scalar_type());
  };
  check_operand(weight_name, linear_weight);
  const auto sizes = input.sym_sizes();
  TORCH_CHECK(linear_weight.dim() == 2, op, ": expected ", weight_name, " of shape [C, ", sizes.back(), "], got ",
              linear_weight.sym_sizes());
  TORCH_SYM_CHECK(linear_weight.sym_size(1).sym_eq(sizes.back()), op, ": expected ", weight_name, " of shape [C, ",
                  sizes.back(), "], with the hidden size of ", input_name, " ", sizes, ", got ",
                  linear_weight.sym_sizes());
  if (!linear_bias) return;
  const auto classes = linear_weight.sym_size(0);
  check_operand(bias_name, *linear_bias);
  TORCH_CHECK(linear_bias->dim() == 1, op, ": expected ", bias_name, " of shape [", classes, "], got ",
              linear_bias->sym_sizes());
  TORCH_SYM_CHECK(linear_bias->sym_size(0).sym_eq(classes), op, ": expected ", bias_name, " of shape [", classes,
                  "], got ", linear_bias->sym_sizes());
}

// What all options of the family have.
template <class Options>
void check_linear_options(const char* op, const Tensor& input, const Options& options) {
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
  check_no_grad(op, "normalizer", options.normalizer);
}

void check_linear_rows(const RowArguments& arguments, const Tensor& input, const c10::SymInt& classes) {
  c10::SymDimVector logits(input.sym_sizes().begin(), input.sym_sizes().end() - 1);
  logits.push_back(classes);
  check_row_arguments(arguments, logits);
}

}  // namespace

RowArguments check_linear(const Tensor& input, const Tensor& linear_weight, const Tensor& target,
                          const OptionalTensor& mask, const LinearOptions& given) {
  const auto* op = linear_op_name(given.kind);
  const auto& options = given.loss;
  const char* target_name = given.kind == LinearKind::CrossEntropy ? "target" : "index";
  check_head(op, "input", input, "linear_weight", linear_weight, "linear_bias", options.linear_bias);
  const auto sizes = input.sym_sizes();
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
  check_linear_options(op, input, options);
  const auto classes = linear_weight.sym_size(0);
  auto arguments = row_arguments(op, target, mask, options, input.dim() - 1, classes);
  // Not by an empty list among the options, which a program of AOTInductor's loses.
  if (given.kind != LinearKind::CrossEntropy) arguments.ignore_index = {};
  arguments.target_name = target_name;
  check_linear_rows(arguments, input, classes);
  check_no_grad(op, "weight", options.weight);
  return arguments;
}

Tensor linear_kl_index(const Tensor& input) {
  auto sizes = input.sym_sizes();
  if (!sizes.empty()) sizes = sizes.slice(0, sizes.size() - 1);
  return at::zeros({}, at::TensorOptions(at::kLong).device(input.device())).expand_symint(sizes);
}

RowArguments check_linear_kl(const Tensor& input, const Tensor& linear_weight, const Tensor& target_input,
                             const Tensor& target_linear_weight, const Tensor& index, const OptionalTensor& mask,
                             const LinearKLOptions& options) {
  static const OptionalTensor none;
  static constexpr std::int64_t kAll[] = {0};  // without classes no row counts
  const auto* op = LinearKL::name;
  check_head(op, "input", input, "linear_weight", linear_weight, "linear_bias", options.linear_bias);
  check_device(op, "target_input", target_input, "input", input);
  check_head(op, "target_input", target_input, "target_linear_weight", target_linear_weight, "target_linear_bias",
             options.target_linear_bias);
  TORCH_CHECK_TYPE(target_input.scalar_type() == input.scalar_type(), op, ": expected target_input of input's dtype, ",
                   input.scalar_type(), ", got ", target_input.scalar_type());
  const auto sizes = input.sym_sizes(), target_sizes = target_input.sym_sizes();
  TORCH_CHECK(target_sizes.size() == sizes.size(), op, ": expected target_input of input's shape ", sizes,
              " but for the last dimension, got ", target_sizes);
  for (std::size_t d = 0; d + 1 < sizes.size(); ++d) {
    TORCH_SYM_CHECK(target_sizes[d].sym_eq(sizes[d]), op, ": expected target_input of input's shape ", sizes,
                    " but for the last dimension, got ", target_sizes);
  }
  const auto classes = linear_weight.sym_size(0);
  TORCH_SYM_CHECK(target_linear_weight.sym_size(0).sym_eq(classes), op, ": expected target_linear_weight of ", classes,
                  " classes, as linear_weight, got ", target_linear_weight.sym_sizes());
  check_loss_options(op, options.reduction, /*label_smoothing=*/0, /*z_loss=*/0);
  check_linear_options(op, input, options);
  TORCH_CHECK_VALUE(options.kind >= Divergence::Forward && options.kind <= Divergence::JensenShannon, op,
                    ": expected kind of 0 (forward), 1 (reverse) or 2 (jsd), got ", static_cast<int>(options.kind));
  TORCH_CHECK_VALUE(options.beta >= 0 && options.beta <= 1, op, ": expected beta in [0, 1], got ", options.beta);
  const bool has_classes = !TORCH_GUARD_OR_FALSE(classes.sym_eq(0));
  RowArguments arguments{op,
                         index,
                         mask,
                         /*weight=*/none,
                         options.sample_weight,
                         options.class_mask,
                         has_classes ? at::IntArrayRef() : at::IntArrayRef(kAll),
                         input.dim() - 1,
                         classes};
  check_linear_rows(arguments, input, classes);
  return arguments;
}

at::ScalarType linear_result_type(const Tensor& input, std::optional<at::ScalarType> dtype) {
  return dtype.value_or(accumulation_type(input.scalar_type()));
}

}  // namespace masked_loss
