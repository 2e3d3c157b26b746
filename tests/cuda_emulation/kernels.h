// What the tests of kernels share: buffers, rows, and dtypes as numbers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <limits>
#include <random>
#include <vector>

#include "common/rows.h"
#include "cuda_emulation.h"

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

inline double number(double x) { return x; }
inline double number(__nv_bfloat16 x) { return __bfloat162float(x); }
inline double number(__half x) { return __half2float(x); }

template <class T>
T element(double x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16(float(x));
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half(float(x));
  } else {
    return T(x);
  }
}

// Of a mask: whatever is not 0 keeps. 0 and 1 are only the most common ones.
template <class Random>
std::uint8_t mask_byte(bool keep, Random& random) {
  constexpr std::uint8_t kept[] = {1, 2, 128, 254, 255};
  return keep ? kept[random() % std::size(kept)] : 0;
}

template <class T>
constexpr double kRounding = std::is_same_v<T, double>          ? 1e-13
                             : std::is_same_v<T, float>         ? 2e-6
                             : std::is_same_v<T, __nv_bfloat16> ? 1.0 / 256
                                                                : 1.0 / 2048;

// One or two dimensions of rows, with the strides of each operand.
template <int Operands>
Rows<Operands> make_rows(std::vector<std::int64_t> sizes, std::vector<std::vector<std::int64_t>> strides) {
  Rows<Operands> rows;
  rows.dims = int(sizes.size());
  for (int d = 0; d < rows.dims; ++d) {
    rows.count *= sizes[d];
    rows.sizes[d] = sizes[d];
    if (sizes[d] > 0) rows.by_size[d] = Quotient(sizes[d]);
    for (int k = 0; k < Operands; ++k) rows.strides[k][d] = strides[k].empty() ? 0 : strides[k][d];
  }
  return rows;
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
