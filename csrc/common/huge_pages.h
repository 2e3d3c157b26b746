#pragma once

#include <ATen/core/Tensor.h>

namespace masked_loss {

// Uninitialised memory for an output on the CPU: of these sizes, or with the strides too that at::empty_like gives it.
//
// Of a large output, fresh pages cost several times what its values do. So it lies on huge pages, and what is freed is
// kept for the next one, lent to the kernel (MADV_FREE), which takes it back when memory is short. At most 4 blocks are
// kept, and MASKED_LOSS_CACHE_BYTES in all (1 GiB where the environment does not say), until empty_cache() releases
// them. MASKED_LOSS_HUGE_PAGES=0 in the environment leaves all of it to torch's allocator.
at::Tensor empty_output(at::IntArrayRef sizes, at::ScalarType type);
at::Tensor empty_output(const at::Tensor& like);

}  // namespace masked_loss
