#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>

#include "common/softmax_work.h"
#include "cpu/capability.h"

namespace masked_loss::cpu {

template <class T, class A>
struct SoftmaxKernel {
  using Work = SoftmaxWork<T, A>;

  // Works on the rows [begin, end); `scratch` is that many bytes of scratch_size(work, pass), at the begin of a cache
  // line.
  void (*run)(const Work& work, SoftmaxPass pass, std::int64_t begin, std::int64_t end, char* scratch);
  std::int64_t (*scratch_size)(const Work& work, SoftmaxPass pass);
  std::int64_t (*rows_at_once)(const Work& work,
                               SoftmaxPass pass);  // of which there should be whole multiples in [begin, end)
};

struct SoftmaxKernels {
  SoftmaxKernel<float, float> of_float;
  SoftmaxKernel<double, double> of_double;
  SoftmaxKernel<at::BFloat16, float> of_bfloat16;
  SoftmaxKernel<at::Half, float> of_half;

  template <class T>
  const auto& of() const {
    if constexpr (std::is_same_v<T, float>) {
      return of_float;
    } else if constexpr (std::is_same_v<T, double>) {
      return of_double;
    } else if constexpr (std::is_same_v<T, at::BFloat16>) {
      return of_bfloat16;
    } else {
      return of_half;
    }
  }
};

MASKED_LOSS_KERNELS(const SoftmaxKernels& softmax_kernels());

}  // namespace masked_loss::cpu
