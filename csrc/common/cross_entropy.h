#pragma once

#include "rows.h"
#include "softmax.h"

namespace masked_loss {

// Sums over the allowed classes of a row that label smoothing needs; in double, so that a common offset of the
// logits cancels.
struct Smoothing {
  double logits = 0;  // sum of w_c x_c
  double weight = 0;  // sum of w_c
  std::int64_t classes = 0;

  MASKED_LOSS_HD Smoothing operator+(const Smoothing& other) const {
    return {logits + other.logits, weight + other.weight, classes + other.classes};
  }
};

template <class A>
struct CrossEntropyRow {
  A coefficient;    // sample weight x reduction x, in a backward pass, what arrives from upstream
  A target_weight;  // class weight of the target
  A label_smoothing;
  A z_loss;
  Smoothing smoothing;

  MASKED_LOSS_HD A share() const { return label_smoothing == 0 ? A(0) : label_smoothing / A(smoothing.classes); }
};

// (1 - e) w_y (lse - x_y) + e / |allowed| sum_c w_c (lse - x_c) + z w_y lse^2; +inf for a target that is not allowed.
template <class A>
MASKED_LOSS_HD A cross_entropy_loss(const CrossEntropyRow<A>& row, Softmax<A> softmax, A log_sum, A target_logit,
                                    bool target_allowed) {
  if (!target_allowed) return row.coefficient * std::numeric_limits<A>::infinity();
  const A lse = softmax.max + log_sum;
  A loss = (1 - row.label_smoothing) * row.target_weight * (log_sum - (target_logit - softmax.max));
  if (row.label_smoothing != 0) {
    const double exact = double(softmax.max) + double(log_sum);  // as float it would lose the digits that the sums keep
    loss += A(double(row.share()) * (row.smoothing.weight * exact - row.smoothing.logits));
  }
  if (row.z_loss != 0) loss += row.z_loss * row.target_weight * lse * lse;
  return row.coefficient * loss;
}

template <class A>
MASKED_LOSS_HD A cross_entropy_loss(const CrossEntropyRow<A>& row, Softmax<A> softmax, A target_logit,
                                    bool target_allowed) {
  return cross_entropy_loss(row, softmax, std::log(softmax.sum), target_logit, target_allowed);
}

// The gradient of a class is probability * p_c - smoothing * w_c, less target where it is the target.
template <class A>
struct CrossEntropyGradient {
  A probability;
  A smoothing;
  A target;
};

template <class A>
MASKED_LOSS_HD CrossEntropyGradient<A> cross_entropy_gradient(const CrossEntropyRow<A>& row, A lse) {
  const A target = (1 - row.label_smoothing) * row.target_weight;
  A probability = target + 2 * row.z_loss * row.target_weight * lse;
  if (row.label_smoothing != 0) probability += row.share() * A(row.smoothing.weight);
  // Fast exponentials lose NaN; a row without a finite log-sum-exp gets it from here.
  if (!std::isfinite(lse)) probability = std::numeric_limits<A>::quiet_NaN();
  return {row.coefficient * probability, row.coefficient * row.share(), row.coefficient * target};
}

enum class CrossEntropyMode { Forward, ForwardGrad, Backward };

// Rows of classes anywhere in memory. T is the dtype of the logits, A the one it is computed in.
template <class T, class A>
struct CrossEntropyWork {
  Rows<3> rows;  // offsets of logits, gradient and class mask
  std::int64_t classes;
  const T* logits;
  std::int64_t logits_stride;  // between classes, as the two below
  T* gradient;
  std::int64_t gradient_stride;
  const bool* class_mask;  // or null
  std::int64_t class_mask_stride;
  const A* weight;            // [C] or null
  const std::int64_t* index;  // [N], -1 = masked
  const A* coefficient;       // [N]
  A label_smoothing;
  A z_loss;
  A* loss;              // [N], written forward
  Softmax<A>* softmax;  // [N] or null; written forward, read backward
};

}  // namespace masked_loss
