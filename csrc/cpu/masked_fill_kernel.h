#pragma once

#include <cstdint>

#include "cpu/capability.h"

namespace masked_loss::cpu {

// Lines of n elements; strides in bytes, the mask one byte an element (nonzero = fill). `value` points to an element.
struct MaskedFillKernel {
  // out = mask ? value : in; strides of out, in, mask
  void (*fill)(char* out, const char* in, const char* mask, const std::int64_t* strides, std::int64_t n,
               const void* value, bool past_cache);
  // where mask: out = value, and nothing else is touched; strides of out, mask
  void (*fill_)(char* out, const char* mask, const std::int64_t* strides, std::int64_t n, const void* value,
                bool past_cache);
};

struct MaskedFillKernels {
  MaskedFillKernel of_bytes[5];  // 1, 2, 4, 8, 16

  const MaskedFillKernel& of(std::int64_t bytes) const {
    int index = 0;
    while ((std::int64_t{1} << index) < bytes) ++index;
    return of_bytes[index];
  }
};

MASKED_LOSS_KERNELS(const MaskedFillKernels& masked_fill_kernels());

}  // namespace masked_loss::cpu
