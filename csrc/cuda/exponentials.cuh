// Sums of exponentials as powers of two: of x log2(e) less what the maximum's product is rounded to, one instruction in
// front of the exponential itself.
#pragma once

#include "cuda/device.cuh"

namespace masked_loss::cuda {

// exp(x - max), but for what `base` is rounded to. Products with huge numbers would be infinite: among these any factor
// tells what equals the maximum from what is far below it.
struct PowerOf {
  float factor, base;

  __device__ __forceinline__ explicit PowerOf(float max) {
    factor = fabsf(max) > 2e38f ? 0.5f : 1.44269504f;
    base = max == -std::numeric_limits<float>::infinity()
               ? 0
               : fminf(max * factor, std::numeric_limits<float>::max());  // for x = inf it is inf, not NaN
  }
  __device__ __forceinline__ float operator()(float x) const { return fast_exp2(fmaf(x, factor, -base)); }
};

struct PowerSum {
  float max = -std::numeric_limits<float>::infinity();
  float sum = 0;  // of PowerOf(max)

  // For a maximum that is not smaller. Steps up are those between factors.
  __device__ __forceinline__ float rescaled(const PowerOf& to) const {
    const float step = PowerOf(max).base - to.base;
    return sum == 0 || step > 0 ? 0 : sum * fast_exp2(step);
  }

  template <class T, int packs>
  __device__ __forceinline__ void add(const Pack<T> (&pack)[packs]) {
    float greatest_of_all = max;
#pragma unroll
    for (int k = 0; k < packs; ++k) greatest_of_all = greatest(pack[k], greatest_of_all);
    const PowerOf power(greatest_of_all);
    float sums[4] = {rescaled(power), 0, 0, 0};
#pragma unroll
    for (int k = 0; k < packs; ++k) {
#pragma unroll
      for (int j = 0; j < Pack<T>::size; ++j) sums[j % 4] += power(widen(pack[k].values[j]));
    }
    *this = {greatest_of_all, (sums[0] + sums[1]) + (sums[2] + sums[3])};
  }

  // As the engines have it: the maximum begins at lowest().
  __device__ __forceinline__ Softmax<float> softmax() const {
    const PowerOf power(max);
    const float rounding = sum == 0 ? 0 : fmaf(max, power.factor, -power.base);
    return masked_loss::merge(Softmax<float>{}, Softmax<float>{max, sum * fast_exp2(-rounding)});
  }
};

__device__ __forceinline__ PowerSum merge(const PowerSum& a, const PowerSum& b) {
  const float max = greater(a.max, b.max);
  const PowerOf power(max);
  return {max, a.rescaled(power) + b.rescaled(power)};
}
__device__ __forceinline__ PowerSum merge_warp(const PowerSum& of) {
  const float max = greatest_of_warp(of.max);
  return {max, WarpSum{}(of.rescaled(PowerOf(max)))};
}

}  // namespace masked_loss::cuda
