#pragma once

#include "common/pointwise.h"
#include "cpu/capability.h"

namespace masked_loss::cpu {

struct OutsideDomain {
  std::int64_t at;
  double value;
};

template <class A>
struct PointwiseKernel {
  // The sum of the losses of [begin, end), and its outputs; slopes are multiplied with `factor`.
  double (*run)(const PointwiseWork<A>& work, A factor, std::int64_t begin, std::int64_t end);
};

template <class A>
struct PointwiseKernelsOf {
  PointwiseKernel<A> formulas[kPointwiseFormulas];
  // The sum of the kept sample weights of [begin, end), times the weights where those are given.
  PointwiseSum (*weigh)(const PointwiseWork<A>& work, std::int64_t begin, std::int64_t end);
  // The first kept element of an operand that its domain excludes; behind the last one if there is none.
  OutsideDomain (*find_outside_domain)(const PointwiseWork<A>& work, const Operand& operand, const Domain& domain);
};

struct PointwiseKernels {
  PointwiseKernelsOf<float> of_float;
  PointwiseKernelsOf<double> of_double;

  template <class A>
  const auto& of() const {
    if constexpr (std::is_same_v<A, float>) {
      return of_float;
    } else {
      return of_double;
    }
  }
};

MASKED_LOSS_KERNELS(const PointwiseKernels& pointwise_kernels());

}  // namespace masked_loss::cpu
