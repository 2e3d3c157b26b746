#pragma once

#include <cstdint>

#include "common/softmax_work.h"
#include "cpu/capability.h"
#include "cpu/kernel_table.h"

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

using SoftmaxKernels = KernelTable<SoftmaxKernel<float, float>, SoftmaxKernel<double, double>,
                                   SoftmaxKernel<at::BFloat16, float>, SoftmaxKernel<at::Half, float>>;

MASKED_LOSS_KERNELS(const SoftmaxKernels& softmax_kernels());

}  // namespace masked_loss::cpu
