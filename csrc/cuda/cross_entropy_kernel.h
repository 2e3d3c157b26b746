#pragma once

#include <cuda_runtime_api.h>

#include "common/cross_entropy.h"
#include "cuda/row_regime.h"

namespace masked_loss::cuda {

// T is the device's type of the logits. What order and kept mean is said in row_plan_kernel.h.
template <class T, class A>
struct CrossEntropyCall {
  CrossEntropyWork<T, A> work;
  const std::int64_t* order;
  const std::int64_t* kept;
  void* parts;  // [N, slices] of cross_entropy_part_bytes(work) each, where the regime has rows in parts
};

template <class T, class A>
RowFacts cross_entropy_facts(const CrossEntropyWork<T, A>& work) {
  const RowOperand operands[] = {{work.logits, 0, work.logits_stride},
                                 {work.gradient, 1, work.gradient_stride},
                                 {work.probabilities, 3, work.probabilities_stride}};
  return row_facts(work.rows, work.classes, sizeof(T), operands, {work.class_mask, 2, work.class_mask_stride}, false);
}

// What there is to say of classes, beside which one is the target.
enum class CrossEntropyExtras {
  None,
  Classes,       // a class mask or label smoothing
  Probabilities  // and class probabilities
};

template <class T, class A>
CrossEntropyExtras cross_entropy_extras(const CrossEntropyWork<T, A>& work) {
  if (work.probabilities != nullptr) return CrossEntropyExtras::Probabilities;
  const bool classes = work.class_mask != nullptr || work.label_smoothing != 0;
  return classes ? CrossEntropyExtras::Classes : CrossEntropyExtras::None;
}

// How many blocks of a ring share a row; 0 where its rows are too short or too long, or do not begin alike in all
// operands. Classes have to be contiguous.
template <class T, class A>
int cross_entropy_ring_blocks(const CrossEntropyWork<T, A>& work, CrossEntropyMode mode);

// For the current device.
RowRegime pick_cross_entropy_regime(RowFacts facts, CrossEntropyExtras extras, int multiprocessors);

template <class T, class A>
std::int64_t cross_entropy_part_bytes(const CrossEntropyWork<T, A>& work);

// The gradient may lie over the logits: what is written has been read.
template <class T, class A>
void run_cross_entropy(const CrossEntropyCall<T, A>& call, CrossEntropyMode mode, const RowRegime& regime,
                       int multiprocessors, cudaStream_t stream);

// gradient *= by, which is read on the device, but a zero stays +0 whatever the factor; of n elements side by side.
template <class T, class A>
void scale_gradient(T* gradient, std::int64_t n, const A* by, int multiprocessors, cudaStream_t stream);

}  // namespace masked_loss::cuda
