#pragma once

#include <c10/util/SmallBuffer.h>

#include "common/checks.h"

namespace masked_loss::cpu {

// What every kernel over rows of classes is given of the mask and the weights.
template <class A>
struct RowPlan {
  explicit RowPlan(std::int64_t rows) : index(rows), coefficient(rows) {}

  c10::SmallBuffer<std::int64_t, 64> index;  // the target of a kept row, -1 of a masked one
  c10::SmallBuffer<A, 64> coefficient;       // sample weight x reduction
};

// A class mask as kernels read it.
struct ClassMask {
  explicit ClassMask(const RowArguments& arguments);

  Tensor mask;            // bool
  std::int64_t dim;       // of the classes in `mask`
  at::DimVector strides;  // of its rows; none for a mask [C], which all of them share
};

// Throws an IndexError for the first kept target that is out of range. A is float or double.
template <class A>
RowPlan<A> make_row_plan(const RowArguments& arguments, Reduction reduction, const OptionalTensor& normalizer);

// The sum of the kept weights.
template <class A>
double sum_of_weights(const RowArguments& arguments);

}  // namespace masked_loss::cpu
