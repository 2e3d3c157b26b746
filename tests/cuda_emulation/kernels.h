// What the tests of kernels share: buffers, mask bytes, schedules.
#pragma once

#include <gtest/gtest.h>

#include <cstdlib>
#include <limits>
#include <random>
#include <vector>

#include "cuda_emulation.h"
#include "numbers.h"

namespace masked_loss::cuda::test {

// `size` elements that begin so many elements behind a multiple of 16 bytes, and nothing behind them: an address
// sanitizer sees the very end.
template <class T>
class Buffer {
 public:
  explicit Buffer(std::size_t size, std::size_t shift = 0) : size_(size), shift_(shift) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 16, std::max<std::size_t>(1, (size + shift) * sizeof(T))) != 0) std::abort();
    memory_.reset(static_cast<T*>(memory));
    std::fill_n(memory_.get(), size + shift, T{});
  }
  T* data() { return memory_.get() + shift_; }
  T& operator[](std::size_t i) { return data()[i]; }
  std::size_t size() const { return size_; }
  T* begin() { return data(); }
  T* end() { return data() + size_; }

 private:
  std::size_t size_, shift_;
  std::unique_ptr<T, void (*)(void*)> memory_{nullptr, std::free};
};

// Of a mask: whatever is not 0 keeps. 0 and 1 are only the most common ones.
template <class Random>
std::uint8_t mask_byte(bool keep, Random& random) {
  constexpr std::uint8_t kept[] = {1, 2, 128, 254, 255};
  return keep ? kept[random() % std::size(kept)] : 0;
}

// Runs in the order of the threads, and in random ones with blocks interleaved.
template <class Body>
void with_schedules(int random_ones, const Body& body) {
  for (int seed = 0; seed <= random_ones; ++seed) {
    SCOPED_TRACE("schedule " + std::to_string(seed));
    emulation::schedule.set(seed, seed == 0 ? 1 : 3);
    body();
    if (::testing::Test::HasFailure()) return;
  }
}

// The sizes of the racecheck: TSAN takes an order of magnitude longer.
#ifdef __SANITIZE_THREAD__
constexpr bool kShort = true;
#else
constexpr bool kShort = false;
#endif

}  // namespace masked_loss::cuda::test
