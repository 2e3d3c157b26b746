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
    auto facts = cross_entropy_facts(of);
    facts.ring_blocks = cross_entropy_ring_blocks(of, mode);
    regime_ = pick_cross_entropy_regime(facts, cross_entropy_extras(of), device.multiprocessors);
  }

  bool lists_rows() const { return regime_.kind != RowRegime::Tiles; }

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
    if (regime_.kind == RowRegime::Packs && regime_.slices > 1) {
      const auto bytes = work.rows.count * regime_.slices * cross_entropy_part_bytes(work);
      parts = at::empty({bytes}, plan.index.options().dtype(at::kByte));
      call_.parts = parts.mutable_data_ptr();
    }
    run_cross_entropy(call_, mode_, regime_, device_.multiprocessors, device_.stream);
  }

 private:
  const CrossEntropyMode mode_;
  const Device device_;
  CrossEntropyCall<T, A> call_{};
  RowRegime regime_;
};

}  // namespace masked_loss::cuda
