#pragma once

#include "common/softmax.h"
#include "cpu/capability.h"
#include "cpu/kernel_table.h"
#include "cpu/row_kernel.h"

namespace masked_loss::cpu {

template <class T, class A>
using SoftmaxKernel = RowKernel<SoftmaxWork<T, A>, SoftmaxPass>;

using SoftmaxKernels = KernelTable<SoftmaxKernel<float, float>, SoftmaxKernel<double, double>,
                                   SoftmaxKernel<at::BFloat16, float>, SoftmaxKernel<at::Half, float>>;

MASKED_LOSS_KERNELS(const SoftmaxKernels& softmax_kernels());

}  // namespace masked_loss::cpu
