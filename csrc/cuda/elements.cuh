// Elements of operands that lie anywhere in memory, and sums of them.
#pragma once

#include "common/rows.h"
#include "cuda/device.cuh"
#include "cuda/elements.h"

namespace masked_loss::cuda {

struct Strided {
  const void* data;
  Rows<1, kOperandDims> at;
};

inline Strided strided(const Operand& operand) {
  Strided result{operand.data, {}};
  if (operand.data == nullptr) return result;
  const auto& from = operand.at;
  if (from.dims > kOperandDims) throw std::logic_error("masked_loss: an operand of too many dimensions");
  result.at.count = from.count;
  result.at.dims = from.dims;
  for (int d = 0; d < from.dims; ++d) {
    result.at.sizes[d] = from.sizes[d];
    result.at.by_size[d] = from.by_size[d];
    result.at.strides[0][d] = from.strides[0][d];
  }
  return result;
}

// A float has the digits of two, which costs less than one double where those are slow.
template <class A>
struct Sum {
  A high = 0, low = 0;

  __device__ __forceinline__ void add(A x) {
    const A sum = high + x, added = sum - high;
    low += (high - (sum - added)) + (x - added);
    high = sum;
  }
  // Of infinities and NaN there is no lower half.
  __device__ __forceinline__ double value() const {
    return high - high == 0 ? double(high) + double(low) : double(high);
  }
  __device__ __forceinline__ A rounded() const { return high - high == 0 ? high + low : high; }

  friend __device__ __forceinline__ Sum operator+(Sum a, A x) {
    a.add(x);
    return a;
  }
  friend __device__ __forceinline__ Sum operator+(Sum a, const Sum& b) {
    a.add(b.high);
    a.low += b.low;
    return a;
  }
  friend __device__ __forceinline__ A operator-(const Sum& a, const Sum& b) {
    return (a.high - b.high) + (a.low - b.low);
  }
};

// n elements as they came from memory. They are taken apart where they are used and not before, so that the loads of
// several groups are under way at once.
template <class T, int n>
struct Group {
  unsigned words[(n * sizeof(T) + 3) / 4];

  Group() = default;
  __device__ __forceinline__ explicit Group(const T (&values)[n]) {
    words[0] = 0;
    memcpy(words, values, sizeof(values));
    hold();
  }
  __device__ __forceinline__ void hold() {
#ifdef __CUDACC__
#pragma unroll
    for (unsigned& word : words) asm volatile("" : "+r"(word));
#endif
  }
  __device__ __forceinline__ void get(T (&values)[n]) const { memcpy(values, words, sizeof(values)); }
};

// Elements that stand side by side, by the widest loads that they and their address allow.
template <bool again, class T, int n>
__device__ __forceinline__ Group<T, n> load_line(const T* from) {
  constexpr int bytes = n * sizeof(T);
  using Word = std::conditional_t<bytes % 16 == 0, uint4,
                                  std::conditional_t<bytes == 8, uint2, std::conditional_t<bytes == 4, unsigned, T>>>;
  if (sizeof(Word) > sizeof(T) && reinterpret_cast<std::uintptr_t>(from) % sizeof(Word) == 0) {
    Group<T, n> group;
#pragma unroll
    for (int part = 0; part < bytes / int(sizeof(Word)); ++part) {
      const auto* address = reinterpret_cast<const Word*>(from) + part;
      const Word word = again ? __ldca(address) : __ldcs(address);
      memcpy(reinterpret_cast<char*>(group.words) + part * sizeof(Word), &word, sizeof(Word));
    }
    group.hold();
    return group;
  }
  T values[n];
#pragma unroll
  for (int j = 0; j < n; ++j) values[j] = from[j];
  return Group<T, n>(values);
}

// `count` elements from `first` on, up to n. Loads are streamed but where they are needed `again`.
template <class T, int n, bool again = false>
__device__ __forceinline__ Group<T, n> load_elements(const Strided& operand, std::int64_t first, int count) {
  const auto& at = operand.at;
  const int last = at.dims - 1;
  const T* data = static_cast<const T*>(operand.data);
  // One place is looked for, unless the elements go beyond a line.
  const auto line = last > 0 ? at.by_size[last](first) : 0;
  const auto index = last > 0 ? first - line * at.sizes[last] : first;
  T values[n];
  if (count == n && (last <= 0 || index + n <= at.sizes[last])) {
    const auto stride = last < 0 ? 0 : at.strides[0][last];
    const T* from = data + at.offsets(line, last)[0] + index * stride;
    if (stride == 1) return load_line<again, T, n>(from);
    if (stride == 0) {
      const T value = *from;
#pragma unroll
      for (int j = 0; j < n; ++j) values[j] = value;
    } else {
#pragma unroll
      for (int j = 0; j < n; ++j) values[j] = from[j * stride];
    }
    return Group<T, n>(values);
  }
#pragma unroll
  for (int j = 0; j < n; ++j) values[j] = T{};
#pragma unroll 1
  for (int j = 0; j < count; ++j) {
    const T value = data[at.offsets(first + j)[0]];
#pragma unroll
    for (int i = 0; i < n; ++i) {
      if (i == j) values[i] = value;  // registers have no index
    }
  }
  return Group<T, n>(values);
}

// `count` elements, up to n; all of them to a multiple of 16 bytes.
template <class T, int n>
__device__ __forceinline__ void store_elements(T* to, int count, const Accumulation<T> (&values)[n]) {
  constexpr int size = Pack<T>::size;
  if (count == n) {
#pragma unroll
    for (int part = 0; part < n; part += size) {
      Pack<T> pack;
#pragma unroll
      for (int j = 0; j < size; ++j) pack.values[j] = narrow<T>(values[part + j]);
      store_streaming(to + part, pack);
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < n; ++j) {
    if (j < count) to[j] = narrow<T>(values[j]);
  }
}

template <int n, bool again = false>
__device__ __forceinline__ Group<unsigned char, n> load_mask(const Strided& mask, std::int64_t first, int count) {
  return mask.data == nullptr ? Group<unsigned char, n>{} : load_elements<unsigned char, n, again>(mask, first, count);
}

// A bit an element, of `count`: what the mask keeps.
template <int n>
__device__ __forceinline__ unsigned kept_of(const Strided& mask, const Group<unsigned char, n>& group, int count) {
  const unsigned all = (1u << count) - 1;
  if (mask.data == nullptr) return all;
  unsigned char bytes[n];
  group.get(bytes);
  return all & mask_bits<n>(bytes);
}

}  // namespace masked_loss::cuda
