#pragma once

#include <cstdint>

#include "common/cross_entropy.h"
#include "common/rows.h"
#include "cpu/capability.h"

namespace masked_loss::cpu {

enum class CrossEntropyMode { Forward, ForwardGrad, Backward };

// Rows of classes anywhere in memory. T is the dtype of the logits, A the one it is computed in.
template <class T, class A>
struct CrossEntropyWork {
  Rows<3> rows;  // offsets of logits, gradient and class mask
  std::int64_t classes;
  const T* logits;
  std::int64_t logits_stride;  // between classes, as the two below
  T* gradient;
  std::int64_t gradient_stride;
  const bool* class_mask;  // or null
  std::int64_t class_mask_stride;
  const A* weight;            // [C] or null
  const std::int64_t* index;  // [N], -1 = masked
  const A* coefficient;       // [N]
  A label_smoothing;
  A z_loss;
  A* loss;              // [N], written forward
  Softmax<A>* softmax;  // [N] or null; written forward, read backward
};

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
