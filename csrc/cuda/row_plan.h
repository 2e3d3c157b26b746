#pragma once

#include "common/row_view.h"
#include "cuda/row_plan_kernel.h"
#include "cuda/stream.h"

namespace masked_loss::cuda {

// What every kernel over rows of classes is given of the mask and the weights, on the device.
template <class A>
struct RowPlan {
  Tensor index, coefficient;  // [N], see row_plan_kernel.h
  Tensor order, kept;         // undefined where they were not asked for
};

struct RowPlanWishes {
  Reduction reduction;
  OptionalTensor normalizer;
  bool order = false;       // lists the kept rows first
  OptionalTensor upstream;  // [N, ...] or expanded to it, in the accumulation dtype: multiplies the coefficients
  Tensor loss, softmax;     // contiguous, written where a row is masked
};

// A target out of range gives its row a coefficient of NaN; with MASKED_LOSS_CHECK=1 in the environment an IndexError.
template <class A>
RowPlan<A> make_row_plan(const RowView<A>& from, const RowPlanWishes& wishes, const Device& device);

// The sum of the kept weights, 0-d, in A's dtype.
template <class A>
Tensor sum_of_weights(const RowView<A>& from, const Device& device);

// Throws an IndexError for the first kept target that is out of range. Waits for the device.
void check_rows(const RowView<float>& from, const Device& device);

// The sum of a contiguous tensor in A's dtype.
template <class A>
Tensor sum_of_losses(const Tensor& losses, const Device& device);

}  // namespace masked_loss::cuda
