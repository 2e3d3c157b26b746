#pragma once

#include "checks.h"
#include "row_plan.h"
#include "rows.h"

namespace masked_loss {

// The arguments that decide about rows, as the kernels of any device read them, whatever their strides. A is the dtype
// of the weights, float or double. Refers to the arguments, and owns what had to be converted.
template <class A>
struct RowView {
  explicit RowView(const RowArguments& arguments);

  const RowArguments& arguments;
  const at::DimVector sizes;  // of the rows
  RowArgumentsView<A> view;
  Rows<4> rows;  // offsets of target, mask, sample weight and class mask

  Tensor target;  // the class indices; one that all rows share with class probabilities
  Tensor mask, sample_weight, weight, class_mask;  // undefined: not given; the class mask has bytes
  std::int64_t class_mask_dim = 0;                 // of the classes in it
  at::DimVector class_mask_strides;                // of its rows; none for a mask [C], which all of them share
};

}  // namespace masked_loss
