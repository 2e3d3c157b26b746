#include "masked_fill.h"

#include <ATen/Dispatch_v2.h>
#include <ATen/ops/ne.h>

#include <cstring>

namespace masked_loss {

Bits16 element_bits(const char* op, const at::Scalar& value, const at::Tensor& input) {
  Bits16 bits{};
  const auto take = [&] {
    AT_DISPATCH_V2(input.scalar_type(), "masked_fill", AT_WRAP([&] {
                     const auto element = value.to<scalar_t>();
                     std::memcpy(&bits, &element, sizeof(element));
                   }),
                   AT_EXPAND(AT_ALL_TYPES_AND_COMPLEX), AT_EXPAND(AT_BAREBONES_UNSIGNED_TYPES),
                   AT_EXPAND(AT_FLOAT8_TYPES), at::kBool, at::kHalf, at::kBFloat16, at::kComplexHalf);
  };
  try {
    take();
  } catch (const c10::NotImplementedError&) {
    TORCH_CHECK_TYPE(false, op, ": expected input of a dtype whose elements can be filled, got ", input.scalar_type());
  } catch (const std::exception&) {
    TORCH_CHECK(false, op, ": expected value that input's dtype, ", input.scalar_type(), ", can hold, got ", value);
  }
  return bits;
}

at::Tensor byte_mask(const at::Tensor& mask) { return mask.itemsize() == 1 ? mask : mask.ne(0); }

}  // namespace masked_loss
