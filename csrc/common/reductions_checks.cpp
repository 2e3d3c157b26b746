#include "argument_checks.h"

#include <string_view>

namespace masked_loss {

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
  TORCH_CHECK_TYPE(at::isFloatingType(type), op, ": expected a floating dtype, got ", type);
  const auto check = [&](const char* name, const OptionalTensor& tensor) {
    if (!tensor) return;
    check_beside(op, name, *tensor, "scale", scale);
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
