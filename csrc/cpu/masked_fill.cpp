#include <ATen/TensorIterator.h>
#include <ATen/ops/ne.h>
#include <torch/library.h>

#include "common/masked_fill_ops.h"
#include "cpu/huge_pages.h"
#include "cpu/masked_fill_kernel.h"

namespace masked_loss::cpu {
namespace {

const MaskedFillKernel& kernel_of(const Tensor& input) {
  static const auto& kernels = MASKED_LOSS_PICK(masked_fill_kernels);
  return kernels.of(input.itemsize());
}

Tensor masked_fill(const Tensor& input, const Tensor& mask, const at::Scalar& value) {
  check_masked_fill(input, mask, nullptr);
  check_mask_values("masked_fill", "mask", mask);
  const auto element = element_bits("masked_fill", value, input);
  const auto from = broadcast_to_mask(input, mask), bytes = byte_mask(mask);
  auto out = empty_output(from.sizes(), from.scalar_type());
  auto iterator = at::TensorIteratorConfig()
                      .set_check_mem_overlap(false)
                      .check_all_same_dtype(false)
                      .resize_outputs(false)
                      .add_output(out)
                      .add_const_input(from)
                      .add_const_input(bytes)
                      .build();
  const auto& kernel = kernel_of(input);
  const bool past_cache = static_cast<std::int64_t>(out.nbytes()) >= kPastCache;
  iterator.for_each([&](char** data, const std::int64_t* strides, std::int64_t n, std::int64_t lines) {
    for (std::int64_t i = 0; i < lines; ++i) {
      kernel.fill(data[0] + i * strides[3], data[1] + i * strides[4], data[2] + i * strides[5], strides, n, &element,
                  past_cache);
    }
  });
  return out;
}

void masked_fill_(Tensor& input, const Tensor& mask, const at::Scalar& value) {
  check_masked_fill_(input, mask, nullptr);
  check_memory_overlap(input, mask);
  check_mask_values("masked_fill_", "mask", mask);
  const auto element = element_bits("masked_fill_", value, input);
  // A mask in the input's own memory would change while it is read.
  const auto bytes = mask.is_alias_of(input) ? mask.ne(0) : byte_mask(mask);
  auto iterator = at::TensorIteratorConfig()
                      .set_check_mem_overlap(false)
                      .check_all_same_dtype(false)
                      .resize_outputs(false)
                      .add_output(input)
                      .add_const_input(bytes)
                      .build();
  const auto& kernel = kernel_of(input);
  const bool past_cache = static_cast<std::int64_t>(input.nbytes()) >= kPastCache;
  iterator.for_each([&](char** data, const std::int64_t* strides, std::int64_t n, std::int64_t lines) {
    for (std::int64_t i = 0; i < lines; ++i) {
      kernel.fill_(data[0] + i * strides[2], data[1] + i * strides[3], strides, n, &element, past_cache);
    }
  });
}

Tensor masked_fill_value(const Tensor& input, const Tensor& mask, const Tensor& value) {
  check_masked_fill(input, mask, &value);
  return cpu::masked_fill(input, mask, value.item());
}

void masked_fill_value_(Tensor& input, const Tensor& mask, const Tensor& value) {
  check_masked_fill_(input, mask, &value);
  cpu::masked_fill_(input, mask, value.item());
}

}  // namespace

TORCH_LIBRARY_IMPL(masked_loss, CPU, m) {
  impl<MaskedFill<at::Scalar>, masked_fill>(m);
  impl<MaskedFill<Tensor>, masked_fill_value>(m);
  impl<MaskedFill_<at::Scalar>, masked_fill_>(m);
  impl<MaskedFill_<Tensor>, masked_fill_value_>(m);
}

}  // namespace masked_loss::cpu
