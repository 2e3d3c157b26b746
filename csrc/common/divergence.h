#pragma once

#include "scalar_math.h"
#include "softmax.h"

namespace masked_loss {

enum class DivergenceKind {
  Forward,  // KL(target || input)
  Reverse,  // KL(input || target)
  Mixture,  // beta KL(target || m) + (1 - beta) KL(input || m) of m = beta target + (1 - beta) input
};

// What is added up over the classes of a row: KL(target || .) and KL(input || .), of which a kind uses one or both.
template <class V>
struct DivergenceSums {
  V target, input;
};

// A row, once its probabilities are known.
template <class A>
struct DivergenceRow {
  Softmax<A> input, target;
  A offset;  // log(target.sum) - log(input.sum)
  A beta;
  DivergenceSums<A> sums;
  A coefficient;

  MASKED_LOSS_HD DivergenceRow(const Softmax<A>& input, const Softmax<A>& target, A beta, A coefficient)
      : input(input),
        target(target),
        offset(std::log(target.sum) - std::log(input.sum)),
        beta(beta),
        sums{0, 0},
        coefficient(coefficient) {}

  // Never below 0, which rounding could leave.
  template <DivergenceKind kind>
  MASKED_LOSS_HD A value() const {
    const A sum = kind == DivergenceKind::Forward   ? sums.target
                  : kind == DivergenceKind::Reverse ? sums.input
                                                    : beta * sums.target + (1 - beta) * sums.input;
    return sum < 0 ? A(0) : sum;
  }
};

// The arithmetic of one class, M being ScalarMath or the same on vectors.
//
// A KL is summed as p log(p / q) - p + q, whose last two terms cancel over a row: none of them is negative, what is
// equal gives exactly 0, and an error of the logarithms, which is that of the logits, counts by its square alone.
template <class M, DivergenceKind kind>
struct ClassDivergence {
  using V = typename M::V;

  V p, q;        // probabilities by input and target
  V d;           // log q - log p; 0 where both are 0
  V of_p, of_q;  // of a mixture m: log p - log m, log q - log m

  // From the logits, less their maxima.
  template <class A>
  MASKED_LOSS_HD ClassDivergence(V x, V t, const DivergenceRow<A>& row) : of_p(0), of_q(0) {
    const V zero(0);
    p = M::exp_of_negative(x) * V(1 / row.input.sum);
    q = M::exp_of_negative(t) * V(1 / row.target.sum);
    d = M::where(M::equal(q, zero), M::where(M::equal(p, zero), zero, t - x - V(row.offset)), t - x - V(row.offset));
    if constexpr (kind == DivergenceKind::Mixture) {
      // Beyond, the smaller probability counts no more, and its exponential would be too large.
      const V most(sizeof(A) == 4 ? A(80) : A(700));
      const V near = M::where(M::less(most, d), most, M::where(M::less(d, zero - most), zero - most, d));
      of_q = zero - M::log1p(V(1 - row.beta) * M::expm1(zero - near));
      of_p = zero - M::log1p(V(row.beta) * M::expm1(near));
    }
  }

  template <class A>
  MASKED_LOSS_HD DivergenceSums<V> terms(const DivergenceRow<A>& row) const {
    if constexpr (kind == DivergenceKind::Forward) return {term(q, p, d), V(0)};
    if constexpr (kind == DivergenceKind::Reverse) return {V(0), term(p, q, V(0) - d)};
    const V m = p + V(row.beta) * (q - p);
    return {term(q, m, of_q), term(p, m, of_p)};
  }

  // Gradients of the row's divergence.
  template <class A>
  MASKED_LOSS_HD V input_gradient(const DivergenceRow<A>& row) const {
    if constexpr (kind == DivergenceKind::Forward) return times(less(q, p, d), row.coefficient);
    if constexpr (kind == DivergenceKind::Reverse) return times(weighted(p, V(0) - d, row.sums.input), row.coefficient);
    return times(weighted(p, of_p, row.sums.input), (1 - row.beta) * row.coefficient);
  }
  template <class A>
  MASKED_LOSS_HD V target_gradient(const DivergenceRow<A>& row) const {
    if constexpr (kind == DivergenceKind::Forward) return times(weighted(q, d, row.sums.target), row.coefficient);
    if constexpr (kind == DivergenceKind::Reverse) return times(less(p, q, V(0) - d), row.coefficient);
    return times(weighted(q, of_q, row.sums.target), row.beta * row.coefficient);
  }

 private:
  static MASKED_LOSS_HD auto is_near(V log_ratio) { return M::less(M::abs(log_ratio), V(1)); }

  // a log(a / b) - a + b
  static MASKED_LOSS_HD V term(V a, V b, V log_ratio) {
    const V far = a * log_ratio + (b - a), near = a * (log_ratio + M::expm1(V(0) - log_ratio));
    return M::where(M::equal(a, V(0)), b, M::where(is_near(log_ratio), near, far));
  }
  // b - a
  static MASKED_LOSS_HD V less(V a, V b, V log_ratio) {
    return M::where(is_near(log_ratio), a * M::expm1(V(0) - log_ratio), b - a);
  }
  template <class A>
  static MASKED_LOSS_HD V weighted(V a, V log_ratio, A mean) {
    return M::where(M::equal(a, V(0)), V(0), a * (log_ratio - V(mean)));
  }
  // Zeros are +0.
  template <class A>
  static MASKED_LOSS_HD V times(V gradient, A by) {
    return M::where(M::equal(gradient, V(0)), V(0), gradient * V(by));
  }
};

// Calls body(constant) with the kind as a constant. A mixture of one alone is its KL.
template <class Kind, class Body>
void with_divergence(Kind kind, double beta, const Body& body) {
  using enum DivergenceKind;
  if (kind == Kind::Forward || (kind == Kind::JensenShannon && beta == 0)) {
    body(std::integral_constant<DivergenceKind, Forward>());
  } else if (kind == Kind::Reverse || beta == 1) {
    body(std::integral_constant<DivergenceKind, Reverse>());
  } else {
    body(std::integral_constant<DivergenceKind, Mixture>());
  }
}

}  // namespace masked_loss
