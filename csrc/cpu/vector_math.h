#pragma once

// Only for kernel files, as vectors.h.
#include "cpu/vectors.h"

namespace masked_loss::cpu::CPU_CAPABILITY {
namespace {

// ScalarMath on vectors.
template <class A>
struct VectorMath {
  using V = Vectorized<A>;
  static V abs(V x) { return x.abs(); }
  static V exp(V x) { return x.exp(); }
  static V exp_of_negative(V x) { return CPU_CAPABILITY::exp_of_negative(x); }
  static V expm1(V x) { return x.expm1(); }
  static V log(V x) { return fast_log(x); }
  static V log1p(V x) { return x.log1p(); }
  static V log1p_of_fraction(V x) { return CPU_CAPABILITY::log1p_of_fraction(x); }
  static V log_of_complement(V x) { return CPU_CAPABILITY::log_of_complement(x); }
  static V reciprocal(V x) { return CPU_CAPABILITY::reciprocal(x); }
  static V pow(V x, V y) { return x.pow(y); }
#if defined(CPU_CAPABILITY_AVX512)
  // A comparison gives a bit a lane, which Vectorized's operators would spread out, for blendv to gather again.
  static auto less(V a, V b) {
    if constexpr (std::is_same_v<A, float>)
      return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ);
    else
      return _mm512_cmp_pd_mask(a, b, _CMP_LT_OQ);
  }
  static auto equal(V a, V b) {
    if constexpr (std::is_same_v<A, float>)
      return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ);
    else
      return _mm512_cmp_pd_mask(a, b, _CMP_EQ_OQ);
  }
  static V where(__mmask16 condition, Vectorized<float> a, Vectorized<float> b) {
    return _mm512_mask_blend_ps(condition, b, a);
  }
  static V where(__mmask8 condition, Vectorized<double> a, Vectorized<double> b) {
    return _mm512_mask_blend_pd(condition, b, a);
  }
#else
  static V less(V a, V b) { return a < b; }
  static V equal(V a, V b) { return a == b; }
  static V where(V condition, V a, V b) { return V::blendv(b, a, condition); }
#endif
};

}  // namespace
}  // namespace masked_loss::cpu::CPU_CAPABILITY
