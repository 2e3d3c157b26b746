#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "rows.h"

namespace masked_loss {

// Keeps NaN, unlike std::max.
template <class A>
MASKED_LOSS_HD A max_or_nan(A a, A b) {
  return a > b || a != a ? a : b;
}

// The softmax of the part of a row that has been seen. max starts at lowest(): -inf would give -inf - -inf.
template <class A>
struct Softmax {
  A max = std::numeric_limits<A>::lowest();
  A sum = 0;  // of exp(x - max)
};

template <class A>
MASKED_LOSS_HD Softmax<A> merge(Softmax<A> a, Softmax<A> b) {
  const A max = max_or_nan(a.max, b.max);
  return {max, a.sum * std::exp(a.max - max) + b.sum * std::exp(b.max - max)};
}

template <class A>
MASKED_LOSS_HD A log_sum_exp(Softmax<A> softmax) {
  return softmax.max + std::log(softmax.sum);
}

enum class SoftmaxPass { Softmax, LogSoftmax, Logsumexp, SoftmaxBackward, LogSoftmaxBackward, LogsumexpBackward };

// Rows of classes anywhere in memory, of which a mask and causality keep some. T is the dtype of the elements, A the
// one they are computed in.
template <class T, class A>
struct SoftmaxWork {
  Rows<4> rows;  // offsets of input, result, mask and grad
  std::int64_t classes;
  std::int64_t queries;  // row r keeps its first r % queries + 1 classes; 0: all
  Quotient by_queries;
  const T* input;            // backward passes of softmax and log_softmax: what they gave
  const T* grad;             // backward passes of these two
  T* result;                 // but of logsumexp
  const std::uint8_t* mask;  // or null; a byte each, which keeps where it is not 0
  std::int64_t input_stride, grad_stride, result_stride, mask_stride;  // between classes
  A* reduced;         // [N] of logsumexp: written forward, read backward
  const A* row_grad;  // [N] logsumexp, backward

  MASKED_LOSS_HD std::int64_t causal_end(std::int64_t row) const {
    if (queries == 0) return classes;
    const std::int64_t end = row - by_queries(row) * queries + 1;
    return end < classes ? end : classes;
  }
};

}  // namespace masked_loss
