#pragma once

#include <algorithm>
#include <cstdint>
#include <tuple>

#include "operand.h"
#include "pointwise.h"

namespace masked_loss {

inline constexpr int kPointwiseNumbers = 4;
inline constexpr std::size_t kPointwiseFormulas = std::tuple_size_v<PointwiseFormulas>;

// Elements of a loss that is computed in A. What is kept has a mask and a sample weight other than 0.
template <class A>
struct PointwiseWork {
  std::int64_t count;
  Operand input, target, other, mask, sample_weight, weight;
  Operand share;        // of each sequence in the mean: multiplies the sample weight, and drops where it is 0
  Operand coefficient;  // what arrives from upstream: multiplies losses and slopes
  double numbers[kPointwiseNumbers];
  // Contiguous; the loss in A, the gradients in the type of the input. Null: not wanted.
  A* loss;
  void* gradient;
  void* other_gradient;
};

struct PointwiseSum {
  double weight = 0;
  std::int64_t kept = 0;
};

}  // namespace masked_loss
