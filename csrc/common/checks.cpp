#include "checks.h"

#include <ATen/ExpandUtils.h>
#include <ATen/MemoryOverlap.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <ATen/functorch/BatchedTensorImpl.h>
#include <ATen/ops/result_type.h>

#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <string_view>

namespace masked_loss {
namespace {

void check_layout(const char* op, const char* name, const Tensor& tensor) {
  TORCH_CHECK_TYPE(tensor.layout() == at::kStrided && !tensor.is_nested(), op, ": expected ", name,
                   " to be a dense tensor, got ",
                   tensor.is_nested()   ? "a nested one"
                   : tensor.is_mkldnn() ? "an mkldnn one"
                                        : "a sparse one");
}

void check_beside(const char* op, const char* name, const Tensor& tensor, const char* other, const Tensor& there) {
  check_layout(op, name, tensor);
  TORCH_CHECK(tensor.device() == there.device(), op, ": expected ", name, " on the device of ", other, ", ",
              there.device(), ", got ", tensor.device());
}

void check_mask_dtype(const char* op, const char* name, const Tensor& mask, const char* hint) {
  TORCH_CHECK_TYPE(at::isIntegralType(mask.scalar_type(), /*includeBool=*/true), op, ": expected ", name,
                   " of dtype bool or an integer dtype, got ", mask.scalar_type(), hint);
}

void check_weight_dtype(const char* op, const char* name, const Tensor& weight, const char* hint) {
  const auto type = weight.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16, op,
                   ": expected ", name, " of a floating dtype, got ", type, hint);
}

// `tensor` has the rank of `shape`, and each size equals it or is 1.
void check_broadcast(const char* op, const char* name, const Tensor& tensor, c10::SymIntArrayRef shape,
                     const char* of) {
  const auto sizes = tensor.sym_sizes();
  TORCH_CHECK(sizes.size() == shape.size(), op, ": expected ", name, " of rank ", shape.size(), ", as ", of,
              " of shape ", shape, ", got shape ", sizes, "; add the missing dimensions of size 1, as in ", name,
              "[:, None]");
  for (std::size_t d = 0; d < sizes.size(); ++d) {
    TORCH_SYM_CHECK(sizes[d].sym_eq(shape[d]).sym_or(sizes[d].sym_eq(1)), op, ": expected ", name,
                    " with each size 1 or that of ", of, ", ", shape, ", got ", sizes);
  }
}

// From the last dimension back, each size of `name` is 1 or that of `of`; with `both`, either may be 1.
void check_trailing(const char* op, const char* name, const char* of, c10::SymIntArrayRef ours,
                    c10::SymIntArrayRef theirs, bool both = false) {
  TORCH_CHECK(both || theirs.size() <= ours.size(), op, ": expected ", name, " to broadcast to ", of, " of shape ",
              ours, ", got ", theirs);
  for (std::size_t d = 1; d <= std::min(ours.size(), theirs.size()); ++d) {
    const auto &a = ours[ours.size() - d], &b = theirs[theirs.size() - d];
    auto fits = b.sym_eq(1).sym_or(b.sym_eq(a));
    if (both) fits = fits.sym_or(a.sym_eq(1));
    TORCH_SYM_CHECK(fits, op, ": expected ", name, " to broadcast ", both ? "with" : "to", " ", of, " of shape ", ours,
                    ", got ", theirs);
  }
}

// An argument without a derivative: an error, as in torch, and never a silent zero.
void check_no_grad(const char* op, const char* name, const OptionalTensor& tensor) {
  TORCH_CHECK(
      !is_differentiated(tensor), op, ": expected ", name,
      " that does not require grad, got one that does or that has a tangent; the loss has no derivative for it");
}

void check_classes(const char* op, const char* name, const Tensor& tensor, const c10::SymInt& classes) {
  TORCH_SYM_CHECK(tensor.sym_size(0).sym_eq(classes), op, ": expected ", name, " of shape [", classes,
                  "], the number of classes, got [", tensor.sym_size(0), "]");
}

void check_target(const char* op, const Tensor& target) {
  check_layout(op, "target", target);
  const auto type = target.scalar_type();
  TORCH_CHECK_TYPE(type == at::kLong || type == at::kInt || type == at::kByte, op,
                   ": expected target of dtype int64, int32 or uint8 (class indices), got ", type);
}

// Class probabilities.
void check_probabilities(const char* op, const Tensor& target, c10::SymIntArrayRef input_sizes,
                         at::IntArrayRef ignore_index) {
  check_layout(op, "target", target);
  const auto sizes = target.sym_sizes();
  TORCH_CHECK_TYPE(sizes.size() == input_sizes.size(), op,
                   ": expected target of dtype int64, int32 or uint8 (class "
                   "indices), or of the input's shape, ",
                   input_sizes, " (class probabilities), got ", target.scalar_type(), " of shape ", sizes);
  for (std::size_t d = 0; d < sizes.size(); ++d) {
    TORCH_SYM_CHECK(sizes[d].sym_eq(input_sizes[d]), op,
                    ": expected target of class probabilities of the input's "
                    "shape, ",
                    input_sizes, ", got ", sizes);
  }
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

void check_rows(const RowArguments& rows, c10::SymIntArrayRef input_sizes) {
  const auto* op = rows.op;
  if (!rows.probabilities) check_target(op, rows.target);
  const auto sizes = sym_row_sizes(rows);
  if (rows.mask) {
    check_beside(op, "mask", *rows.mask, "target", rows.target);
    check_mask_dtype(op, "mask", *rows.mask,
                     "; weights of the positions are passed as sample_weight=, of the classes as weight=");
    check_broadcast(op, "mask", *rows.mask, sizes, "target");
  }
  if (rows.sample_weight) {
    check_beside(op, "sample_weight", *rows.sample_weight, "target", rows.target);
    check_weight_dtype(op, "sample_weight", *rows.sample_weight,
                       "; what says which positions count is passed as mask=");
    check_broadcast(op, "sample_weight", *rows.sample_weight, sizes, "target");
  }
  if (rows.weight) {
    check_beside(op, "weight", *rows.weight, "target", rows.target);
    check_weight_dtype(op, "weight", *rows.weight, "");
    TORCH_CHECK(rows.weight->dim() == 1, op, ": expected weight of shape [C], got ", rows.weight->sym_sizes());
    if (rows.classes) check_classes(op, "weight", *rows.weight, *rows.classes);
  }
  if (rows.class_mask) {
    check_beside(op, "class_mask", *rows.class_mask, "target", rows.target);
    check_mask_dtype(op, "class_mask", *rows.class_mask, "");
    if (rows.class_mask->dim() == 1 && input_sizes.size() != 1) {
      if (rows.classes) check_classes(op, "class_mask", *rows.class_mask, *rows.classes);
    } else {
      check_broadcast(op, "class_mask", *rows.class_mask, input_sizes, "the logits");
    }
  }
}

void check_normalizer(const char* op, const OptionalTensor& normalizer, Reduction reduction, const Tensor& beside) {
  if (!normalizer) return;
  TORCH_CHECK_VALUE(reduction != Reduction::None && reduction != Reduction::Sum, op,
                    ": expected a normalizer only with a mean for a reduction, got reduction '",
                    reduction == Reduction::None ? "none" : "sum", "'");
  check_beside(op, "normalizer", *normalizer, "input", beside);
  TORCH_CHECK(normalizer->dim() == 0, op, ": expected normalizer to be a number or a 0-d tensor, got shape ",
              normalizer->sym_sizes());
  TORCH_CHECK_TYPE(!normalizer->is_complex() && normalizer->scalar_type() != at::kBool, op,
                   ": expected normalizer of a real dtype, got ", normalizer->scalar_type());
}

std::int64_t class_dim(const char* op, std::int64_t dim, std::int64_t rank) {
  // The default, 1, is for [N, C, ...]; an unbatched [C] has no other dimension to mean.
  if (rank == 1 && dim == 1) return 0;
  TORCH_CHECK_INDEX(dim >= -rank && dim < rank, op, ": expected dim in [", -rank, ", ", rank - 1, "], got ", dim);
  return dim < 0 ? dim + rank : dim;
}

bool is_one(const c10::SymInt& size) { return size.maybe_as_int() == 1; }

}  // namespace

RowArguments check_cross_entropy(const Tensor& input, const Tensor& target, const OptionalTensor& mask,
                                 const CrossEntropyOptions& options) {
  constexpr auto op = "cross_entropy";
  check_layout(op, "input", input);
  const auto type = input.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16, op,
                   ": expected input of dtype float32, float64, bfloat16 or float16, got ", type);
  TORCH_CHECK(input.dim() >= 1, op, ": expected input with a class dimension, got a 0-d tensor");
  const auto reduction = static_cast<std::int64_t>(options.reduction);
  TORCH_CHECK_VALUE(reduction >= 0 && reduction <= static_cast<std::int64_t>(Reduction::SequenceMean), op,
                    ": expected reduction to be 0 'none', 1 'mean', 2 'sum' or 3 'sequence_mean', got ", reduction);
  TORCH_CHECK_VALUE(options.label_smoothing >= 0 && options.label_smoothing <= 1, op,
                    ": expected label_smoothing in [0, 1], got ", options.label_smoothing);
  const auto dim = class_dim(op, options.dim, input.dim());
  const auto sizes = input.sym_sizes();
  check_beside(op, "target", target, "input", input);
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
  RowArguments arguments{
      op,  target,     mask,         options.weight, options.sample_weight, options.class_mask, options.ignore_index,
      dim, sizes[dim], probabilities};
  check_rows(arguments, sizes);
  // With class probabilities torch has a gradient for the weights of the classes, and so do we.
  if (!probabilities) check_no_grad(op, "weight", options.weight);
  check_no_grad(op, "normalizer", options.normalizer);
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
  const auto arguments = check_cross_entropy(input, target, mask, options);
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
  check_beside("_scale_gradient_", "grad", grad, "gradient", gradient);
}

RowArguments check_loss_normalizer(const Tensor& target, const OptionalTensor& mask,
                                   const LossNormalizerOptions& options) {
  constexpr auto op = "loss_normalizer";
  check_layout(op, "target", target);
  RowArguments arguments{op,
                         target,
                         mask,
                         options.weight,
                         options.sample_weight,
                         options.class_mask,
                         options.ignore_index,
                         class_dim(op, options.dim, target.dim() + 1),
                         std::nullopt};
  const auto& class_mask = options.class_mask;
  if (options.weight && options.weight->dim() == 1) {
    arguments.classes = options.weight->sym_size(0);
  } else if (class_mask && class_mask->dim() == 1 && target.dim() != 0) {
    arguments.classes = class_mask->sym_size(0);
  } else if (class_mask && class_mask->dim() == target.dim() + 1 && !is_one(class_mask->sym_size(arguments.dim))) {
    arguments.classes = class_mask->sym_size(arguments.dim);  // a size of 1 is for any number of classes
  }
  c10::SymDimVector sizes(target.sym_sizes().begin(), target.sym_sizes().end());
  sizes.insert(sizes.begin() + arguments.dim, arguments.classes.value_or(1));
  check_rows(arguments, sizes);
  return arguments;
}

RowArguments check_check_targets(const Tensor& target, const c10::SymInt& num_classes, const OptionalTensor& mask,
                                 at::IntArrayRef ignore_index) {
  static const OptionalTensor none;
  RowArguments arguments{"check_targets", target, mask, none, none, none, ignore_index, 0, num_classes};
  check_not_negative(arguments.op, "num_classes", num_classes);
  check_rows(arguments, {});
  return arguments;
}

namespace {

void check_floating(const char* op, const char* name, const Tensor& tensor) {
  const auto type = tensor.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16, op,
                   ": expected ", name, " of dtype float32, float64, bfloat16 or float16, got ", type);
}

void check_pointwise_options(const char* op, c10::SymIntArrayRef shape, const Tensor& beside,
                             const OptionalTensor& mask, const PointwiseOptions& options) {
  const auto& [reduction, loss, weight, sample_weight, normalizer, numbers] = options;
  const auto number = static_cast<std::int64_t>(reduction);
  TORCH_CHECK_VALUE(number >= 0 && number <= static_cast<std::int64_t>(Reduction::BatchMean), op,
                    ": expected reduction to be 0 'none', 1 'mean', 2 'sum', 3 'sequence_mean' or 4 'batchmean', got ",
                    number);
  constexpr auto of = "the loss";
  if (mask) {
    check_beside(op, "mask", *mask, "input", beside);
    check_mask_dtype(op, "mask", *mask, "; weights of the elements are passed as sample_weight=");
    check_broadcast(op, "mask", *mask, shape, of);
  }
  if (sample_weight) {
    check_beside(op, "sample_weight", *sample_weight, "input", beside);
    check_weight_dtype(op, "sample_weight", *sample_weight, "; what says which elements count is passed as mask=");
    check_broadcast(op, "sample_weight", *sample_weight, shape, of);
  }
  if (weight) {
    check_beside(op, "weight", *weight, "input", beside);
    check_weight_dtype(op, "weight", *weight, "");
    check_broadcast(op, "weight", *weight, shape, of);
  }
  check_normalizer(op, normalizer, reduction, beside);
}

}  // namespace

PointwiseCall resolve_pointwise(PointwiseCall call) {
  const auto* op = call.op;
  auto& [name, input, target, other, mask, options] = call;
  const auto& traits = pointwise_traits(options.loss);
  check_layout(op, "input", input);
  check_beside(op, "target", target, "input", input);
  TORCH_CHECK_TYPE(!input.is_complex() && !target.is_complex(), op, ": expected real input and target, got ",
                   input.scalar_type(), " and ", target.scalar_type());
  auto type = at::result_type(input, target);
  const auto sizes = input.sym_sizes(), target_sizes = target.sym_sizes();
  c10::SymDimVector shape(sizes.begin(), sizes.end());
  if (traits.broadcasts_target) {
    shape = at::infer_size_symdimvector(sizes, target_sizes);
  } else {
    TORCH_CHECK(sizes.size() == target_sizes.size(), op, ": expected target of the input's shape ", sizes, ", got ",
                target_sizes);
    for (std::size_t d = 0; d < sizes.size(); ++d) {
      TORCH_SYM_CHECK(sizes[d].sym_eq(target_sizes[d]), op, ": expected target of the input's shape ", sizes, ", got ",
                      target_sizes);
    }
  }
  if (other) {
    const auto* other_name = traits.has_other_slope ? "var" : "pos_weight";
    check_beside(op, other_name, *other, "input", input);
    check_floating(op, other_name, *other);
    if (traits.has_other_slope) {
      // As torch: a variance for each element, or for each slice along the last dimension.
      if (static_cast<std::size_t>(other->dim()) + 1 == sizes.size()) other = other->unsqueeze(-1);
      check_broadcast(op, other_name, *other, shape, "input");
    } else {
      check_no_grad(op, other_name, other);
      check_trailing(op, "pos_weight", "target", shape, other->sym_sizes());
    }
    type = at::promote_types(type, other->scalar_type());
  }
  TORCH_CHECK_TYPE(at::isFloatingType(type), op, ": expected input or target of a floating dtype, got ",
                   input.scalar_type(), " and ", target.scalar_type());
  check_pointwise_options(op, shape, input, mask, options);
  check_no_grad(op, "normalizer", options.normalizer);
  const auto prepare = [&](const Tensor& tensor) {
    const auto converted = tensor.scalar_type() == type ? tensor : tensor.to(type);
    return converted.sym_sizes().equals(shape) ? converted : converted.expand_symint(shape);
  };
  input = prepare(input);
  target = prepare(target);
  if (other) other = prepare(*other);
  check_floating(op, "input", input);
  return call;
}

void check_pointwise(const Tensor& input, const Tensor& target, const OptionalTensor& other, const OptionalTensor& mask,
                     const PointwiseOptions& options) {
  constexpr auto op = "_pointwise";
  pointwise_traits(options.loss);
  check_layout(op, "input", input);
  check_floating(op, "input", input);
  const auto check_alike = [&](const char* name, const Tensor& tensor) {
    check_beside(op, name, tensor, "input", input);
    TORCH_CHECK_TYPE(tensor.scalar_type() == input.scalar_type(), op, ": expected ", name, " of the input's dtype, ",
                     input.scalar_type(), ", got ", tensor.scalar_type());
    TORCH_CHECK(tensor.dim() == input.dim(), op, ": expected ", name, " of the input's rank, ", input.dim(), ", got ",
                tensor.dim());
  };
  check_alike("target", target);
  if (other) check_alike("other", *other);
  check_pointwise_options(op, input.sym_sizes(), input, mask, options);
}

bool checks_values() {
  const char* value = std::getenv("MASKED_LOSS_CHECK");
  return value != nullptr && std::string_view(value) == "1";
}

void check_normalizer_value(const char* op, double normalizer) {
  TORCH_CHECK_VALUE(!(normalizer < 0), op, ": expected normalizer of at least 0, got ", normalizer);
}

namespace {

at::DimVector position_of(std::int64_t element, at::IntArrayRef shape) {
  at::DimVector position(shape.size());
  for (auto d = static_cast<std::int64_t>(shape.size()) - 1; d >= 0; --d) {
    position[d] = element % shape[d];
    element /= shape[d];
  }
  return position;
}

}  // namespace

void throw_unfit(const PointwiseTraits& traits, double value, std::int64_t at, at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(false, traits.name, ": expected kept ", traits.requirement, ", got ", value, " at position ",
                    at::IntArrayRef(position_of(at, shape)));
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

namespace {

void check_fill(const char* op, const Tensor& input, const Tensor& mask, const Tensor* value) {
  check_layout(op, "input", input);
  check_beside(op, "mask", mask, "input", input);
  check_mask_dtype(op, "mask", mask, "");
  if (value != nullptr) {
    check_layout(op, "value", *value);
    TORCH_CHECK(value->dim() == 0, op, ": expected value to be a number or a 0-d tensor, got shape ",
                value->sym_sizes());
    TORCH_CHECK(!value->is_complex() || input.is_complex() || input.scalar_type() == at::kBool, op,
                ": expected value that input's dtype, ", input.scalar_type(), ", can hold, got ", value->scalar_type());
    TORCH_CHECK(value->device() == input.device() || value->is_cpu(), op, ": expected value on the device of input, ",
                input.device(), ", or on the CPU, got ", value->device());
  }
}

}  // namespace

void check_masked_fill(const Tensor& input, const Tensor& mask, const Tensor* value) {
  check_fill("masked_fill", input, mask, value);
  check_trailing("masked_fill", "mask", "input", input.sym_sizes(), mask.sym_sizes(), /*both=*/true);
}

void check_masked_fill_(const Tensor& input, const Tensor& mask, const Tensor* value) {
  constexpr auto op = "masked_fill_";
  check_fill(op, input, mask, value);
  check_trailing(op, "mask", "input", input.sym_sizes(), mask.sym_sizes());
}

void check_memory_overlap(const Tensor& input, const Tensor& mask) {
  constexpr auto op = "masked_fill_";
  TORCH_CHECK(at::has_internal_overlap(input) != at::MemOverlap::Yes, op,
              ": expected input whose elements do not share memory, got sizes ", input.sizes(), " and strides ",
              input.strides(), "; clone() it first");
  TORCH_CHECK(mask.is_same(input) || at::get_overlap_status(input, mask) != at::MemOverlapStatus::Partial, op,
              ": expected mask that does not share memory with input, got a partial overlap; clone() the mask first");
}

Tensor broadcast_to_mask(const Tensor& input, const Tensor& mask) {
  return input.expand_symint(at::infer_size_symdimvector(input.sym_sizes(), mask.sym_sizes()));
}

namespace {

// Dimensions as numbers that are not negative; none: all. A 0-d tensor has one, as in torch.
at::DimVector wrapped_dims(const char* op, at::IntArrayRef dim, std::int64_t rank) {
  const auto dims = std::max<std::int64_t>(rank, 1);
  at::DimVector result;
  for (const auto d : dim) {
    TORCH_CHECK_INDEX(d >= -dims && d < dims, op, ": expected dim in [", -dims, ", ", dims - 1, "], got ", d);
    const auto wrapped = d < 0 ? d + dims : d;
    TORCH_CHECK(std::find(result.begin(), result.end(), wrapped) == result.end(), op,
                ": expected dim to name each dimension once, got ", dim);
    result.push_back(wrapped);
  }
  return dim.empty() ? every_dim(dims) : result;
}

void check_kept(const char* op, const Tensor& input, const OptionalTensor& mask) {
  check_layout(op, "input", input);
  if (!mask) return;
  check_beside(op, "mask", *mask, "input", input);
  check_mask_dtype(op, "mask", *mask, "; what is added to the logits is no mask");
  check_trailing(op, "mask", "input", input.sym_sizes(), mask->sym_sizes());
}

// As torch's softmax and logsumexp under autocast: in float32, but on the CPU.
at::ScalarType softmax_type(const char* op, const Tensor& input, std::optional<at::ScalarType> dtype) {
  if (dtype) return *dtype;
  const auto type = input.scalar_type();
  // torch's logsumexp alone takes integers.
  if (std::string_view(op) == Logsumexp::op && at::isIntegralType(type, /*includeBool=*/true)) {
    return at::get_default_dtype_as_scalartype();
  }
  return input.is_cpu() ? type : result_type(input);
}

}  // namespace

at::DimVector check_softmax(const char* op, const Tensor& input, const OptionalTensor& mask, at::IntArrayRef dim,
                            bool causal) {
  check_kept(op, input, mask);
  check_floating(op, "input", input);
  const auto dims = wrapped_dims(op, dim, input.dim());
  TORCH_CHECK(!causal || input.dim() >= 2, op, ": expected input of rank 2 or more with causal, got shape ",
              input.sym_sizes());
  TORCH_CHECK_VALUE(!causal || (dims.size() == 1 && dims[0] == input.dim() - 1), op,
                    ": expected dim to be the last one with causal, got ", dim);
  return dims;
}

void check_softmax_grad(const char* op, const Tensor& grad, const Tensor& result) {
  check_beside(op, "grad", grad, "result", result);
  TORCH_CHECK(grad.sizes() == result.sizes() && grad.scalar_type() == result.scalar_type(), op,
              ": expected grad of the result's shape and dtype, ", result.sizes(), " ", result.scalar_type(), ", got ",
              grad.sizes(), " ", grad.scalar_type());
}

Tensor resolve_softmax(const char* op, const Tensor& input, const OptionalTensor& mask, at::IntArrayRef dim,
                       bool causal, std::optional<at::ScalarType> dtype) {
  check_layout(op, "input", input);
  TORCH_CHECK_TYPE(!input.is_complex(), op, ": expected real input, got ", input.scalar_type());
  TORCH_CHECK_TYPE(!dtype || at::isFloatingType(*dtype), op, ": expected a floating dtype, got ",
                   dtype.value_or(at::kFloat));
  const auto type = softmax_type(op, input, dtype);
  const auto converted = type == input.scalar_type() ? input : input.to(type);
  check_softmax(op, converted, mask, dim, causal);
  return converted;
}

Tensor resolve_reduction(const char* op, const Tensor& input, const OptionalTensor& mask, at::IntArrayRef dim) {
  check_kept(op, input, mask);
  wrapped_dims(op, dim, input.dim());
  TORCH_CHECK_TYPE(!input.is_complex(), op, ": expected real input, got ", input.scalar_type());
  // torch's sum alone takes integers, and alone is float32 under autocast, but on the CPU.
  if (std::string_view(op) != MaskedSum::op) {
    check_floating(op, "input", input);
    return input;
  }
  if (!at::isIntegralType(input.scalar_type(), /*includeBool=*/true)) check_floating(op, "input", input);
  return input.is_cpu() ? input : input.to(result_type(input));
}

at::DimVector check_moments(const Tensor& input, const OptionalTensor& mask, std::int64_t order, at::IntArrayRef dim) {
  constexpr auto op = "_masked_moments";
  check_kept(op, input, mask);
  TORCH_CHECK_VALUE(order == 1 || order == 2, op, ": expected order to be 1 or 2, got ", order);
  return wrapped_dims(op, dim, input.dim());
}

void check_spread(const Tensor& scale, const OptionalTensor& input, const OptionalTensor& mean,
                  const OptionalTensor& offset, const OptionalTensor& mask, c10::SymIntArrayRef sizes,
                  at::ScalarType type) {
  constexpr auto op = "_masked_spread";
  TORCH_CHECK(input.has_value() == mean.has_value(), op, ": expected input and mean, or neither, got one");
  check_trailing(op, "scale", "sizes", sizes, scale.sym_sizes());
  if (mean) check_trailing(op, "mean", "sizes", sizes, mean->sym_sizes());
  if (offset) check_trailing(op, "offset", "sizes", sizes, offset->sym_sizes());
  if (mask) check_trailing(op, "mask", "sizes", sizes, mask->sym_sizes());
}

at::DimVector every_dim(std::int64_t rank) {
  at::DimVector dims(rank);
  std::iota(dims.begin(), dims.end(), 0);
  return dims;
}

void check_integers(const char* op, const char* name, const Tensor& tensor) {
  check_layout(op, name, tensor);
  TORCH_CHECK_TYPE(at::isIntegralType(tensor.scalar_type(), /*includeBool=*/false), op, ": expected ", name,
                   " of an integer dtype, got ", tensor.scalar_type());
}

void check_not_negative(const char* op, const char* name, const c10::SymInt& value) {
  if (const auto number = value.maybe_as_int()) {
    TORCH_CHECK_VALUE(*number >= 0, op, ": expected ", name, " of at least 0, got ", *number);
  }
}

bool is_differentiated(const OptionalTensor& tensor) {
  if (!tensor) return false;
  // A batch of vmap's hides what it wraps.
  if (const auto* batched = at::functorch::maybeGetBatchedImpl(*tensor)) return is_differentiated(batched->value());
  return (tensor->requires_grad() && at::GradMode::is_enabled()) || tensor->_fw_grad(/*level=*/0).defined();
}

at::ScalarType accumulation_type(at::ScalarType type) { return type == at::kDouble ? at::kDouble : at::kFloat; }

at::ScalarType loss_normalizer_type(const LossNormalizerOptions& options) {
  const auto is_double = [](const OptionalTensor& weight) { return weight && weight->scalar_type() == at::kDouble; };
  return is_double(options.weight) || is_double(options.sample_weight) ? at::kDouble : at::kFloat;
}

at::ScalarType result_type(const Tensor& input) { return result_type(input, input.scalar_type()); }

at::ScalarType result_type(const Tensor& input, at::ScalarType type) {
  const bool half = type == at::kHalf || type == at::kBFloat16;
  const auto device = input.device().type();
  const bool autocast = at::autocast::is_autocast_available(device) && at::autocast::is_autocast_enabled(device);
  return half && autocast ? at::kFloat : type;
}

at::ScalarType cross_entropy_type(const Tensor& input, const Tensor& target) {
  const auto type = input.scalar_type();
  return target.is_floating_point() ? at::promoteTypes(type, target.scalar_type()) : type;
}

std::pair<Tensor, Tensor> in_one_dtype(const Tensor& input, const Tensor& target) {
  if (!target.is_floating_point()) return {input, target};
  const auto type = cross_entropy_type(input, target);
  return {input.to(type), target.to(type)};
}

}  // namespace masked_loss
