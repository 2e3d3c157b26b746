#include "cross_entropy_ops.h"

#include <limits>

namespace masked_loss {

namespace {

void check_classes(const char* op, const char* name, const Tensor& tensor, const c10::SymInt& classes) {
  TORCH_SYM_CHECK(tensor.sym_size(0).sym_eq(classes), op, ": expected ", name, " of shape [", classes,
                  "], the number of classes, got [", tensor.sym_size(0), "]");
}

void check_target(const char* op, const Tensor& target, const char* name = "target") {
  check_layout(op, name, target);
  const auto type = target.scalar_type();
  TORCH_CHECK_TYPE(type == at::kLong || type == at::kInt || type == at::kByte, op, ": expected ", name,
                   " of dtype int64, int32 or uint8 (class indices), got ", type);
}

// Class probabilities.
void check_probabilities(const char* op, const Tensor& target, c10::SymIntArrayRef input_sizes,
                         at::IntArrayRef ignore_index) {
  check_layout(op, "target", target);
  const auto sizes = target.sym_sizes();
  TORCH_CHECK_TYPE(sizes.size() == input_sizes.size(), op,
                   ": expected target of dtype int64, int32 or uint8 (class indices), or of the input's shape, ",
                   input_sizes, " (class probabilities), got ", target.scalar_type(), " of shape ", sizes);
  for (std::size_t d = 0; d < sizes.size(); ++d) {
    TORCH_SYM_CHECK(sizes[d].sym_eq(input_sizes[d]), op,
                    ": expected target of class probabilities of the input's shape, ", input_sizes, ", got ", sizes);
  }
  check_weight_dtype(op, "target", target, " (class probabilities)");
  for (const auto id : ignore_index) {
    TORCH_CHECK_VALUE(id < 0, op, ": expected no ignore_index with class probabilities, which have no index, got ", id,
                      "; positions are left out by mask=");
  }
}

template <class Sizes, class Of>
Sizes without(const Of& sizes, std::int64_t dim) {
  Sizes result(sizes.begin(), sizes.end());
  result.erase(result.begin() + dim);
  return result;
}

std::int64_t class_dim(const char* op, std::int64_t dim, std::int64_t rank) {
  // The default, 1, is for [N, C, ...]; an unbatched [C] has no other dimension to mean.
  if (rank == 1 && dim == 1) return 0;
  TORCH_CHECK_INDEX(dim >= -rank && dim < rank, op, ": expected dim in [", -rank, ", ", rank - 1, "], got ", dim);
  return dim < 0 ? dim + rank : dim;
}

bool is_one(const c10::SymInt& size) { return size.maybe_as_int() == 1; }

}  // namespace

void check_row_arguments(const RowArguments& rows, c10::SymIntArrayRef input_sizes) {
  const auto* op = rows.op;
  if (!rows.probabilities) check_target(op, rows.target, rows.target_name);
  const auto sizes = sym_row_sizes(rows);
  if (rows.mask) {
    check_device(op, "mask", *rows.mask, rows.target_name, rows.target);
    check_mask_dtype(op, "mask", *rows.mask,
                     "; weights of the positions are passed as sample_weight=, of the classes as weight=");
    check_broadcast(op, "mask", *rows.mask, sizes, rows.target_name);
  }
  if (rows.sample_weight) {
    check_device(op, "sample_weight", *rows.sample_weight, rows.target_name, rows.target);
    check_weight_dtype(op, "sample_weight", *rows.sample_weight,
                       "; what says which positions count is passed as mask=");
    check_broadcast(op, "sample_weight", *rows.sample_weight, sizes, rows.target_name);
  }
  if (rows.weight) {
    check_device(op, "weight", *rows.weight, rows.target_name, rows.target);
    check_weight_dtype(op, "weight", *rows.weight, "");
    TORCH_CHECK(rows.weight->dim() == 1, op, ": expected weight of shape [C], got ", rows.weight->sym_sizes());
    if (rows.classes) check_classes(op, "weight", *rows.weight, *rows.classes);
  }
  if (rows.class_mask) {
    check_device(op, "class_mask", *rows.class_mask, rows.target_name, rows.target);
    check_mask_dtype(op, "class_mask", *rows.class_mask, "");
    if (rows.class_mask->dim() == 1 && input_sizes.size() != 1) {
      if (rows.classes) check_classes(op, "class_mask", *rows.class_mask, *rows.classes);
    } else {
      check_broadcast(op, "class_mask", *rows.class_mask, input_sizes, "the logits");
    }
  }
}

void check_loss_options(const char* op, Reduction reduction, double label_smoothing, double z_loss) {
  const auto number = static_cast<std::int64_t>(reduction);
  TORCH_CHECK_VALUE(number >= 0 && number <= static_cast<std::int64_t>(Reduction::SequenceMean), op,
                    ": expected reduction to be 0 'none', 1 'mean', 2 'sum' or 3 'sequence_mean', got ", number);
  TORCH_CHECK_VALUE(label_smoothing >= 0 && label_smoothing <= 1, op, ": expected label_smoothing in [0, 1], got ",
                    label_smoothing);
  TORCH_CHECK_VALUE(z_loss >= 0, op, ": expected z_loss of at least 0, got ", z_loss);
}

RowArguments check_cross_entropy(const Tensor& input, const Tensor& target, const OptionalTensor& mask,
                                 const CrossEntropyOptions& options) {
  constexpr auto op = "cross_entropy";
  check_layout(op, "input", input);
  check_floating(op, "input", input);
  TORCH_CHECK(input.dim() >= 1, op, ": expected input with a class dimension, got a 0-d tensor");
  check_loss_options(op, options.reduction, options.label_smoothing, options.z_loss);
  check_dtype(op, options.dtype);
  const auto dim = class_dim(op, options.dim, input.dim());
  const auto sizes = input.sym_sizes();
  check_device(op, "target", target, "input", input);
  const bool probabilities = target.is_floating_point();
  if (probabilities) {
    check_probabilities(op, target, sizes, options.ignore_index);
  } else {
    check_target(op, target);
    const auto rows = without<c10::SymDimVector>(sizes, dim);
    const auto target_sizes = target.sym_sizes();
    TORCH_CHECK(target_sizes.size() == rows.size(), op, ": expected target of shape ", c10::SymIntArrayRef(rows),
                ", the input's ", sizes, " without dim ", dim, ", got ", target_sizes);
    for (std::size_t d = 0; d < rows.size(); ++d) {
      TORCH_SYM_CHECK(target_sizes[d].sym_eq(rows[d]), op, ": expected target of shape ", c10::SymIntArrayRef(rows),
                      ", the input's ", sizes, " without dim ", dim, ", got ", target_sizes);
    }
  }
  check_normalizer(op, options.normalizer, options.reduction, input);
  auto arguments = row_arguments(op, target, mask, options, dim, sizes[dim]);
  arguments.probabilities = probabilities;
  check_row_arguments(arguments, sizes);
  // With class probabilities torch has a gradient for the weights of the classes, and so do we.
  if (!probabilities) check_no_grad(op, "weight", options.weight);
  check_no_grad(op, "normalizer", options.normalizer);
  return arguments;
}

RowArguments check_cross_entropy_operands(const Tensor& input, const Tensor& target, const OptionalTensor& mask,
                                          const CrossEntropyOptions& options) {
  const auto arguments = check_cross_entropy(input, target, mask, options);
  TORCH_CHECK_TYPE(!arguments.probabilities || target.scalar_type() == input.scalar_type(), arguments.op,
                   "'s inner ops: expected class probabilities of the input's dtype, ", input.scalar_type(), ", got ",
                   target.scalar_type());
  return arguments;
}

at::DimVector row_sizes(const RowArguments& rows) {
  const auto sizes = rows.target.sizes();
  return rows.probabilities ? without<at::DimVector>(sizes, rows.dim) : at::DimVector(sizes.begin(), sizes.end());
}

c10::SymDimVector sym_row_sizes(const RowArguments& rows) {
  const auto sizes = rows.target.sym_sizes();
  if (rows.probabilities) return without<c10::SymDimVector>(sizes, rows.dim);
  return c10::SymDimVector(sizes.begin(), sizes.end());
}

RowArguments check_cross_entropy_backward(const Tensor& grad, const Tensor& input, const Tensor& target,
                                          const Tensor& softmax, const OptionalTensor& mask,
                                          const CrossEntropyOptions& options) {
  const auto arguments = check_cross_entropy_operands(input, target, mask, options);
  const auto rows = row_sizes(arguments);
  auto sizes = rows;
  sizes.push_back(2);
  TORCH_CHECK(softmax.sizes() == sizes && (grad.dim() == 0 || grad.sizes() == rows),
              "_cross_entropy_backward: expected softmax of shape ", at::IntArrayRef(sizes), " and grad of ",
              at::IntArrayRef(rows), " or 0-d, got ", softmax.sizes(), " and ", grad.sizes());
  return arguments;
}

void check_scale_gradient_(const Tensor& gradient, const Tensor& grad) {
  TORCH_CHECK(grad.dim() == 0, "_scale_gradient_: expected grad to be 0-d, got ", grad.sizes());
  check_device("_scale_gradient_", "grad", grad, "gradient", gradient);
}

RowArguments check_loss_normalizer(const Tensor& target, const OptionalTensor& mask,
                                   const LossNormalizerOptions& options) {
  constexpr auto op = "loss_normalizer";
  check_layout(op, "target", target);
  const auto dim = class_dim(op, options.dim, target.dim() + 1);
  auto arguments = row_arguments(op, target, mask, options, dim, std::nullopt);
  const auto& class_mask = options.class_mask;
  if (options.weight && options.weight->dim() == 1) {
    arguments.classes = options.weight->sym_size(0);
  } else if (class_mask && class_mask->dim() == 1 && target.dim() != 0) {
    arguments.classes = class_mask->sym_size(0);
  } else if (class_mask && class_mask->dim() == target.dim() + 1 && !is_one(class_mask->sym_size(dim))) {
    arguments.classes = class_mask->sym_size(dim);  // a size of 1 is for any number of classes
  }
  c10::SymDimVector sizes(target.sym_sizes().begin(), target.sym_sizes().end());
  sizes.insert(sizes.begin() + dim, arguments.classes.value_or(1));
  check_row_arguments(arguments, sizes);
  return arguments;
}

RowArguments check_check_targets(const Tensor& target, const c10::SymInt& num_classes, const OptionalTensor& mask,
                                 at::IntArrayRef ignore_index) {
  static const OptionalTensor none;
  RowArguments arguments{"check_targets", target, mask, none, none, none, ignore_index, 0, num_classes};
  check_not_negative(arguments.op, "num_classes", num_classes);
  check_row_arguments(arguments, {});
  return arguments;
}

void throw_out_of_range(const RowArguments& arguments, std::int64_t row, std::int64_t index, std::int64_t classes) {
  const auto position = position_of(row, arguments.target.sizes());
  if (classes == std::numeric_limits<std::int64_t>::max()) {
    TORCH_CHECK_INDEX(false, arguments.op, ": expected kept targets of at least 0, got ", index, " at position ",
                      at::IntArrayRef(position));
  }
  TORCH_CHECK_INDEX(false, arguments.op, ": expected kept targets in [0, ", classes, "), got ", index, " at position ",
                    at::IntArrayRef(position));
}

at::ScalarType loss_normalizer_type(const LossNormalizerOptions& options) {
  const auto is_double = [](const OptionalTensor& weight) { return weight && weight->scalar_type() == at::kDouble; };
  return is_double(options.weight) || is_double(options.sample_weight) ? at::kDouble : at::kFloat;
}

at::ScalarType cross_entropy_type(const Tensor& input, const Tensor& target, std::optional<at::ScalarType> dtype) {
  if (dtype == at::kDouble) return at::kDouble;
  const auto type = input.scalar_type();
  return target.is_floating_point() ? at::promoteTypes(type, target.scalar_type()) : type;
}

at::ScalarType cross_entropy_result_type(const Tensor& input, const Tensor& target,
                                         const CrossEntropyOptions& options) {
  return result_type(input, cross_entropy_type(input, target, options.dtype), options.dtype);
}

std::pair<Tensor, Tensor> in_one_dtype(const Tensor& input, const Tensor& target, std::optional<at::ScalarType> dtype) {
  const auto type = cross_entropy_type(input, target, dtype);
  return {converted(input, type), target.is_floating_point() ? converted(target, type) : target};
}

}  // namespace masked_loss
