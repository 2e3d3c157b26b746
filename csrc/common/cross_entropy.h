#pragma once

#include "rows.h"
#include "softmax.h"

namespace masked_loss {

// Sums over the allowed classes of a row, with the weights w_c for label smoothing, w_c q_c for class probabilities; in
// double, so that a common offset of the logits cancels.
struct ClassSums {
  double logits = 0;         // sum of the weights times x_c
  double weight = 0;         // sum of the weights
  std::int64_t classes = 0;  // allowed ones; of class probabilities, not 0 where one is positive and not allowed

  MASKED_LOSS_HD ClassSums operator+(const ClassSums& other) const {
    return {logits + other.logits, weight + other.weight, classes + other.classes};
  }
};

template <class A>
struct CrossEntropyRow {
  A coefficient;    // sample weight x reduction x, in a backward pass, what arrives from upstream
  A target_weight;  // class weight of the target; 1 with class probabilities
  A label_smoothing;
  A z_loss;
  ClassSums smoothing;

  MASKED_LOSS_HD A share() const { return label_smoothing == 0 ? A(0) : label_smoothing / A(smoothing.classes); }
};

// The sum of weights times (lse - x_c). As float, lse would lose the digits that the sums keep. Where the logits that
// have weight are all the largest one, what their huge sums round to is not theirs.
template <class A>
MASKED_LOSS_HD double weighted_cost(const ClassSums& sums, Softmax<A> softmax, A log_sum) {
  constexpr double rounding = 1.0 / (std::int64_t{1} << 48);
  const double largest = sums.weight * double(softmax.max), below = largest - sums.logits;
  const bool cancelled = std::abs(below) < rounding * std::abs(largest);
  return (cancelled ? 0 : below) + sums.weight * double(log_sum);
}

// (1 - e) cost + e / |allowed| sum_c w_c (lse - x_c) + z w_y lse^2, the cost being that of the target; +inf for a
// target that is not allowed.
template <class A>
MASKED_LOSS_HD A cross_entropy_loss(const CrossEntropyRow<A>& row, Softmax<A> softmax, A log_sum, bool target_allowed,
                                    A cost) {
  if (!target_allowed) return row.coefficient * std::numeric_limits<A>::infinity();
  const A lse = softmax.max + log_sum;
  A loss = (1 - row.label_smoothing) * cost;
  if (row.label_smoothing != 0) loss += A(double(row.share()) * weighted_cost(row.smoothing, softmax, log_sum));
  if (row.z_loss != 0) loss += row.z_loss * row.target_weight * lse * lse;
  return row.coefficient * loss;
}

// Of class indices: the cost is w_y (lse - x_y).
template <class A>
MASKED_LOSS_HD A cross_entropy_loss(const CrossEntropyRow<A>& row, Softmax<A> softmax, A log_sum, A target_logit,
                                    bool target_allowed) {
  return cross_entropy_loss(row, softmax, log_sum, target_allowed,
                            row.target_weight * (log_sum - (target_logit - softmax.max)));
}

// Of class probabilities: the cost is sum_c w_c q_c (lse - x_c).
template <class A>
MASKED_LOSS_HD A cross_entropy_loss(const CrossEntropyRow<A>& row, Softmax<A> softmax, A log_sum,
                                    const ClassSums& target) {
  A cost = A(weighted_cost(target, softmax, log_sum));
  // 0 times inf is NaN, but smoothing gives that class a probability, and the row a loss of inf.
  constexpr double infinity = std::numeric_limits<double>::infinity();
  if (row.label_smoothing != 0 && weighted_cost(row.smoothing, softmax, log_sum) == infinity) cost = 0;
  return cross_entropy_loss(row, softmax, log_sum, target.classes == 0, cost);
}

// The gradient of a class is probability * p_c - smoothing * w_c, less target where it is the target, or less
// target * w_c q_c.
template <class A>
struct CrossEntropyGradient {
  A probability;
  A smoothing;
  A target;
};

// `target_sum`: of what the target takes from all classes, w_y or the sum of w_c q_c.
template <class A>
MASKED_LOSS_HD CrossEntropyGradient<A> cross_entropy_gradient(const CrossEntropyRow<A>& row, A lse, A target_sum) {
  const A target = (1 - row.label_smoothing) * row.target_weight;
  A probability = (1 - row.label_smoothing) * target_sum + 2 * row.z_loss * row.target_weight * lse;
  if (row.label_smoothing != 0) probability += row.share() * A(row.smoothing.weight);
  // Fast exponentials lose NaN; a row without a finite log-sum-exp gets it from here.
  if (!std::isfinite(lse)) probability = std::numeric_limits<A>::quiet_NaN();
  return {row.coefficient * probability, row.coefficient * row.share(), row.coefficient * target};
}

enum class CrossEntropyMode { Forward, ForwardGrad, Backward };

// Rows of classes anywhere in memory. T is the dtype of the logits, A the one it is computed in.
template <class T, class A>
struct CrossEntropyWork {
  Rows<4> rows;  // offsets of logits, gradient, class mask and probabilities
  std::int64_t classes;
  const T* logits;
  std::int64_t logits_stride;  // between classes, as the two below
  T* gradient;
  std::int64_t gradient_stride;
  const std::uint8_t* class_mask;  // or null; a byte each, which allows where it is not 0
  std::int64_t class_mask_stride;
  const T* probabilities;  // of the classes, or null: the plan has the target
  std::int64_t probabilities_stride;
  const A* weight;            // [C] or null
  const std::int64_t* index;  // [N], -1 = masked; 0 = kept where there are probabilities
  const A* coefficient;       // [N]
  A label_smoothing;
  A z_loss;
  A* loss;                     // [N], written forward
  Softmax<A>* softmax;         // [N] or null; written forward, read backward
  const std::int64_t* listed;  // [count] of the rows, which alone are visited: N is their count then; null: all
  std::int64_t listed_count;

  std::int64_t count() const { return listed == nullptr ? rows.count : listed_count; }
};

}  // namespace masked_loss
