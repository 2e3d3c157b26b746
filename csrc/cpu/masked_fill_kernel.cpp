// Compiled once for every instruction set, whose vectors the compiler uses for the loops.
#include "cpu/masked_fill_kernel.h"

#include <cstring>

namespace masked_loss::cpu::CPU_CAPABILITY {
namespace {

template <class T>
T load(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

template <class T>
void set(char* out, std::int64_t n, T value) {
  auto* to = reinterpret_cast<T*>(out);
  for (std::int64_t i = 0; i < n; ++i) to[i] = value;
}

template <class T>
void fill(char* out, const char* in, const char* mask, const std::int64_t* strides, std::int64_t n,
          const void* value_bits) {
  constexpr auto size = static_cast<std::int64_t>(sizeof(T));
  const T value = load<T>(value_bits);
  const bool dense = strides[0] == size && strides[1] == size;
  if (strides[2] == 0 && dense) {
    if (*mask != 0) {
      set(out, n, value);
    } else {
      std::memcpy(out, in, n * size);
    }
  } else if (strides[2] == 1 && dense) {
    auto* __restrict to = reinterpret_cast<T*>(out);
    const auto* __restrict from = reinterpret_cast<const T*>(in);
    for (std::int64_t i = 0; i < n; ++i) {
      const T kept = from[i];
      to[i] = mask[i] != 0 ? value : kept;
    }
  } else {
    for (std::int64_t i = 0; i < n; ++i) {
      const T filled = mask[i * strides[2]] != 0 ? value : load<T>(in + i * strides[1]);
      std::memcpy(out + i * strides[0], &filled, sizeof(T));
    }
  }
}

template <class T>
void fill_(char* out, const char* mask, const std::int64_t* strides, std::int64_t n, const void* value_bits) {
  constexpr auto size = static_cast<std::int64_t>(sizeof(T));
  const T value = load<T>(value_bits);
  if (strides[1] == 0) {
    if (*mask == 0) return;
    if (strides[0] == size) return set(out, n, value);
  }
  if (strides[0] == size && strides[1] == 1) {
    auto* __restrict to = reinterpret_cast<T*>(out);
    for (std::int64_t i = 0; i < n; ++i) {
      if (mask[i] != 0) to[i] = value;
    }
  } else {
    for (std::int64_t i = 0; i < n; ++i) {
      if (mask[i * strides[1]] != 0) std::memcpy(out + i * strides[0], &value, sizeof(T));
    }
  }
}

template <class T>
constexpr MaskedFillKernel kernel{fill<T>, fill_<T>};

}  // namespace

const MaskedFillKernels& masked_fill_kernels() {
  static constexpr MaskedFillKernels kernels{
      {kernel<std::uint8_t>, kernel<std::uint16_t>, kernel<std::uint32_t>, kernel<std::uint64_t>, kernel<Bits16>}};
  return kernels;
}

}  // namespace masked_loss::cpu::CPU_CAPABILITY
