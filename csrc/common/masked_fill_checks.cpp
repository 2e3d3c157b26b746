#include "argument_checks.h"

#include <ATen/ExpandUtils.h>
#include <ATen/MemoryOverlap.h>

namespace masked_loss {

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

}  // namespace masked_loss
