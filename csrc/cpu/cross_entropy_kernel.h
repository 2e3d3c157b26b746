#pragma once

#include <cstdint>

#include "common/cross_entropy.h"
#include "cpu/capability.h"

namespace masked_loss::cpu {

// Works on the rows [begin, end); `scratch` holds scratch_size(work) elements.
template <class T, class A>
struct CrossEntropyKernel {
  using Run = void(const CrossEntropyWork<T, A>& work, CrossEntropyMode mode, std::int64_t begin, std::int64_t end,
                   A* scratch);
  Run* run;
  std::int64_t (*scratch_size)(const CrossEntropyWork<T, A>& work, CrossEntropyMode mode);
  // gradient *= by, but a zero stays +0 whatever the factor
  void (*scale)(T* gradient, std::int64_t n, A by);
};

struct CrossEntropyKernels {
  CrossEntropyKernel<float, float> of_float;
  CrossEntropyKernel<double, double> of_double;
  CrossEntropyKernel<at::BFloat16, float> of_bfloat16;
  CrossEntropyKernel<at::Half, float> of_half;

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

MASKED_LOSS_KERNELS(const CrossEntropyKernels& cross_entropy_kernels());

}  // namespace masked_loss::cpu
