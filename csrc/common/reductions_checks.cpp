#include "reductions_ops.h"

#include <string_view>

namespace masked_loss {

namespace {

void check_reduced(const char* op, const Tensor& input, const OptionalTensor& mask) {
  check_layout(op, "input", input);
  if (!mask) return;
  check_device(op, "mask", *mask, "input", input);
  check_mask_dtype(op, "mask", *mask, "; a mean by weights is masked_sum(input * weights) / masked_sum(weights)");
  check_broadcast(op, "mask", *mask, input.sym_sizes(), "input");
}

bool is_integral(at::ScalarType type) { return at::isIntegralType(type, /*includeBool=*/true); }

bool is_wide(at::ScalarType type) { return accumulation_type(type) == at::kDouble; }

}  // namespace

ResolvedReduction resolve_reduction(const char* op, const Tensor& input, const OptionalTensor& mask,
                                    at::IntArrayRef dim, std::optional<at::ScalarType> dtype) {
  check_reduced(op, input, mask);
  check_mask_values(op, "mask", mask);  // in the op's name; compiled calls have it in that of the inner one
  wrapped_dims(op, dim, input.dim());
  const auto given = input.scalar_type();
  TORCH_CHECK_TYPE(!input.is_complex(), op, ": expected real input, got ", given);
  const bool is_sum = std::string_view(op) == MaskedSum::name, is_mean = std::string_view(op) == MaskedMean::name;
  if (!is_integral(given) || !(is_sum || is_mean)) check_floating(op, "input", input);
  if (!is_sum || !dtype || !is_integral(*dtype)) check_dtype(op, dtype);  // torch's sum alone is of integers too
  // torch's sum alone takes integers, and alone is float32 under autocast, but on the CPU.
  const auto type = dtype                       ? *dtype
                    : is_integral(given)        ? (is_sum ? at::kLong : at::get_default_dtype_as_scalartype())
                    : is_sum && !input.is_cpu() ? result_type(input, given)
                                                : given;
  // As torch: elements become integers before they are added, and double is exact only from the elements on.
  if (is_integral(type)) return {is_integral(given) && type != at::kBool ? input : input.to(type), type};
  const bool widened = is_wide(type) && given != at::kDouble && !(is_sum && is_integral(given));
  return {widened ? input.to(at::kDouble) : input, type};
}

at::DimVector check_moments(const Tensor& input, const OptionalTensor& mask, std::int64_t order, at::IntArrayRef dim) {
  constexpr auto op = "_masked_moments";
  check_reduced(op, input, mask);
  TORCH_CHECK_VALUE(order >= 0 && order <= 2, op, ": expected order in [0, 2], got ", order);
  return wrapped_dims(op, dim, input.dim());
}

void check_affine(const Tensor& scale, const OptionalTensor& input, const OptionalTensor& mean,
                  const OptionalTensor& offset, const OptionalTensor& mask, c10::SymIntArrayRef sizes,
                  at::ScalarType type) {
  constexpr auto op = "_masked_affine";
  TORCH_CHECK(input.has_value() == mean.has_value(), op, ": expected input and mean, or neither, got one");
  TORCH_CHECK_TYPE(at::isFloatingType(type), op, ": expected a floating dtype, got ", type);
  const auto check = [&](const char* name, const OptionalTensor& tensor) {
    if (!tensor) return;
    check_device(op, name, *tensor, "scale", scale);
    check_trailing(op, name, "sizes", sizes, tensor->sym_sizes());
  };
  check("scale", scale);
  check("input", input);
  check("mean", mean);
  check("offset", offset);
  check("mask", mask);
  if (mask) check_mask_dtype(op, "mask", *mask, "");
}

}  // namespace masked_loss
