// Elements of operands that lie anywhere in memory, and sums of them.
#pragma once

#include "common/rows.h"
#include "cuda/device.cuh"
#include "cuda/elements.h"

namespace masked_loss::cuda {

struct Strided {
  const void* data = nullptr;
  bool contiguous = true;  // from an address that is a multiple of 16 bytes, or there is none
  bool repeats = false;    // neighbouring elements are one and the same
  Rows<1, kOperandDims> at;
};

inline Strided strided(const Operand& operand) {
  Strided result;
  if (operand.data == nullptr) return result;
  result.data = operand.data;
  const auto& from = operand.at;
  if (from.dims > kOperandDims) throw std::logic_error("masked_loss: an operand of too many dimensions");
  result.at.count = from.count;
  result.at.dims = from.dims;
  for (int d = 0; d < from.dims; ++d) {
    result.at.sizes[d] = from.sizes[d];
    result.at.by_size[d] = from.by_size[d];
    result.at.strides[0][d] = from.strides[0][d];
  }
  const int last = from.dims - 1;
  result.contiguous = last == 0 && from.strides[0][0] == 1 && reinterpret_cast<std::uintptr_t>(operand.data) % 16 == 0;
  result.repeats = last >= 0 && from.strides[0][last] == 0;
  return result;
}

// A compensated sum of two floats: nearly double precision without FP64 units, which many GPUs have few of.
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

// The widest words that n elements can be loaded by.
template <class T, int n, int bytes = n * sizeof(T)>
using WordOf = std::conditional_t<
    bytes % 16 == 0, uint4,
    std::conditional_t<bytes == 8, uint2,
                       std::conditional_t<bytes == 4, unsigned, std::conditional_t<bytes == 2, unsigned short, T>>>>;

// Elements that stand side by side, from an address that is a multiple of the words.
template <bool again, class T, int n>
__device__ __forceinline__ Group<T, n> load_words(const T* from) {
  using Word = WordOf<T, n>;
  Group<T, n> group;
  group.words[0] = 0;
#pragma unroll
  for (int part = 0; part < int(n * sizeof(T) / sizeof(Word)); ++part) {
    const auto* address = reinterpret_cast<const Word*>(from) + part;
    const Word word = again ? __ldca(address) : __ldcs(address);
    memcpy(reinterpret_cast<char*>(group.words) + part * sizeof(Word), &word, sizeof(Word));
  }
  group.hold();
  return group;
}

// The same by the widest loads that their address allows.
template <bool again, class T, int n>
__device__ __forceinline__ Group<T, n> load_line(const T* from) {
  using Word = WordOf<T, n>;
  if (sizeof(Word) > sizeof(T) && reinterpret_cast<std::uintptr_t>(from) % sizeof(Word) == 0) {
    return load_words<again, T, n>(from);
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
      store_streaming(to + part, narrow_pack<T>(values + part));
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < n; ++j) {
    if (j < count) to[j] = narrow<T>(values[j]);
  }
}

// A byte an element, which is not 0 where it is kept.
template <int n>
struct Kept : Group<unsigned char, n> {
  using Group<unsigned char, n>::words;

  Kept() = default;
  __device__ __forceinline__ Kept(const Group<unsigned char, n>& group) : Group<unsigned char, n>(group) {}

  __device__ __forceinline__ static unsigned byte(int j) { return 0xffu << j % 4 * 8; }
  __device__ __forceinline__ bool operator[](int j) const { return (words[j / 4] & byte(j)) != 0; }
  __device__ __forceinline__ void drop(int j) { words[j / 4] &= ~byte(j); }
  __device__ __forceinline__ bool any() const {
    unsigned all = 0;
#pragma unroll
    for (const unsigned word : words) all |= word;
    return all != 0;
  }
  __device__ __forceinline__ int count() const {
    int sum = 0;
#pragma unroll
    for (const unsigned word : words) sum += __popc(nonzero_bytes(word));
    return sum;
  }
  // Of the first `count` elements.
  __device__ __forceinline__ static Kept first(int count) {
    Kept kept;
#pragma unroll
    for (int w = 0; w < int(std::size(kept.words)); ++w) {
      const int bytes = min(max(min(count, n) - 4 * w, 0), 4);
      kept.words[w] = bytes == 4 ? 0x01010101 : 0x01010101u & ((1u << 8 * bytes) - 1);
    }
    return kept;
  }
};

// Of `count` elements from `first` on, up to n.
template <int n, bool again = false>
__device__ __forceinline__ Kept<n> load_kept(const Strided& mask, std::int64_t first, int count) {
  return mask.data == nullptr ? Kept<n>::first(count)
                              : Kept<n>(load_elements<unsigned char, n, again>(mask, first, count));
}

// Of n elements where the operands are contiguous.
template <class T, int n>
__device__ __forceinline__ Group<T, n> load_contiguous(const Strided& operand, std::int64_t first) {
  return load_words<false, T, n>(static_cast<const T*>(operand.data) + first);
}
template <int n>
__device__ __forceinline__ Kept<n> load_contiguous_kept(const Strided& mask, std::int64_t first) {
  return mask.data == nullptr ? Kept<n>::first(n) : Kept<n>(load_contiguous<unsigned char, n>(mask, first));
}

}  // namespace masked_loss::cuda
