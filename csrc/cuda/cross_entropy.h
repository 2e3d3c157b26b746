#pragma once

#include <ATen/ops/empty.h>

#include "common/cross_entropy_operands.h"
#include "cuda/cross_entropy_kernel.h"
#include "cuda/row_plan.h"
#include "cuda/stream.h"

namespace masked_loss::cuda {

// A call's kernels, once its tensors are there. The work's plan and results are still to be set.
template <class T>
class CrossEntropyRun {
 public:
  using A = Accumulation<T>;

  CrossEntropyRun(const CrossEntropyWork<T, A>& of, CrossEntropyMode mode, const Device& device)
      : mode_(mode), device_(device) {
    call_.work = of;
    const auto& work = call_.work;
    const bool contiguous = work.logits_stride == 1 && work.gradient_stride == 1 && work.class_mask_stride == 1 &&
                            work.probabilities_stride == 1;
    regime_ = pick_cross_entropy_regime(mode, work.rows.count, work.classes, sizeof(T), contiguous,
                                        cross_entropy_ring_blocks(work, mode), device.multiprocessors);
  }

  bool lists_rows() const { return regime_.kind != CrossEntropyRegime::Lanes; }

  // Whether a gradient may lie over its logits: a row is read before any of it is written.
  bool works_in_place() const {
    return regime_.kind == CrossEntropyRegime::Packs || regime_.kind == CrossEntropyRegime::Ring;
  }

  // Rows that are split need the softmax for the gradient's pass.
  bool keeps_softmax() const {
    return regime_.kind == CrossEntropyRegime::Slices && mode_ == CrossEntropyMode::ForwardGrad;
  }

  void operator()(const RowPlan<A>& plan, const Tensor& loss, const Tensor& softmax) {
    auto& work = call_.work;
    work.index = plan.index.template const_data_ptr<std::int64_t>();
    work.coefficient = plan.coefficient.template const_data_ptr<A>();
    if (loss.defined()) work.loss = loss.template mutable_data_ptr<A>();
    work.softmax = softmax_of<A>(softmax);
    Tensor parts;
    if (lists_rows()) {
      call_.order = plan.order.template const_data_ptr<std::int64_t>();
      call_.kept = plan.kept.template const_data_ptr<std::int64_t>();
    }
    if (regime_.kind == CrossEntropyRegime::Slices && mode_ != CrossEntropyMode::Backward) {
      const auto bytes = work.rows.count * regime_.slices * static_cast<std::int64_t>(sizeof(RowPart<A>));
      parts = at::empty({bytes}, plan.index.options().dtype(at::kByte));
      call_.parts = reinterpret_cast<RowPart<A>*>(parts.data_ptr<std::uint8_t>());
    }
    run_cross_entropy(call_, mode_, regime_, device_.multiprocessors, device_.stream);
  }

 private:
  const CrossEntropyMode mode_;
  const Device device_;
  CrossEntropyCall<T, A> call_{};
  CrossEntropyRegime regime_;
};

}  // namespace masked_loss::cuda
