// A bench of the launchers of csrc/cuda, without torch. The same sources are compiled for the emulation, where shapes
// are small and nothing is timed: it proves the checks.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "cuda/device.cuh"
#include "numbers.h"

namespace masked_loss::cuda::bench {

#ifdef __CUDACC__
constexpr bool kEmulated = false;
inline void* allocate(std::size_t bytes) {
  void* memory = nullptr;
  check(cudaMalloc(&memory, bytes), "no memory on the device");
  return memory;
}
inline void release(void* memory) { cudaFree(memory); }
inline void copy(void* to, const void* from, std::size_t bytes) {
  check(cudaMemcpy(to, from, bytes, cudaMemcpyDefault), "a copy failed");
}
inline void set_bytes(void* memory, int value, std::size_t bytes) {
  check(cudaMemset(memory, value, bytes), "memory was not set");
}
#else
constexpr bool kEmulated = true;
inline void* allocate(std::size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 256, std::max<std::size_t>(bytes, 1)) != 0) std::abort();
  return memory;
}
inline void release(void* memory) { std::free(memory); }
inline void copy(void* to, const void* from, std::size_t bytes) { std::memcpy(to, from, bytes); }
inline void set_bytes(void* memory, int value, std::size_t bytes) { std::memset(memory, value, bytes); }
#endif

struct Machine {
  int multiprocessors = 3;
  cudaStream_t stream = nullptr;
};
inline Machine machine;

// On the device.
template <class T>
class Array {
 public:
  explicit Array(std::int64_t size = 0) : size_(size), memory_(allocate(std::size_t(size) * sizeof(T)), release) {}
  explicit Array(const std::vector<T>& values) : Array(std::int64_t(values.size())) {
    copy(data(), values.data(), values.size() * sizeof(T));
  }
  T* data() const { return static_cast<T*>(memory_.get()); }
  std::int64_t size() const { return size_; }
  std::vector<T> host(std::int64_t first, std::int64_t n) const {
    std::vector<T> values(static_cast<std::size_t>(n));
    copy(values.data(), data() + first, values.size() * sizeof(T));
    return values;
  }
  T host(std::int64_t i) const { return host(i, 1)[0]; }

 private:
  std::int64_t size_;
  std::shared_ptr<void> memory_;
};

// Large operands repeat the values of a table, whose size is prime: the host knows every element without a copy.
constexpr std::int64_t kPeriod = 16381;

template <class T>
__global__ void __launch_bounds__(256) repeat_values(T* to, std::int64_t n, const T* values) {
  const auto step = std::int64_t(gridDim.x) * blockDim.x;
  auto i = std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  auto at = static_cast<int>(i % kPeriod);
  for (const int by = static_cast<int>(step % kPeriod); i < n; i += step) {
    to[i] = values[at];
    at += by;
    if (at >= kPeriod) at -= kPeriod;
  }
}

template <class T>
class Repeated : public Array<T> {
 public:
  Repeated() = default;
  template <class Value>
  Repeated(std::int64_t size, const Value& value) : Array<T>(size), values_(kPeriod) {
    for (T& x : values_) x = value();
    const Array<T> table(values_);
    launch(repeat_values<T>,
           {unsigned(std::min(divide_up(size, 256), std::int64_t(machine.multiprocessors) * 16)), 256}, machine.stream,
           this->data(), size, table.data());
    table.host(0);  // until the kernel has read it
  }
  T operator[](std::int64_t i) const { return values_[std::size_t(i % kPeriod)]; }

 private:
  std::vector<T> values_;
};

// The same numbers in every run.
class Random {
 public:
  explicit Random(std::uint64_t seed = 1) : state_(seed * 0x9e3779b97f4a7c15u) {}
  std::uint32_t next() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return std::uint32_t(state_ >> 33);
  }
  double uniform(double from = 0, double to = 1) { return from + (to - from) * (next() + 0.5) / 2147483648.0; }
  // About normal.
  double normal(double deviation) {
    double sum = -6;
    for (int i = 0; i < 12; ++i) sum += uniform();
    return sum * deviation;
  }

 private:
  std::uint64_t state_;
};

// The largest error that was seen, in units of what is allowed.
class Errors {
 public:
  void compare(double actual, double expected, double allowed) {
    const bool same = actual == expected || (std::isnan(actual) && std::isnan(expected));
    const double error = same ? 0 : std::abs(actual - expected) / allowed;
    if (!(error <= worst_)) worst_ = std::isnan(error) ? std::numeric_limits<double>::infinity() : error;
  }
  double worst() const { return worst_; }

 private:
  double worst_ = 0;
};

struct Variant {
  std::string what;
  std::function<void(cudaStream_t)> call;
};

// Memory that a call writes. It is set to NaN before, so that all of it has to be written, but what is changed in
// place.
struct Result {
  void* memory;
  std::size_t bytes;
  bool in_place = false;
};

// What a case has made: a call of launchers, how many bytes it has to move at least, and what has come of it.
struct Job {
  double bytes;
  std::function<void(cudaStream_t)> call;
  std::function<double()> error;  // of a sample against float64, in units of what is allowed
  std::vector<Result> results;
  std::vector<Variant> variants;  // other shapes that give the same results
};

struct Case {
  std::string name;
  std::function<Job()> make;
};

std::vector<Case> cross_entropy_cases();
std::vector<Case> element_cases();
std::vector<Case> reduction_cases();
std::vector<Case> softmax_cases();

template <class T>
const char* dtype_name() {
  return std::is_same_v<T, float> ? "fp32" : std::is_same_v<T, __half> ? "fp16" : "bf16";
}

// Sizes under the emulation: the remainders by 8, which decide on alignment, stay.
inline std::int64_t shrunk(std::int64_t size, std::int64_t most) {
  return !kEmulated || size <= most ? size : most / 8 * 8 + size % 8;
}

// A few rows of many, the first and the last among them.
inline std::vector<std::int64_t> sample(std::int64_t rows, std::int64_t most = 6) {
  std::vector<std::int64_t> chosen;
  for (std::int64_t i = 0; i < std::min(rows, most); ++i) {
    chosen.push_back(rows <= most ? i : i * (rows - 1) / (most - 1));
  }
  return chosen;
}

}  // namespace masked_loss::cuda::bench
