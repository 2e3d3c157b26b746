#pragma once

#include <c10/util/SmallVector.h>

#include "common/row_view.h"

namespace masked_loss::cpu {

// What every kernel over rows of classes is given of the mask and the weights. Rows are planned where they are needed:
// a list of all of them would cost more to write and to read than the targets and masks that it is made from.
template <class A>
class RowPlan {
 public:
  // Throws an IndexError for the first kept target that is out of range. A is float or double; refers to `from`.
  RowPlan(const RowView<A>& from, Reduction reduction, const OptionalTensor& normalizer);

  // Of rows [begin, end): the target of a kept one, -1 of a masked one; and sample weight x reduction.
  void operator()(std::int64_t begin, std::int64_t end, std::int64_t* index, A* coefficient) const;

 private:
  const RowView<A>& from_;
  std::int64_t rows_each_;                     // of a divisor
  c10::SmallVector<double, 4> divisors_ = {};  // one, or one for each sequence
};

// The sum of the kept weights.
template <class A>
double sum_of_weights(const RowView<A>& from);

}  // namespace masked_loss::cpu
