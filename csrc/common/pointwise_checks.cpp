#include "pointwise_ops.h"

#include <ATen/ExpandUtils.h>
#include <ATen/ops/result_type.h>

#include <cmath>

namespace masked_loss {

namespace {

void check_pointwise_options(const char* op, c10::SymIntArrayRef shape, const Tensor& input, const OptionalTensor& mask,
                             const PointwiseOptions& options) {
  const auto& [reduction, loss, weight, sample_weight, normalizer, numbers] = options;
  const auto number = static_cast<std::int64_t>(reduction);
  TORCH_CHECK_VALUE(number >= 0 && number <= static_cast<std::int64_t>(Reduction::BatchMean), op,
                    ": expected reduction to be 0 'none', 1 'mean', 2 'sum', 3 'sequence_mean' or 4 'batchmean', got ",
                    number);
  constexpr auto of = "the loss";
  if (mask) {
    check_device(op, "mask", *mask, "input", input);
    check_mask_dtype(op, "mask", *mask, "; weights of the elements are passed as sample_weight=");
    check_broadcast(op, "mask", *mask, shape, of);
  }
  if (sample_weight) {
    check_device(op, "sample_weight", *sample_weight, "input", input);
    check_weight_dtype(op, "sample_weight", *sample_weight, "; what says which elements count is passed as mask=");
    check_broadcast(op, "sample_weight", *sample_weight, shape, of);
  }
  if (weight) {
    check_device(op, "weight", *weight, "input", input);
    check_weight_dtype(op, "weight", *weight, "");
    check_broadcast(op, "weight", *weight, shape, of);
  }
  check_normalizer(op, normalizer, reduction, input);
}

}  // namespace

PointwiseCall resolve_pointwise(PointwiseCall call) {
  const auto* op = call.op;
  auto& [name, input, target, other, mask, options, dtype] = call;
  const auto& traits = pointwise_traits(options.loss);
  check_layout(op, "input", input);
  check_device(op, "target", target, "input", input);
  TORCH_CHECK_TYPE(!input.is_complex() && !target.is_complex(), op, ": expected real input and target, got ",
                   input.scalar_type(), " and ", target.scalar_type());
  auto type = at::result_type(input, target);
  const auto sizes = input.sym_sizes(), target_sizes = target.sym_sizes();
  c10::SymDimVector shape(sizes.begin(), sizes.end());
  if (traits.broadcasts_target) {
    check_trailing(op, "target", "input", sizes, target_sizes, /*both=*/true);
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
    const auto* other_name = traits.other_name();
    check_device(op, other_name, *other, "input", input);
    check_floating(op, other_name, *other);
    if (traits.has_other_slope) {
      // As torch: a variance for each element, or for each slice along the last dimension.
      if (static_cast<std::size_t>(other->dim()) + 1 == sizes.size()) other = other->unsqueeze(-1);
      check_broadcast(op, other_name, *other, shape, "input");
    } else {
      check_no_grad(op, other_name, other);
      check_trailing(op, "pos_weight", "target", shape, other->sym_sizes());
    }
    type = at::promoteTypes(type, other->scalar_type());
  }
  TORCH_CHECK_TYPE(at::isFloatingType(type), op, ": expected input or target of a floating dtype, got ",
                   input.scalar_type(), " and ", target.scalar_type());
  check_dtype(op, dtype);
  if (dtype == at::kDouble) type = at::kDouble;  // others are rounded from what the accumulation gives
  if (options.weight && traits.broadcasts_weight) {
    check_trailing(op, "weight", "target", shape, options.weight->sym_sizes());
    while (static_cast<std::size_t>(options.weight->dim()) < shape.size()) {
      options.weight = options.weight->unsqueeze(0);
    }
  }
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
    check_device(op, name, tensor, "input", input);
    TORCH_CHECK_TYPE(tensor.scalar_type() == input.scalar_type(), op, ": expected ", name, " of the input's dtype, ",
                     input.scalar_type(), ", got ", tensor.scalar_type());
    TORCH_CHECK(tensor.dim() == input.dim(), op, ": expected ", name, " of the input's rank, ", input.dim(), ", got ",
                tensor.dim());
  };
  check_alike("target", target);
  if (other) check_alike("other", *other);
  check_pointwise_options(op, input.sym_sizes(), input, mask, options);
}

void throw_outside_domain(const char* op, const char* name, const Domain& domain, double value, std::int64_t at,
                          at::IntArrayRef shape) {
  const auto range = std::isfinite(domain.most) ? c10::str(" in [", domain.least, ", ", domain.most, "]")
                                                : c10::str(" of at least ", domain.least);
  TORCH_CHECK_VALUE(false, op, ": expected kept ", name, range, ", got ", value, " at position ",
                    at::IntArrayRef(position_of(at, shape)));
}

}  // namespace masked_loss
