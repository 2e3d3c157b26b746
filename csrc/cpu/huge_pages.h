#pragma once

#include <ATen/core/Tensor.h>

namespace masked_loss {

// Uninitialised memory for an output on the CPU: of these sizes, or with the strides too that at::empty_like gives it.
//
// Fresh pages of a large output cost several times what its values do. Large outputs are therefore allocated on huge
// pages. Freed blocks are cached for reuse and marked MADV_FREE, so Linux may reclaim their pages. At most 4 blocks are
// cached, and MASKED_LOSS_CACHE_BYTES in all (1 GiB by default), until empty_cache() releases them. With
// MASKED_LOSS_HUGE_PAGES=0 in the environment torch's allocator serves all outputs.
at::Tensor empty_output(at::IntArrayRef sizes, at::ScalarType type);
at::Tensor empty_output(const at::Tensor& like);

}  // namespace masked_loss
