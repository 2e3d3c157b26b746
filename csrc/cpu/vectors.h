#pragma once

// Only for kernel files, which are compiled once for every instruction set: everything here is local to each of them.
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <bit>
#include <cstring>

#include "common/softmax.h"

namespace masked_loss::cpu::CPU_CAPABILITY {
namespace {

using at::vec::Vectorized;

// exp(x) for x <= 0, or NaN: exactly 1 at 0, and 0 below -87. Half of exp_u20's instructions, as there are no positive
// x and no denormals, and unlike there NaN stays. 2^n e^r with |r| <= ln 2 / 2; the polynomial is exp_u20's.
inline Vectorized<float> exp_of_negative(Vectorized<float> x) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  using V = Vectorized<float>;
  // Adding 1.5 * 2^23 rounds to an integer, which the lowest bits of the sum then hold.
  const V round(12582912.0f), shifted = at::vec::fmadd(x, V(1.44269504f), round), n = shifted - round;
  const V r = at::vec::fmadd(n, V(-0.693147182f), x);
  V e = at::vec::fmadd(r, V(0.00828929059f), V(0.0418978221f));
  e = at::vec::fmadd(r, e, V(0.166676521f));
  e = at::vec::fmadd(r, e, V(0.499991506f));
  e = at::vec::fmadd(r, e, V(0.999999701f));
  e = at::vec::fmadd(r, e, V(1));
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(-87), _CMP_NLT_UQ), e, n);
#else
  const auto exponent = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
  const auto power = _mm256_add_epi32(exponent, _mm256_set1_epi32(127 << 23));
  const auto scaled = _mm256_mul_ps(e, _mm256_castsi256_ps(power));
  return _mm256_and_ps(scaled, _mm256_cmp_ps(x, _mm256_set1_ps(-87), _CMP_NLT_UQ));
#endif
#else
  return x.exp_u20();
#endif
}

inline Vectorized<double> exp_of_negative(Vectorized<double> x) { return x.exp(); }

// Of x and the largest so far, in one instruction, which loses NaN in x; at::vec::maximum takes three to keep it.
inline Vectorized<float> larger(Vectorized<float> x, Vectorized<float> max) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_max_ps(x, max);
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_max_ps(x, max);
#else
  return at::vec::maximum(x, max);
#endif
}

inline Vectorized<double> larger(Vectorized<double> x, Vectorized<double> max) { return at::vec::maximum(x, max); }

template <class A>
A sum_lanes(Vectorized<A> v) {
  return at::vec::vec_reduce_all<A>([](Vectorized<A> a, Vectorized<A> b) { return a + b; }, v);
}

template <class A>
A max_lanes(Vectorized<A> v) {
  return at::vec::vec_reduce_all<A>([](Vectorized<A> a, Vectorized<A> b) { return larger(a, b); }, v);
}

// `v` where `allowed` is true, else `other`; of the first `n` lanes, to read no further.
template <class A>
Vectorized<A> select(const bool* allowed, Vectorized<A> v, Vectorized<A> other,
                     std::int64_t n = Vectorized<A>::size()) {
  constexpr int size = Vectorized<A>::size();
  bool part[size] = {};
  if (n < size) allowed = std::copy(allowed, allowed + n, part) - n;
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<A, float>) {
    const auto bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(allowed));
    return _mm512_mask_blend_ps(_mm_test_epi8_mask(bytes, bytes), other, v);
  }
#elif defined(CPU_CAPABILITY_AVX2)
  if constexpr (std::is_same_v<A, float>) {
    const auto bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(allowed));
    const auto masked = _mm256_cmpeq_epi32(_mm256_cvtepu8_epi32(bytes), _mm256_setzero_si256());
    return _mm256_blendv_ps(v, other, _mm256_castsi256_ps(masked));
  }
#endif
  A ours[size], others[size];
  v.store(ours);
  other.store(others);
  for (int i = 0; i < size; ++i) ours[i] = allowed[i] ? ours[i] : others[i];
  return Vectorized<A>::loadu(ours);
}

// v in the lanes where a equals b, else 0.
template <class A>
Vectorized<A> where_equal(Vectorized<A> a, Vectorized<A> b, Vectorized<A> v) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<A, float>) return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ), v);
#endif
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  return (a == b) & v;
#else
  A result[Vectorized<A>::size()];  // bits of such vectors are taken byte by byte
  for (int i = 0; i < Vectorized<A>::size(); ++i) result[i] = a[i] == b[i] ? v[i] : A(0);
  return Vectorized<A>::loadu(result);
#endif
}

// Where a whole vector goes: through the cache, or past it, to memory that is not read again soon. Memory that is
// written through the cache is read first.
template <bool past_cache, class T>
void store(Vectorized<T> v, T* out) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (past_cache) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(out), std::bit_cast<__m512i>(v));
    return;
  }
#elif defined(CPU_CAPABILITY_AVX2)
  if constexpr (past_cache) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(out), std::bit_cast<__m256i>(v));
    return;
  }
#endif
  v.store(out);
}

// A cache line, of memory that begins one.
inline void store_line_past_cache(char* out, const char* line) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  using V = Vectorized<std::uint8_t>;
  for (int i = 0; i < 64; i += V::size()) {
    store<true>(V::loadu(line + i), reinterpret_cast<std::uint8_t*>(out + i));
  }
#else
  std::memcpy(out, line, 64);
#endif
}

// Makes what was stored past the cache visible to other threads.
inline void finish_stores() {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  _mm_sfence();
#endif
}

// How many elements there are before the first whole cache line, which is where stores past the cache begin.
template <class T>
std::int64_t before_line(const T* out, std::int64_t n) {
  const auto bytes = -reinterpret_cast<std::intptr_t>(out) & 63;
  return bytes % sizeof(T) != 0 ? n : std::min<std::int64_t>(n, bytes / sizeof(T));
}

template <bool past_cache, class T>
void fill(T* out, std::int64_t n, T value) {
  std::int64_t i = 0;
  if constexpr (past_cache) {
    for (const auto head = before_line(out, n); i < head; ++i) out[i] = value;
  }
  const Vectorized<T> values(value);
  for (; i + Vectorized<T>::size() <= n; i += Vectorized<T>::size()) store<past_cache>(values, out + i);
  for (; i < n; ++i) out[i] = value;
}

#if defined(CPU_CAPABILITY_AVX512)
// The same for up to 16 rows and columns, within registers: ATen's has its vectors in memory.
inline void transpose_16(const float* in, std::int64_t in_stride, float* out, std::int64_t out_stride,
                         std::int64_t rows, std::int64_t columns) {
  const auto first = [](std::int64_t n) { return static_cast<__mmask16>((1u << n) - 1); };
  const auto of_row = first(columns), of_column = first(rows);
  __m512 x[16], y[16];
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) x[r] = _mm512_maskz_loadu_ps(r < rows ? of_row : 0, in + r * in_stride);
#pragma GCC unroll 8
  for (int r = 0; r < 16; r += 2) {
    y[r] = _mm512_unpacklo_ps(x[r], x[r + 1]);
    y[r + 1] = _mm512_unpackhi_ps(x[r], x[r + 1]);
  }
#pragma GCC unroll 4
  for (int r = 0; r < 16; r += 4) {
    for (int k = 0; k < 2; ++k) {
      const auto a = _mm512_castps_pd(y[r + k]), b = _mm512_castps_pd(y[r + k + 2]);
      x[r + 2 * k] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      x[r + 2 * k + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  }
  // Now a lane of 128 bits of x[4 a + c % 4] has rows 4 a to 4 a + 3 of column c; these lanes are put together.
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const auto even0 = _mm512_shuffle_f32x4(x[c], x[c + 4], 0x88), odd0 = _mm512_shuffle_f32x4(x[c], x[c + 4], 0xdd);
    const auto even1 = _mm512_shuffle_f32x4(x[c + 8], x[c + 12], 0x88);
    const auto odd1 = _mm512_shuffle_f32x4(x[c + 8], x[c + 12], 0xdd);
    y[c] = _mm512_shuffle_f32x4(even0, even1, 0x88);
    y[c + 4] = _mm512_shuffle_f32x4(odd0, odd1, 0x88);
    y[c + 8] = _mm512_shuffle_f32x4(even0, even1, 0xdd);
    y[c + 12] = _mm512_shuffle_f32x4(odd0, odd1, 0xdd);
  }
#pragma GCC unroll 16
  for (int c = 0; c < 16; ++c) {
    if (c < columns) _mm512_mask_storeu_ps(out + c * out_stride, of_column, y[c]);
  }
}
#endif

// out[c * out_stride + r] = in[r * in_stride + c]
template <class A>
void transpose(const A* in, std::int64_t in_stride, A* out, std::int64_t out_stride, std::int64_t rows,
               std::int64_t columns) {
  std::int64_t r = 0;
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<A, float>) {
    for (; r < rows; r += 16) {
      for (std::int64_t c = 0; c < columns; c += 16) {
        transpose_16(in + r * in_stride + c, in_stride, out + c * out_stride + r, out_stride,
                     std::min<std::int64_t>(16, rows - r), std::min<std::int64_t>(16, columns - c));
      }
    }
    return;
  }
#elif defined(CPU_CAPABILITY_AVX2)
  if constexpr (std::is_same_v<A, float>) {
    for (; r + 8 <= rows; r += 8) {
      std::int64_t c = 0;
      for (; c + 8 <= columns; c += 8) {
        at::vec::transpose_mxn<float, 8, 8>(in + r * in_stride + c, in_stride, out + c * out_stride + r, out_stride);
      }
      for (; c < columns; ++c) {
        for (int i = 0; i < 8; ++i) out[c * out_stride + r + i] = in[(r + i) * in_stride + c];
      }
    }
  }
#endif
  for (; r < rows; ++r) {
    for (std::int64_t c = 0; c < columns; ++c) out[c * out_stride + r] = in[r * in_stride + c];
  }
}

}  // namespace
}  // namespace masked_loss::cpu::CPU_CAPABILITY
