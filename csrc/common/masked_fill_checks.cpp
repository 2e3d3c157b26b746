#include <ATen/Dispatch_v2.h>
#include <ATen/ExpandUtils.h>
#include <ATen/MemoryOverlap.h>

#include <cstring>

#include "masked_fill_ops.h"

namespace masked_loss {

namespace {

void check_fill(const char* op, const Tensor& input, const Tensor& mask, const Tensor* value) {
  check_layout(op, "input", input);
  check_device(op, "mask", mask, "input", input);
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

Bits16 element_bits(const char* op, const at::Scalar& value, const Tensor& input) {
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

Tensor broadcast_to_mask(const Tensor& input, const Tensor& mask) {
  return input.expand_symint(at::infer_size_symdimvector(input.sym_sizes(), mask.sym_sizes()));
}

}  // namespace masked_loss
