// Compiled once for every instruction set, whose vectors the compiler uses for the loops.
#include "cpu/masked_fill_kernel.h"

#include "cpu/vectors.h"

namespace masked_loss::cpu::CPU_CAPABILITY {
namespace {

template <class T>
T load(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

// out[i] = value(i) for a dense line, which may read `from`; past the cache in whole cache lines.
template <class T, class Value>
void set(char* out, std::int64_t n, bool past_cache, const T* from, const Value& value) {
  auto* to = reinterpret_cast<T*>(out);
  constexpr std::int64_t size = 64 / sizeof(T);
  const auto before = -reinterpret_cast<std::intptr_t>(out) & 63;
  std::int64_t i = 0;
  if (past_cache && before % sizeof(T) == 0) {
    constexpr std::int64_t block = 8192 / sizeof(T);
    const auto ahead = from == nullptr ? Ahead() : Ahead{from + block, 8192};
    for (const auto head = std::min<std::int64_t>(n, before / sizeof(T)); i < head; ++i) to[i] = value(i);
    for (; i + size <= n; i += size) {
      ahead.fetch(i * std::int64_t(sizeof(T)), 64);
      T line[size];
      for (std::int64_t k = 0; k < size; ++k) line[k] = value(i + k);
      store_line_past_cache(reinterpret_cast<char*>(to + i), reinterpret_cast<const char*>(line));
    }
    finish_stores();
  }
  for (; i < n; ++i) to[i] = value(i);
}

template <class T>
void fill(char* out, const char* in, const char* mask, const std::int64_t* strides, std::int64_t n,
          const void* value_bits, bool past_cache) {
  constexpr auto size = static_cast<std::int64_t>(sizeof(T));
  const T value = load<T>(value_bits);
  const bool dense = strides[0] == size && strides[1] == size;
  const auto* from = reinterpret_cast<const T*>(in);
  if (strides[2] == 0 && dense) {
    if (*mask != 0) {
      set<T>(out, n, past_cache, nullptr, [&](std::int64_t) { return value; });
    } else {
      set<T>(out, n, past_cache, from, [&](std::int64_t i) { return from[i]; });
    }
  } else if (strides[2] == 1 && dense) {
    set<T>(out, n, past_cache, from, [&](std::int64_t i) {
      const T kept = from[i];
      return mask[i] != 0 ? value : kept;
    });
  } else {
    for (std::int64_t i = 0; i < n; ++i) {
      const T filled = mask[i * strides[2]] != 0 ? value : load<T>(in + i * strides[1]);
      std::memcpy(out + i * strides[0], &filled, sizeof(T));
    }
  }
}

template <class T>
void fill_(char* out, const char* mask, const std::int64_t* strides, std::int64_t n, const void* value_bits,
           bool past_cache) {
  constexpr auto size = static_cast<std::int64_t>(sizeof(T));
  const T value = load<T>(value_bits);
  if (strides[1] == 0) {
    if (*mask == 0) return;
    if (strides[0] == size) return set<T>(out, n, past_cache, nullptr, [&](std::int64_t) { return value; });
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
  static constexpr MaskedFillKernels kernels{{kernel<std::uint8_t>, kernel<std::uint16_t>, kernel<std::uint32_t>,
                                              kernel<std::uint64_t>, kernel<std::array<std::uint64_t, 2>>}};
  return kernels;
}

}  // namespace masked_loss::cpu::CPU_CAPABILITY
