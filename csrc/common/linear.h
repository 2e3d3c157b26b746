#pragma once

#include "cross_entropy.h"
#include "divergence.h"

namespace masked_loss {

// What some classes of a row add up to: enough for its cross entropy and its entropy. States of parts of a row merge:
// blocks of classes on one device, slices of a vocabulary on several.
template <class A>
struct LinearRow {
  Softmax<A> softmax;
  A weighted = 0;      // the sum of exp(z - max) (z - max)
  A target_logit = 0;  // of the part that has the target
  bool target_allowed = false;
  ClassSums smoothing;
};

template <class A>
MASKED_LOSS_HD A weighted_at(const Softmax<A>& softmax, A weighted, A max) {
  if (softmax.sum == 0 || softmax.max == max) return weighted;
  const A shift = softmax.max - max;
  return std::exp(shift) * (weighted + softmax.sum * shift);
}

template <class A>
MASKED_LOSS_HD LinearRow<A> merge(const LinearRow<A>& a, const LinearRow<A>& b) {
  LinearRow<A> both;
  both.softmax = merge(a.softmax, b.softmax);
  const A max = both.softmax.max;
  both.weighted = weighted_at(a.softmax, a.weighted, max) + weighted_at(b.softmax, b.weighted, max);
  both.target_logit = a.target_logit + b.target_logit;
  both.target_allowed = a.target_allowed || b.target_allowed;
  both.smoothing = a.smoothing + b.smoothing;
  return both;
}

// What a backward pass needs of a row, as numbers in a tensor: those of its softmax, the mean of z - max, and of label
// smoothing the number of allowed classes and the sum of their weights.
inline constexpr std::int64_t kLinearState = 5;
template <class A>
struct LinearSaved {
  Softmax<A> softmax;
  A mean = 0;
  A classes = 0;
  A weight = 0;
};

template <class A>
MASKED_LOSS_HD LinearSaved<A> saved_of(const LinearRow<A>& row) {
  return {row.softmax, row.weighted / row.softmax.sum, A(row.smoothing.classes), A(row.smoothing.weight)};
}

// Of p_c = exp(z_c - max) / sum it is p_c (probability + entropy (z_c - max)) less what CrossEntropyGradient says.
template <class A>
struct LinearGradient {
  CrossEntropyGradient<A> loss;  // its probability divided by the sum
  A entropy;                     // divided by the sum too
};

// `row` has the coefficient with what arrives from upstream at the loss, `entropy_grad` arrives at the entropy:
// dH / dz_c = -p_c (z_c - max - mean).
template <class A>
MASKED_LOSS_HD LinearGradient<A> linear_gradient(const CrossEntropyRow<A>& row, const LinearSaved<A>& saved,
                                                 A entropy_grad) {
  const A lse = log_sum_exp(saved.softmax);
  LinearGradient<A> gradient{cross_entropy_gradient(row, lse, row.target_weight), -entropy_grad / saved.softmax.sum};
  gradient.loss.probability = (gradient.loss.probability + entropy_grad * saved.mean) / saved.softmax.sum;
  return gradient;
}

// exp(z - max) is 0 below: what it is multiplied by is no -inf.
inline constexpr int kLowestShift = -1000;

enum class LinearMode { Visit, Write };

// From the states of rows that have been seen.
template <class A>
struct LinearConclusion {
  const LinearRow<A>* state;
  const std::int64_t* target;  // below 0 where a row is not there
  const A* coefficient;
  const A* target_weight;  // or null
  A label_smoothing;
  A z_loss;
  A *loss, *entropy;
  LinearSaved<A>* saved;

  MASKED_LOSS_HD void operator()(std::int64_t r) const {
    const auto& seen = state[r];
    saved[r] = saved_of(seen);
    if (target[r] < 0) {
      loss[r] = entropy[r] = 0;
      return;
    }
    const CrossEntropyRow<A> row{coefficient[r], target_weight == nullptr ? A(1) : target_weight[r], label_smoothing,
                                 z_loss, seen.smoothing};
    const A log_sum = std::log(seen.softmax.sum);
    loss[r] = cross_entropy_loss(row, seen.softmax, log_sum, seen.target_logit, seen.target_allowed);
    // A target out of range, where that is no error, has a coefficient of NaN.
    entropy[r] = coefficient[r] != coefficient[r] ? coefficient[r] : log_sum - saved[r].mean;
  }
};

// Rows of blocks of logits, one after the other in memory, and what is known of each row.
template <class A>
struct LinearWork {
  Rows<4> rows;          // offsets of logits, gradient and class mask
  std::int64_t classes;  // of the block
  std::int64_t first;    // the class that it begins with
  const A* logits;
  A* gradient;                     // may lie over the logits
  const std::uint8_t* class_mask;  // or null
  const A* weight;                 // of the block's classes, or null
  const std::int64_t* target;      // [K]
  LinearRow<A>* state;             // [K]: of the first block, then merged with those of others
  const LinearSaved<A>* saved;     // [K], as the two below
  const A* coefficient;            // with what arrives from upstream
  const A* entropy_grad;           // or null
  const A* target_weight;          // or null
  A label_smoothing;
  A z_loss;
};

// All classes of some rows, one after the other in memory, by two heads.
template <class A>
struct DivergenceWork {
  std::int64_t rows, classes;
  A *logits, *target_logits;       // those of masked classes become -inf
  A *gradient, *target_gradient;   // may lie over the logits; or null
  const std::uint8_t* class_mask;  // or null
  std::int64_t class_mask_stride;  // between rows
  const std::int64_t* index;       // of each row, below 0 where it is not there
  const A* coefficient;
  A* loss;
  A beta;
};

}  // namespace masked_loss
