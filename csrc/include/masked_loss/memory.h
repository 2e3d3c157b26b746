#pragma once

#include <masked_loss/export.h>

namespace masked_loss {

// Releases all unoccupied memory that the library keeps on the CPU for its next large outputs (at most 4 blocks, and
// MASKED_LOSS_CACHE_BYTES in all, by default 1 GiB), so that other allocations can use it.
MASKED_LOSS_API void empty_cache();

}  // namespace masked_loss
