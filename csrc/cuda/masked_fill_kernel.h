#pragma once

#include <cuda_runtime_api.h>

#include "common/rows.h"

namespace masked_loss::cuda {

// Lines of `length` elements, of so many bytes each, contiguous in out and in; the mask, one byte an element
// (nonzero = fill), contiguous too, or one for the line. With a length of 1 elements lie anywhere.
struct MaskedFillWork {
  Rows<3> lines;  // offsets of out, in and mask, in elements
  std::int64_t length;
  bool shared_mask;  // one for the line
  int element_bytes;
  void* out;
  const void* in;  // null: in place
  const unsigned char* mask;
  std::uint64_t value[2];    // the bits of an element, at the front
  const void* device_value;  // where they lie on the device, or null
};

void masked_fill(const MaskedFillWork& work, int multiprocessors, cudaStream_t stream);

}  // namespace masked_loss::cuda
