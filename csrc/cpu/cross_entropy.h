#pragma once

#include "common/cross_entropy_operands.h"
#include "cpu/cross_entropy_kernel.h"
#include "cpu/row_driver.h"

namespace masked_loss::cpu {

inline const CrossEntropyKernels& cross_entropy_kernels() {
  static const auto& picked = MASKED_LOSS_PICK(cross_entropy_kernels);
  return picked;
}

template <class A>
double sum(const A* x, std::int64_t n) {
  double lanes[8] = {};
  std::int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    for (int k = 0; k < 8; ++k) lanes[k] += double(x[i + k]);
  }
  for (; i < n; ++i) lanes[i % 8] += double(x[i]);
  return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

// What is known of some rows, beginning with their first, where a kernel looks for it.
template <class T, class A>
class PlannedRows {
 public:
  PlannedRows(const CrossEntropyWork<T, A>& work, std::int64_t most)
      : work_(work), planned_(work), index_(most), coefficient_(most), losses_(work.loss == nullptr ? most : 0) {}

  template <class Plan>
  const CrossEntropyWork<T, A>& operator()(const Plan& plan, std::int64_t begin, std::int64_t end) {
    plan(begin, end, index_.data(), coefficient_.data());
    planned_.index = index_.data();
    planned_.coefficient = coefficient_.data();
    planned_.loss = work_.loss == nullptr ? losses_.data() : work_.loss + begin;
    planned_.softmax = work_.softmax == nullptr ? nullptr : work_.softmax + begin;
    return planned_;
  }

 private:
  const CrossEntropyWork<T, A>& work_;
  CrossEntropyWork<T, A> planned_;
  c10::SmallBuffer<std::int64_t, 64> index_;
  c10::SmallBuffer<A, 64> coefficient_, losses_;
};

// -> the sum of the losses, unless `work` says where they go. `plan` is a RowPlan, or like one: it is asked for the
// rows that the work visits by their positions. The gradient may lie over the logits, and over nothing else.
template <class T, class A, class Plan>
double run_cross_entropy(const CrossEntropyWork<T, A>& work, CrossEntropyMode mode, const Plan& plan) {
  if (work.gradient != nullptr && work.gradient == work.logits) {
    bool alike = work.gradient_stride == work.logits_stride && work.probabilities != work.logits;
    for (int d = 0; d < work.rows.dims; ++d) alike = alike && work.rows.strides[0][d] == work.rows.strides[1][d];
    TORCH_INTERNAL_ASSERT(alike, "a gradient lies over its logits in another order");
  }
  const RowDriver driver(cross_entropy_kernels().of<T>().rows, work, mode, work.count());
  const bool sums_losses = work.loss == nullptr && mode != CrossEntropyMode::Backward;
  c10::SmallVector<double, 8> sums(driver.tasks());
  driver([&] {
    return [&, planned_rows = PlannedRows<T, A>(work, driver.task_rows())](auto task, auto begin, auto end,
                                                                           const auto& run) mutable {
      const auto& planned = planned_rows(plan, begin, end);
      run(planned);
      if (sums_losses) sums[task] = sum(planned.loss, end - begin);
    };
  });
  return sum(sums.data(), sums.size());
}

}  // namespace masked_loss::cpu
