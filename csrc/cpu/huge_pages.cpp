#include "cpu/huge_pages.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/CPUAllocator.h>
#include <masked_loss/memory.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <string_view>

namespace masked_loss {
namespace {

constexpr std::size_t kPage = 4096, kHugePage = 2 << 20;
constexpr std::size_t kLarge = 2 * kHugePage;  // bytes from where on an output is large

struct Block {
  char* data = nullptr;
  std::size_t bytes = 0;

  void unmap() const { munmap(data, bytes); }
};

// The bytes that are kept at most. As torch does with its own variables, what is no number is ignored with a warning.
std::size_t most_bytes() {
  constexpr auto variable = "MASKED_LOSS_CACHE_BYTES";
  constexpr std::size_t by_default = std::size_t{1} << 30;
  const char* value = std::getenv(variable);
  if (value == nullptr) return by_default;
  const std::string_view text(value);
  std::size_t bytes = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), bytes);
  if (error == std::errc() && end == text.data() + text.size()) return bytes;
  TORCH_WARN("Ignoring invalid value for ", variable, ": ", text, ", expected a number of bytes.");
  return by_default;
}

// Freed blocks. Whoever does not get the lock at once does without them, as it may be held for ever: a fork copies it
// as it is, but not the thread that holds it. Nothing is mapped or unmapped under it.
class Kept {
 public:
  // The smallest that is large enough, but no more than twice that; or none.
  Block take(std::size_t bytes) {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock) return {};
    std::size_t found = count_;
    for (std::size_t i = 0; i < count_; ++i) {
      const bool fits = blocks_[i].bytes >= bytes && blocks_[i].bytes / 2 <= bytes;
      if (fits && (found == count_ || blocks_[i].bytes < blocks_[found].bytes)) found = i;
    }
    if (found == count_) return {};
    const Block block = blocks_[found];
    remove(found);
    return block;
  }

  // In the place of those that were freed first. Nothing here can throw: this is what deletes a tensor.
  void put(const Block& block) noexcept {
    std::array<Block, kMost + 1> released{block};
    std::size_t releases = 1;
    if (block.bytes <= most_bytes_ && madvise(block.data, block.bytes, MADV_FREE) == 0) {
      const std::unique_lock lock(mutex_, std::try_to_lock);
      if (lock) {
        for (releases = 0; count_ == kMost || bytes_ > most_bytes_ - block.bytes; remove(0)) {
          released[releases++] = blocks_[0];
        }
        blocks_[count_++] = block;
        bytes_ += block.bytes;
      }
    }
    for (std::size_t i = 0; i < releases; ++i) released[i].unmap();
  }

  // Waits for the lock, which another thread holds no longer than a few comparisons take.
  void release() {
    std::array<Block, kMost> released;
    std::size_t releases = 0;
    {
      const std::unique_lock lock(mutex_, std::chrono::milliseconds(100));
      if (!lock) return;
      released = blocks_;
      std::swap(releases, count_);
      bytes_ = 0;
    }
    for (std::size_t i = 0; i < releases; ++i) released[i].unmap();
  }

 private:
  static constexpr std::size_t kMost = 4;

  void remove(std::size_t i) {
    bytes_ -= blocks_[i].bytes;
    std::move(blocks_.begin() + i + 1, blocks_.begin() + count_--, blocks_.begin() + i);
  }

  const std::size_t most_bytes_ = most_bytes();
  std::timed_mutex mutex_;
  std::array<Block, kMost> blocks_;  // in the order in which they were freed
  std::size_t count_ = 0, bytes_ = 0;
};

class HugePages final : public c10::Allocator {
 public:
  c10::DataPtr allocate(std::size_t bytes) override {
    auto block = std::make_unique<Block>(kept_.take(bytes));
    if (block->data == nullptr) *block = map(bytes);
    if (block->data == nullptr) {
      // What is kept counts in a limit on the size of the process.
      kept_.release();
      *block = map(bytes);
    }
    if (block->data == nullptr) return c10::GetDefaultCPUAllocator()->allocate(bytes);
    c10::profiledCPUMemoryReporter().New(block->data, block->bytes);
    char* data = block->data;
    return {data, block.release(), &free, at::kCPU};
  }

  void copy_data(void* to, const void* from, std::size_t bytes) const override { default_copy_data(to, from, bytes); }

  void empty_cache() { kept_.release(); }

  // Never destroyed: tensors may outlive static variables.
  static HugePages& get() {
    static auto* allocator = new HugePages;
    return *allocator;
  }

 private:
  static Block map(std::size_t bytes) {
    bytes = (bytes + kPage - 1) / kPage * kPage;
    const auto size = bytes + kHugePage;
    void* data = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) return {};
    const auto begin = reinterpret_cast<std::uintptr_t>(data);
    const auto unused = (kHugePage - begin % kHugePage) % kHugePage;
    char* aligned = static_cast<char*>(data) + unused;
    if (unused > 0) munmap(data, unused);
    munmap(aligned + bytes, kHugePage - unused);
    madvise(aligned, bytes, MADV_HUGEPAGE);
    return {aligned, bytes};
  }

  static void free(void* context) {
    const std::unique_ptr<Block> block(static_cast<Block*>(context));
    c10::profiledCPUMemoryReporter().Delete(block->data);
    get().kept_.put(*block);
  }

  Kept kept_;
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

void empty_cache() { HugePages::get().empty_cache(); }

}  // namespace masked_loss
