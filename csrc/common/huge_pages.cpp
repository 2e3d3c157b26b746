#include "common/huge_pages.h"

#include <cstdint>
#include <cstdlib>
#include <string_view>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace masked_loss {

at::Tensor with_huge_pages(at::Tensor tensor) {
#if defined(__linux__)
  constexpr std::uintptr_t kHugePage = 2 << 20;
  static const bool enabled = [] {
    const char* value = std::getenv("MASKED_LOSS_HUGE_PAGES");
    return value == nullptr || std::string_view(value) != "0";
  }();
  const auto bytes = tensor.storage().nbytes();
  if (!enabled || bytes < 2 * kHugePage) return tensor;
  // Only pages that lie inside as a whole; neighbours in memory are not ours.
  const auto begin = reinterpret_cast<std::uintptr_t>(tensor.storage().data());
  const auto first = (begin + kHugePage - 1) / kHugePage * kHugePage, last = (begin + bytes) / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return tensor;
}

}  // namespace masked_loss
