#pragma once

#include <cstdint>

#include "common/cross_entropy.h"
#include "cpu/capability.h"
#include "cpu/kernel_table.h"
#include "cpu/row_kernel.h"

namespace masked_loss::cpu {

template <class T, class A>
struct CrossEntropyKernel {
  // Of the work, index, coefficient, loss and softmax are those of the rows that a call is given.
  RowKernel<CrossEntropyWork<T, A>, CrossEntropyMode> rows;

  // to = from * by, but a zero stays +0 whatever the factor; `to` may be `from`
  void (*scale)(T* to, const T* from, std::int64_t n, A by);
};

using CrossEntropyKernels = KernelTable<CrossEntropyKernel<float, float>, CrossEntropyKernel<double, double>,
                                        CrossEntropyKernel<at::BFloat16, float>, CrossEntropyKernel<at::Half, float>>;

MASKED_LOSS_KERNELS(const CrossEntropyKernels& cross_entropy_kernels());

}  // namespace masked_loss::cpu
