#pragma once

#include <cuda_runtime_api.h>

#include "common/softmax.h"
#include "cuda/row_regime.h"

namespace masked_loss::cuda {

// T is the device's type of the elements.
template <class T, class A>
RowFacts softmax_facts(const SoftmaxWork<T, A>& work) {
  const RowOperand operands[] = {
      {work.input, 0, work.input_stride}, {work.result, 1, work.result_stride}, {work.grad, 3, work.grad_stride}};
  return row_facts(work.rows, work.classes, sizeof(T), operands, {work.mask, 2, work.mask_stride}, work.queries > 0);
}

// How many blocks of a ring share a row; 0 where its rows are too short or too long, or do not begin alike in all
// operands.
template <class T, class A>
int softmax_ring_blocks(const SoftmaxWork<T, A>& work, SoftmaxPass pass);

RowRegime pick_softmax_regime(SoftmaxPass pass, RowFacts facts, int multiprocessors);

// What a part of a row takes in memory, where the regime has rows in parts.
template <class A>
inline constexpr std::int64_t kSoftmaxPartBytes = 2 * sizeof(A);

template <class T, class A>
void run_softmax(const SoftmaxWork<T, A>& work, SoftmaxPass pass, const RowRegime& regime, void* parts,
                 int multiprocessors, cudaStream_t stream);

}  // namespace masked_loss::cuda
