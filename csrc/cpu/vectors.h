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

// What is read next, block by block. Its first block is fetched into the L1 cache, and the one after it into the L2
// cache: a core has too few misses of its L1 cache in flight to keep the memory busy, and they end sooner that way.
struct Ahead {
  const void* next = nullptr;  // null: nothing
  std::int64_t block = 0;      // bytes

  // Bytes [i, i + n) of both, whole cache lines.
  C10_ALWAYS_INLINE void fetch(std::int64_t i, std::int64_t n) const {
    if (next == nullptr) return;
    for (const auto* line = static_cast<const char*>(next) + i; n > 0; n -= 64, line += 64) {
      __builtin_prefetch(line);
      __builtin_prefetch(line + block, 0, 2);
    }
  }

  // Of a loop over vectors, at each: every second one fetches for two, which is a cache line of half types.
  C10_ALWAYS_INLINE void fetch_at(std::int64_t i, std::int64_t n) const {
    if (i % (2 * n) == 0) fetch(i, 2 * n);
  }
};

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

// coefficients[0] x^(n - 1) + ... + coefficients[n - 1]
template <int n>
Vectorized<float> polynomial(Vectorized<float> x, const float (&coefficients)[n]) {
  Vectorized<float> sum(coefficients[0]);
  for (int i = 1; i < n; ++i) sum = at::vec::fmadd(x, sum, Vectorized<float>(coefficients[i]));
  return sum;
}

// log(1 + x) for x in [0, 1], or NaN; within 2 ulp. The polynomial was fitted to log(1 + x) / x there.
inline Vectorized<float> log1p_of_fraction(Vectorized<float> x) {
  constexpr float fitted[] = {-0.0032440233f, 0.0198514536f, -0.0569595173f, 0.106036536f,  -0.153055921f,
                              0.196759388f,   -0.249541342f, 0.333299637f,   -0.499999017f, 1.0f};
  return x * polynomial(x, fitted);
}

inline Vectorized<double> log1p_of_fraction(Vectorized<double> x) { return x.log1p(); }

// log(x) within 2 ulp in half the time of Vectorized's, which is within one. With x = 2^n m, m in [0.75, 1.5):
// n ln 2 + log(m), whose polynomial was fitted to log(1 + f) / f.
inline Vectorized<float> fast_log(Vectorized<float> x) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  using V = Vectorized<float>;
#if defined(CPU_CAPABILITY_AVX512)
  // Both know 0, infinity, NaN and what is negative.
  const __m512 m = _mm512_getmant_ps(x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_nan), one = _mm512_set1_ps(1);
  __m512 n = _mm512_getexp_ps(x);
  n = _mm512_mask_add_ps(n, _mm512_cmp_ps_mask(m, one, _CMP_LT_OQ), n, one);
#else
  const __m256 infinity = _mm256_set1_ps(std::numeric_limits<float>::infinity()), zero = _mm256_setzero_ps();
  const __m256 tiny = _mm256_cmp_ps(x, _mm256_set1_ps(std::numeric_limits<float>::min()), _CMP_LT_OQ);
  const __m256 normal = _mm256_blendv_ps(x, _mm256_mul_ps(x, _mm256_set1_ps(0x1p25f)), tiny);
  const __m256i bits = _mm256_castps_si256(normal), low = _mm256_set1_epi32(0x3f400000);  // 0.75
  const __m256i power = _mm256_and_si256(_mm256_sub_epi32(bits, low), _mm256_set1_epi32(0xff800000));
  const __m256 m = _mm256_castsi256_ps(_mm256_sub_epi32(bits, power));
  const __m256 n =
      _mm256_sub_ps(_mm256_cvtepi32_ps(_mm256_srai_epi32(power, 23)), _mm256_and_ps(tiny, _mm256_set1_ps(25)));
#endif
  constexpr float fitted[] = {-0.0446000695f, 0.10443449f,   -0.131891012f, 0.144937769f, -0.166458055f,
                              0.199892581f,   -0.250000745f, 0.333335012f,  -0.5f,        1.0f};
  const V f = V(m) - V(1), log_of_m = f * polynomial(f, fitted);
  const V log = at::vec::fmadd(V(n), V(0.693147182f), log_of_m);
#if defined(CPU_CAPABILITY_AVX512)
  return log;
#else
  // Infinity and NaN stay, 0 gives -infinity, and what is negative NaN.
  const __m256 positive = _mm256_blendv_ps(x, log, _mm256_cmp_ps(x, infinity, _CMP_LT_OQ));
  const __m256 of_zero = _mm256_blendv_ps(positive, _mm256_sub_ps(zero, infinity), _mm256_cmp_ps(x, zero, _CMP_EQ_OQ));
  return _mm256_or_ps(of_zero, _mm256_cmp_ps(x, zero, _CMP_LT_OQ));
#endif
#else
  return x.log();
#endif
}

inline Vectorized<double> fast_log(Vectorized<double> x) { return x.log(); }

// 1 / x for x in [2^-125, 2^125], or NaN; within 2 ulp, in a third of a division's time.
inline Vectorized<float> reciprocal(Vectorized<float> x) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
#if defined(CPU_CAPABILITY_AVX512)
  const Vectorized<float> guess = _mm512_rcp14_ps(x);
#else
  const Vectorized<float> guess = _mm256_rcp_ps(x);
#endif
  return guess * (Vectorized<float>(2) - x * guess);
#else
  return Vectorized<float>(1) / x;
#endif
}

inline Vectorized<double> reciprocal(Vectorized<double> x) { return Vectorized<double>(1) / x; }

// log(1 - x) for x in [0, 1], or NaN. What 1 - x loses by rounding is added to the logarithm.
inline Vectorized<float> log_of_complement(Vectorized<float> x) {
  using V = Vectorized<float>;
  const V rest = V(1) - x, lost = (V(1) - rest) - x;
  return fast_log(rest) + lost * reciprocal(at::vec::maximum(rest, V(0x1p-100f)));
}

inline Vectorized<double> log_of_complement(Vectorized<double> x) { return (-x).log1p(); }

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

template <class P>
P* at_or_null(P* data, std::int64_t i) {
  return data == nullptr ? nullptr : data + i;
}

template <class A>
A sum_lanes(Vectorized<A> v) {
  return at::vec::vec_reduce_all<A>([](Vectorized<A> a, Vectorized<A> b) { return a + b; }, v);
}

template <class A>
A max_lanes(Vectorized<A> v) {
  return at::vec::vec_reduce_all<A>([](Vectorized<A> a, Vectorized<A> b) { return larger(a, b); }, v);
}

// The first `n` lanes of `v`, and the others of `other`.
template <class A>
Vectorized<A> first_lanes(Vectorized<A> v, std::int64_t n, Vectorized<A> other) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<A, float>) return _mm512_mask_blend_ps((1u << n) - 1, other, v);
#elif defined(CPU_CAPABILITY_AVX2)
  if constexpr (std::is_same_v<A, float>) {
    const auto lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const auto first = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), lane);
    return _mm256_blendv_ps(other, v, _mm256_castsi256_ps(first));
  }
#endif
  return Vectorized<A>::set(other, v, n);
}

// `v` where a byte of `allowed` is not 0, else `other`; of the first `n` lanes, to read no further.
template <class Byte, class A>
Vectorized<A> select(const Byte* allowed, Vectorized<A> v, Vectorized<A> other,
                     std::int64_t n = Vectorized<A>::size()) {
  constexpr int size = Vectorized<A>::size();
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<A, float>) {
    const auto bytes = _mm_maskz_loadu_epi8((1u << n) - 1, allowed);
    return _mm512_mask_blend_ps(_mm_test_epi8_mask(bytes, bytes), other, v);
  }
#endif
  Byte part[size] = {};
  if (n < size) allowed = std::copy(allowed, allowed + n, part) - n;
#if defined(CPU_CAPABILITY_AVX2)
  if constexpr (std::is_same_v<A, float>) {
    const auto bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(allowed));
    const auto masked = _mm256_cmpeq_epi32(_mm256_cvtepu8_epi32(bytes), _mm256_setzero_si256());
    return _mm256_blendv_ps(v, other, _mm256_castsi256_ps(masked));
  }
#endif
  A ours[size], others[size];
  v.store(ours);
  other.store(others);
  for (int i = 0; i < size; ++i) ours[i] = allowed[i] != Byte(0) ? ours[i] : others[i];
  return Vectorized<A>::loadu(ours);
}

template <class Byte>
std::int64_t count_nonzero(const Byte* bytes, std::int64_t n) {
  std::int64_t count = 0, i = 0;
#if defined(CPU_CAPABILITY_AVX512)
  for (; i + 64 <= n; i += 64) {
    const auto line = _mm512_loadu_si512(bytes + i);
    count += std::popcount(_mm512_test_epi8_mask(line, line));
  }
#elif defined(CPU_CAPABILITY_AVX2)
  for (; i + 32 <= n; i += 32) {
    const auto part = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes + i));
    const auto zeros = _mm256_movemask_epi8(_mm256_cmpeq_epi8(part, _mm256_setzero_si256()));
    count += 32 - std::popcount(static_cast<unsigned>(zeros));
  }
#endif
  for (; i < n; ++i) count += bytes[i] != Byte(0);
  return count;
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
