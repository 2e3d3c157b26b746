#pragma once

#include <cuda_runtime_api.h>

#include "common/softmax.h"
#include "cuda/row_regime.h"

namespace masked_loss::cuda {

// T is the device's type of the elements.
template <class T, class A>
RowFacts softmax_facts(const SoftmaxWork<T, A>& work) {
  const RowOperand operands[] = {
      {work.input, 0, work.input_stride}, {work.grad, 1, work.grad_stride}, {work.result, 2, work.result_stride}};
  return row_facts(work.rows, work.classes, sizeof(T), operands, {work.mask, 3, work.mask_stride}, work.queries > 0);
}

RowRegime pick_softmax_regime(SoftmaxPass pass, const RowFacts& facts, int multiprocessors);

// What a part of a row takes in memory, where the regime has rows in parts.
template <class A>
inline constexpr std::int64_t kSoftmaxPartBytes = 2 * sizeof(A);

template <class T, class A>
void run_softmax(const SoftmaxWork<T, A>& work, SoftmaxPass pass, const RowRegime& regime, void* parts,
                 int multiprocessors, cudaStream_t stream);

}  // namespace masked_loss::cuda
