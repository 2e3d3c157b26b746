#pragma once

// Only for kernel files, as vectors.h: what rows of any dtype, visited in blocks, are read and written with. T is the
// dtype of the elements, A the one they are computed in.
#include "cpu/capability.h"
#include "cpu/vectors.h"

namespace masked_loss::cpu::CPU_CAPABILITY {
namespace {

// Vectors of the elements x, or of a part of one at the end: take(vector, position, lanes). Half types give two at
// once.
template <class A, class T, class Take>
C10_ALWAYS_INLINE void for_vectors(const T* x, std::int64_t n, const Take& take) {
  using V = Vectorized<A>;
  constexpr std::int64_t size = V::size();
  std::int64_t i = 0;
  if constexpr (std::is_same_v<T, A>) {
    for (; i + 2 * size <= n; i += 2 * size) {
      take(V::loadu(x + i), i, size);
      take(V::loadu(x + i + size), i + size, size);
    }
    for (; i < n; i += size) {
      const auto lanes = std::min(size, n - i);
      take(V::loadu(x + i, lanes), i, lanes);
    }
  } else {
    for (; i < n; i += 2 * size) {
      const auto lanes = std::min(2 * size, n - i);
      const auto loaded = lanes == 2 * size ? Vectorized<T>::loadu(x + i) : Vectorized<T>::loadu(x + i, lanes);
      const auto [low, high] = at::vec::convert_to_float<T>(loaded);
      take(low, i, std::min(size, lanes));
      if (lanes > size) take(high, i + size, lanes - size);
    }
  }
}

// `v` where `keep` is true or null, else +0.
template <class A>
Vectorized<A> or_zero(const std::uint8_t* keep, Vectorized<A> v, std::int64_t lanes) {
  return keep == nullptr ? v : select(keep, v, Vectorized<A>(0), lanes);
}

// A block as A, what is not allowed as -inf: where it lies, or in `stage`.
template <class T, class A>
const A* load_block(const T* x, const std::uint8_t* allowed, std::int64_t n, A* stage) {
  using V = Vectorized<A>;
  if constexpr (std::is_same_v<T, A>) {
    if (allowed == nullptr) return x;
  }
  const V minus_infinity(-std::numeric_limits<A>::infinity());
  for_vectors<A>(x, n, [&](V v, std::int64_t i, std::int64_t lanes) {
    if (allowed != nullptr) v = select(allowed + i, v, minus_infinity, lanes);
    v.store(stage + i, lanes);
  });
  return stage;
}

// NaN may be lost: the exponentials have it.
template <class A>
C10_ALWAYS_INLINE A max_of(const A* x, std::int64_t n) {
  using V = Vectorized<A>;
  const V lowest(std::numeric_limits<A>::lowest());
  V max0 = lowest, max1 = lowest, max2 = lowest, max3 = lowest;
  std::int64_t i = 0;
  for (; i + 4 * V::size() <= n; i += 4 * V::size()) {
    max0 = larger(V::loadu(x + i), max0);
    max1 = larger(V::loadu(x + i + V::size()), max1);
    max2 = larger(V::loadu(x + i + 2 * V::size()), max2);
    max3 = larger(V::loadu(x + i + 3 * V::size()), max3);
  }
  for (; i + V::size() <= n; i += V::size()) max0 = larger(V::loadu(x + i), max0);
  if (i < n) max1 = larger(first_lanes(V::loadu(x + i, n - i), n - i, lowest), max1);
  return max_lanes(larger(larger(max0, max1), larger(max2, max3)));
}

// Takes value(position, lanes) for each vector of a row of T, computed in A, and stores it.
template <bool past_cache, class A, class T, class Value>
C10_ALWAYS_INLINE void store_vectors(T* out, std::int64_t n, const Value& value) {
  using V = Vectorized<A>;
  constexpr std::int64_t size = V::size();
  const auto store_part = [&](std::int64_t i, std::int64_t lanes) {
    if constexpr (std::is_same_v<T, A>) {
      value(i, lanes).store(out + i, lanes);
    } else {
      const V low = value(i, std::min(size, lanes)), high = lanes > size ? value(i + size, lanes - size) : V(0);
      at::vec::convert_from_float<T>(low, high).store(out + i, lanes);
    }
  };
  constexpr std::int64_t step = Vectorized<T>::size();
  std::int64_t i = 0;
  if constexpr (past_cache) {
    const auto head = before_line(out, n);
    for (; i < head; i += step) store_part(i, std::min(step, head - i));
    i = head;
  }
  for (; i + step <= n; i += step) {
    if constexpr (std::is_same_v<T, A>) {
      store<past_cache>(value(i, size), out + i);
    } else {
      store<past_cache>(at::vec::convert_from_float<T>(value(i, size), value(i + size, size)), out + i);
    }
  }
  if (i < n) store_part(i, n - i);
}

}  // namespace
}  // namespace masked_loss::cpu::CPU_CAPABILITY
