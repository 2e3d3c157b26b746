#pragma once

#include <masked_loss/export.h>

namespace masked_loss {

// Releases the unused CPU memory that the library caches for large outputs: at most 4 blocks, and in total at most
// MASKED_LOSS_CACHE_BYTES (an environment variable, by default 1 GiB).
MASKED_LOSS_API void empty_cache();

}  // namespace masked_loss
