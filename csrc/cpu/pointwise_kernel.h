#pragma once

#include <cstdint>
#include <tuple>

#include "common/pointwise.h"
#include "common/rows.h"
#include "cpu/capability.h"

namespace masked_loss::cpu {

enum class ElementType { Float, Double, BFloat16, Half, Byte };

// A tensor with the loss's shape, whatever its strides; without data there is none.
struct Operand {
  const void* data = nullptr;
  ElementType type;
  Rows<1> at;  // its elements in the order of the loss's
};

// Elements of a loss that is computed in A. What is kept has a mask and a sample weight other than 0.
template <class A>
struct PointwiseWork {
  std::int64_t count;
  Operand input, target, other, mask, sample_weight, weight;
  Operand share;        // of each sequence in the mean: multiplies the sample weight, and drops where it is 0
  Operand coefficient;  // what arrives from upstream: multiplies losses and slopes
  A factor;             // multiplies slopes: 1 over what a mean divides by
  const double* numbers;
  // Contiguous; the loss in A, the gradients in the type of the input. Null: not wanted.
  A* loss;
  void* gradient;
  void* other_gradient;
};

struct PointwiseSum {
  double weight = 0;
  std::int64_t kept = 0;
};

template <class A>
struct PointwiseKernel {
  // The sum of the losses of [begin, end), and its outputs.
  double (*run)(const PointwiseWork<A>& work, std::int64_t begin, std::int64_t end);
};

inline constexpr std::size_t kPointwiseFormulas = std::tuple_size_v<PointwiseFormulas>;

template <class A>
struct PointwiseKernelsOf {
  PointwiseKernel<A> formulas[kPointwiseFormulas];
  // The sum of the kept sample weights of [begin, end), times the weights where those are given.
  PointwiseSum (*weigh)(const PointwiseWork<A>& work, std::int64_t begin, std::int64_t end);
  // The first kept element of [begin, end) that does not fit the formula, or end.
  std::int64_t (*find_unfit)(const PointwiseWork<A>& work, bool (*fits)(double, double), std::int64_t begin,
                             std::int64_t end);
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
