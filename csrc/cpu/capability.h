#pragma once

#include <ATen/Version.h>

#include <cstdint>

namespace masked_loss::cpu {

inline constexpr std::int64_t kPastCache = 1 << 23;  // bytes; a larger output is stored past the cache

}  // namespace masked_loss::cpu

// A kernel file is compiled once for every instruction set, into a namespace named after it.
#if defined(MASKED_LOSS_VECTORS)
#define MASKED_LOSS_KERNELS(declaration) \
  namespace DEFAULT {                    \
  declaration;                           \
  }                                      \
  namespace AVX2 {                       \
  declaration;                           \
  }                                      \
  namespace AVX512 {                     \
  declaration;                           \
  }
#define MASKED_LOSS_PICK(function)                           \
  (at::get_cpu_capability() == "AVX512" ? AVX512::function() \
   : at::get_cpu_capability() == "AVX2" ? AVX2::function()   \
                                        : DEFAULT::function())
#else
#define MASKED_LOSS_KERNELS(declaration) \
  namespace DEFAULT {                    \
  declaration;                           \
  }
#define MASKED_LOSS_PICK(function) DEFAULT::function()
#endif
