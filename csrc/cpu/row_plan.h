#pragma once

#include <c10/util/SmallBuffer.h>

#include "common/row_view.h"

namespace masked_loss::cpu {

// What every kernel over rows of classes is given of the mask and the weights.
template <class A>
struct RowPlan {
  explicit RowPlan(std::int64_t rows) : index(rows), coefficient(rows) {}

  c10::SmallBuffer<std::int64_t, 64> index;  // the target of a kept row, -1 of a masked one
  c10::SmallBuffer<A, 64> coefficient;       // sample weight x reduction
};

// Throws an IndexError for the first kept target that is out of range. A is float or double.
template <class A>
RowPlan<A> make_row_plan(const RowView<A>& from, Reduction reduction, const OptionalTensor& normalizer);

// The sum of the kept weights.
template <class A>
double sum_of_weights(const RowView<A>& from);

}  // namespace masked_loss::cpu
