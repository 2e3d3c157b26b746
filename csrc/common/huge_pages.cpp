#include "common/huge_pages.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#if defined(__linux__)
#include <ATen/EmptyTensor.h>
#include <c10/core/CPUAllocator.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <string_view>
#include <vector>
#endif

namespace masked_loss {

#if defined(__linux__)
namespace {

constexpr std::size_t kPage = 4096, kHugePage = 2 << 20;
constexpr std::size_t kLarge = 2 * kHugePage;  // bytes from where on an output is large
constexpr std::size_t kMostKept = 4;           // freed blocks

struct Block {
  char* data;
  std::size_t bytes;
};

class HugePages final : public c10::Allocator {
 public:
  c10::DataPtr allocate(std::size_t bytes) override {
    Block block = take_kept(bytes);
    if (block.data == nullptr) block = map(bytes);
    if (block.data == nullptr) return c10::GetDefaultCPUAllocator()->allocate(bytes);
    c10::profiledCPUMemoryReporter().New(block.data, block.bytes);
    return {block.data, new Block(block), &release, at::kCPU};
  }

  void copy_data(void* to, const void* from, std::size_t bytes) const override { default_copy_data(to, from, bytes); }

  // Never destroyed: tensors may outlive static variables.
  static HugePages& get() {
    static auto* allocator = new HugePages;
    return *allocator;
  }

 private:
  static bool is_smaller(const Block& a, const Block& b) { return a.bytes < b.bytes; }

  // The smallest that is large enough, but no more than twice that. Where all are too small, the largest goes: a larger
  // one is about to replace it.
  Block take_kept(std::size_t bytes) {
    const std::lock_guard lock(mutex_);
    auto found = std::find_if(kept_.begin(), kept_.end(), [&](const Block& block) { return block.bytes >= bytes; });
    const bool fits = found != kept_.end();
    if (fits && found->bytes / 2 > bytes) return {nullptr, 0};
    if (!fits && !kept_.empty()) found = kept_.end() - 1;
    if (found == kept_.end()) return {nullptr, 0};
    const Block block = *found;
    kept_.erase(found);
    if (fits) return block;
    munmap(block.data, block.bytes);
    return {nullptr, 0};
  }

  static Block map(std::size_t bytes) {
    bytes = (bytes + kPage - 1) / kPage * kPage;
    const auto size = bytes + kHugePage;
    void* data = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) return {nullptr, 0};
    const auto begin = reinterpret_cast<std::uintptr_t>(data);
    const auto unused = (kHugePage - begin % kHugePage) % kHugePage;
    char* aligned = static_cast<char*>(data) + unused;
    if (unused > 0) munmap(data, unused);
    munmap(aligned + bytes, kHugePage - unused);
    madvise(aligned, bytes, MADV_HUGEPAGE);
    return {aligned, bytes};
  }

  static void release(void* context) {
    const Block block = *static_cast<Block*>(context);
    delete static_cast<Block*>(context);
    c10::profiledCPUMemoryReporter().Delete(block.data);
    get().keep(block);
  }

  // `kept_` is sorted by size.
  void keep(const Block& block) {
    if (madvise(block.data, block.bytes, MADV_FREE) != 0) {
      munmap(block.data, block.bytes);
      return;
    }
    const std::lock_guard lock(mutex_);
    kept_.insert(std::upper_bound(kept_.begin(), kept_.end(), block, is_smaller), block);
    if (kept_.size() <= kMostKept) return;
    munmap(kept_.front().data, kept_.front().bytes);
    kept_.erase(kept_.begin());
  }

  std::mutex mutex_;
  std::vector<Block> kept_;
};

bool uses_huge_pages(std::size_t bytes) {
  static const bool enabled = [] {
    const char* value = std::getenv("MASKED_LOSS_HUGE_PAGES");
    return value == nullptr || std::string_view(value) != "0";
  }();
  return enabled && bytes >= kLarge;
}

}  // namespace

at::Tensor empty_output(at::IntArrayRef sizes, at::ScalarType type) {
  if (!uses_huge_pages(c10::multiply_integers(sizes) * c10::elementSize(type))) return at::empty(sizes, type);
  return at::detail::empty_generic(sizes, &HugePages::get(), c10::DispatchKeySet(c10::DispatchKey::CPU), type,
                                   std::nullopt);
}

at::Tensor empty_output(const at::Tensor& like) {
  if (!uses_huge_pages(like.numel() * like.itemsize())) return at::empty_like(like);
  // Its strides, of a tensor without memory.
  const auto shape = at::empty_like(like, like.options().device(at::kMeta));
  return at::detail::empty_strided_generic(shape.sizes(), shape.strides(), &HugePages::get(),
                                           c10::DispatchKeySet(c10::DispatchKey::CPU), like.scalar_type());
}
#else
at::Tensor empty_output(at::IntArrayRef sizes, at::ScalarType type) { return at::empty(sizes, type); }

at::Tensor empty_output(const at::Tensor& like) { return at::empty_like(like); }
#endif

}  // namespace masked_loss
