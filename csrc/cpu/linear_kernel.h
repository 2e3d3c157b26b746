#pragma once

#include <array>
#include <cstdint>

#include "common/linear.h"
#include "cpu/capability.h"
#include "cpu/kernel_table.h"
#include "cpu/row_kernel.h"

namespace masked_loss::cpu {

template <class A>
struct LinearKernel {
  RowKernel<LinearWork<A>, LinearMode> rows;

  // Of the rows [begin, end), by kind.
  std::array<void (*)(const DivergenceWork<A>& work, std::int64_t begin, std::int64_t end), 3> divergence;

  // x = cap tanh(x / cap) / temperature; a cap of 0 is none
  void (*soften)(A* x, std::int64_t n, A cap, A temperature);
};

// to = gradient times the derivative of what was softened to x; a zero stays +0. `to` may be the gradient.
template <class T, class A>
using Harden = void (*)(T* to, const A* gradient, const A* x, std::int64_t n, A cap, A temperature);

struct LinearKernels {
  LinearKernel<float> of_float;
  LinearKernel<double> of_double;
  KernelTable<Harden<float, float>, Harden<double, double>, Harden<at::BFloat16, float>, Harden<at::Half, float>>
      harden;

  template <class A>
  const LinearKernel<A>& of() const {
    if constexpr (std::is_same_v<A, float>) {
      return of_float;
    } else {
      return of_double;
    }
  }
};

MASKED_LOSS_KERNELS(const LinearKernels& linear_kernels());

}  // namespace masked_loss::cpu
