#pragma once

#include <cstdint>
#include <limits>
#include <tuple>
#include <type_traits>

#include "host_device.h"
#include "rows.h"
#include "scalar_math.h"

namespace masked_loss {

// One element's loss, and its slopes in the input and in the third operand.
template <class V>
struct PointwiseTerms {
  V value;
  V input;
  V other;
};

// The values that an operand may have, NaN apart.
struct Domain {
  double least = -std::numeric_limits<double>::infinity(), most = std::numeric_limits<double>::infinity();

  constexpr bool is_bounded() const { return least > -std::numeric_limits<double>::infinity(); }
  MASKED_LOSS_HD constexpr bool excludes(double value) const { return value < least || value > most; }
};

// A formula is the loss of an element of input x, target t and, where it has one, a third operand; `numbers` are its
// own arguments. Masked elements are computed from safe values: whatever lies there is not looked at.
namespace formula {

template <class M>
using V = typename M::V;

// Keeps NaN, which comparisons drop; the sign of 0 is 0.
template <class M>
MASKED_LOSS_HD V<M> sign(V<M> d) {
  return M::where(M::less(V<M>(0), d), V<M>(1), M::where(M::less(d, V<M>(0)), V<M>(-1), d));
}

struct Safe {
  // Values put in place of masked elements, where loss and slopes are finite.
  static constexpr double safe_input = 0, safe_target = 0, safe_other = 1;
  static constexpr bool takes_other = false;
  static constexpr bool has_other_slope = false;
  static constexpr bool broadcasts_target = true;
  static constexpr bool counts_weight = false;      // whether a mean divides by the weights of the elements
  static constexpr bool broadcasts_weight = false;  // whether these may have a lower rank
  // Of kept values; outside the loss is NaN.
  static constexpr Domain input_domain{}, target_domain{}, other_domain{};
};

struct Mse : Safe {
  static constexpr auto name = "mse_loss";
  static constexpr bool counts_weight = true;

  template <class M>
  MASKED_LOSS_HD static PointwiseTerms<V<M>> at(V<M> x, V<M> t, V<M>, const double*) {
    const auto d = x - t;
    return {d * d, d + d, V<M>(0)};
  }
};

struct L1 : Safe {
  static constexpr auto name = "l1_loss";
  static constexpr bool counts_weight = true;

  template <class M>
  MASKED_LOSS_HD static PointwiseTerms<V<M>> at(V<M> x, V<M> t, V<M>, const double*) {
    // torch's slope of |NaN| is 0.
    const V<M> zero(0), one(1), d = x - t;
    return {M::abs(d), M::where(M::less(zero, d), one, M::where(M::less(d, zero), zero - one, zero)), zero};
  }
};

// numbers: beta
struct SmoothL1 : Safe {
  static constexpr auto name = "smooth_l1_loss";
  template <class M>
  MASKED_LOSS_HD static PointwiseTerms<V<M>> at(V<M> x, V<M> t, V<M>, const double* numbers) {
    if (numbers[0] == 0) return L1::at<M>(x, t, V<M>(1), numbers);
    const V<M> beta(numbers[0]), half(0.5), d = x - t, z = M::abs(d);
    const auto near = M::less(z, beta);
    return {M::where(near, half * d * d / beta, z - half * beta), M::where(near, d / beta, sign<M>(d)), V<M>(0)};
  }
};

// numbers: delta
struct Huber : Safe {
  static constexpr auto name = "huber_loss";
  template <class M>
  MASKED_LOSS_HD static PointwiseTerms<V<M>> at(V<M> x, V<M> t, V<M>, const double* numbers) {
    const V<M> zero(0), half(0.5), delta(numbers[0]), d = x - t, z = M::abs(d);
    const V<M> near = M::where(M::less(delta, z), delta, z);  // delta where it is far
    return {near * (z - half * near), M::where(M::less(d, zero), zero - near, near), zero};
  }
};

// The logistic function of x and of -x, and log(1 + exp(-|x|)), from one exponential.
template <class M>
struct Logistic {
  V<M> positive, negative, log_term;

  MASKED_LOSS_HD explicit Logistic(V<M> x) {
    const V<M> e = M::exp_of_negative(V<M>(0) - M::abs(x)), larger = M::reciprocal(V<M>(1) + e), smaller = e * larger;
    const auto below = M::less(x, V<M>(0));
    positive = M::where(below, smaller, larger);
    negative = M::where(below, larger, smaller);
    log_term = M::log1p_of_fraction(e);
  }
};

template <class M>
MASKED_LOSS_HD V<M> negative_part(V<M> x) {
  return M::where(M::less(x, V<M>(0)), V<M>(0) - x, V<M>(0));
}

// The third operand is pos_weight.
struct BinaryCrossEntropyWithLogits : Safe {
  static constexpr auto name = "binary_cross_entropy_with_logits";
  static constexpr bool takes_other = true;
  static constexpr bool broadcasts_target = false;
  static constexpr bool broadcasts_weight = true;
  template <class M>
  MASKED_LOSS_HD static PointwiseTerms<V<M>> at(V<M> x, V<M> t, V<M> pos_weight, const double*) {
    const Logistic<M> logistic(x);
    const auto one = V<M>(1), weight = one + (pos_weight - one) * t;
    return {(one - t) * x + weight * (logistic.log_term + negative_part<M>(x)),
            (one - t) * logistic.positive - (t * pos_weight) * logistic.negative, V<M>(0)};
  }
};

// Of probabilities; logarithms are at least -100, as torch's.
struct BinaryCrossEntropy : Safe {
  static constexpr auto name = "binary_cross_entropy";
  static constexpr bool broadcasts_target = false;
  static constexpr bool broadcasts_weight = true;
  static constexpr double safe_input = 0.5;
  static constexpr Domain input_domain{0, 1}, target_domain{0, 1};

  template <class M>
  MASKED_LOSS_HD static PointwiseTerms<V<M>> at(V<M> x, V<M> t, V<M>, const double*) {
    const V<M> zero(0), one(1), least(-100);
    const auto at_least = [&](V<M> log) { return M::where(M::less(log, least), least, log); };
    const auto value = (t - one) * at_least(M::log_of_complement(x)) - t * at_least(M::log(x));
    const V<M> product = x * (one - x), smallest(1e-12f);  // a float in torch, whatever the dtype
    const auto slope = (x - t) * M::reciprocal(M::where(M::less(product, smallest), smallest, product));
    // Outside [0, 1] these products are negative.
    const V<M> nan(std::numeric_limits<double>::quiet_NaN());
    const V<M> unfit = M::where(M::less(product, zero), nan, M::where(M::less(t * (one - t), zero), nan, zero));
    return {value + unfit, slope + unfit, zero};
  }
};

// The target is a probability.
struct KlDiv : Safe {
  static constexpr auto name = "kl_div";
  static constexpr double safe_target = 1;  // where t log t has a slope
  template <class M>
  MASKED_LOSS_HD static PointwiseTerms<V<M>> at(V<M> x, V<M> t, V<M>, const double*) {
    const auto entropy = M::where(M::equal(t, V<M>(0)), V<M>(0), t * M::log(t));
    return {entropy - t * x, V<M>(0) - t, V<M>(0)};
  }
};

// The target is a logarithm.
struct KlDivOfLogTarget : Safe {
  static constexpr auto name = "kl_div";
  template <class M>
  MASKED_LOSS_HD static PointwiseTerms<V<M>> at(V<M> x, V<M> t, V<M>, const double*) {
    const auto p = M::exp(t);
    return {p * (t - x), V<M>(0) - p, V<M>(0)};
  }
};

// Stirling's formula for log t!, of targets above 1.
template <class M>
MASKED_LOSS_HD V<M> log_factorial(V<M> t) {
  const V<M> half(0.5), two_pi(6.283185307179586);
  return M::where(M::less(V<M>(1), t), t * M::log(t) - t + half * M::log(two_pi * t), V<M>(0));
}

// numbers: full, eps
struct PoissonNll : Safe {
  static constexpr auto name = "poisson_nll_loss";
  static constexpr double safe_input = 1;
  template <class M>
  MASKED_LOSS_HD static PointwiseTerms<V<M>> at(V<M> x, V<M> t, V<M>, const double* numbers) {
    const auto shifted = x + V<M>(numbers[1]);
    auto value = x - t * M::log(shifted);
    if (numbers[0] != 0) value = value + log_factorial<M>(t);
    return {value, V<M>(1) - t / shifted, V<M>(0)};
  }
};

// Of the logarithm of the rate. numbers: full
struct PoissonNllOfLogInput : Safe {
  static constexpr auto name = "poisson_nll_loss";
  template <class M>
  MASKED_LOSS_HD static PointwiseTerms<V<M>> at(V<M> x, V<M> t, V<M>, const double* numbers) {
    const auto rate = M::exp(x);
    auto value = rate - t * x;
    if (numbers[0] != 0) value = value + log_factorial<M>(t);
    return {value, rate - t, V<M>(0)};
  }
};

// The third operand is the variance, at least eps. numbers: full, eps
struct GaussianNll : Safe {
  static constexpr auto name = "gaussian_nll_loss";
  static constexpr bool takes_other = true;
  static constexpr bool has_other_slope = true;
  static constexpr Domain other_domain{.least = 0};

  template <class M>
  MASKED_LOSS_HD static PointwiseTerms<V<M>> at(V<M> x, V<M> t, V<M> var, const double* numbers) {
    const V<M> zero(0), half(0.5), one(1), eps(numbers[1]), nan(std::numeric_limits<double>::quiet_NaN());
    const auto v = M::where(M::less(var, zero), nan, M::where(M::less(var, eps), eps, var));
    // The square comes first, as in torch: it overflows where torch's does.
    const auto d = x - t, precision = one / v, squares = d * d * precision;
    auto value = half * (M::log(v) + squares);
    if (numbers[0] != 0) value = value + V<M>(0.9189385332046727);  // log(2 pi) / 2
    return {value, half * precision * (d + d), half * (precision - squares * precision)};
  }
};

// Lin et al., Focal Loss for Dense Object Detection, 2017. numbers: alpha (below 0: none), gamma
struct SigmoidFocal : Safe {
  static constexpr auto name = "sigmoid_focal_loss";
  static constexpr bool broadcasts_target = false;
  template <class M>
  MASKED_LOSS_HD static PointwiseTerms<V<M>> at(V<M> x, V<M> t, V<M>, const double* numbers) {
    const V<M> one(1), alpha(numbers[0]), gamma(numbers[1]);
    const Logistic<M> logistic(x);
    const auto p = logistic.positive, q = logistic.negative;
    const auto cross_entropy = (one - t) * x + logistic.log_term + negative_part<M>(x);
    const auto cross_entropy_slope = (one - t) * p - t * q;
    // wrong is 1 - p_t, which the loss is weighted with to the power of gamma
    const auto wrong = t * q + (one - t) * p;
    const auto wrong_slope = (one - t - t) * p * q;
    auto value = cross_entropy, slope = cross_entropy_slope;
    if (numbers[1] == 2) {
      value = wrong * wrong * cross_entropy;
      slope = wrong * wrong * cross_entropy_slope + (wrong + wrong) * wrong_slope * cross_entropy;
    } else if (numbers[1] != 0) {
      // The slope of log(wrong) is never above 1, where that of wrong^gamma has no bound.
      const auto factor = M::pow(wrong, gamma);
      const auto log_slope = M::where(M::equal(wrong, V<M>(0)), V<M>(0), wrong_slope / wrong);
      value = factor * cross_entropy;
      slope = factor * (cross_entropy_slope + gamma * log_slope * cross_entropy);
    }
    if (numbers[0] >= 0) {
      const auto weight = alpha * t + (one - alpha) * (one - t);
      value = value * weight;
      slope = slope * weight;
    }
    return {value, slope, V<M>(0)};
  }
};

}  // namespace formula

// What `int loss` of the inner ops counts.
using PointwiseFormulas =
    std::tuple<formula::Mse, formula::L1, formula::SmoothL1, formula::Huber, formula::BinaryCrossEntropyWithLogits,
               formula::BinaryCrossEntropy, formula::KlDiv, formula::KlDivOfLogTarget, formula::PoissonNll,
               formula::PoissonNllOfLogInput, formula::GaussianNll, formula::SigmoidFocal>;

template <class Formula, int index = 0>
constexpr int formula_index() {
  if constexpr (std::is_same_v<std::tuple_element_t<index, PointwiseFormulas>, Formula>) {
    return index;
  } else {
    return formula_index<Formula, index + 1>();
  }
}

inline constexpr int kPointwiseNumbers = 4;
inline constexpr std::size_t kPointwiseFormulas = std::tuple_size_v<PointwiseFormulas>;

// An elementwise loss that is computed in A. A kept element has a mask and a sample weight other than 0.
template <class A>
struct PointwiseWork {
  std::int64_t count;
  Operand input, target, other, mask, sample_weight, weight;
  Operand share;        // of each sequence in the mean: multiplies the sample weight, and drops where it is 0
  Operand coefficient;  // what arrives from upstream: multiplies losses and slopes
  double numbers[kPointwiseNumbers];
  // Contiguous; the loss in A, the gradients in the type of the input. Null: not wanted.
  A* loss;
  void* gradient;
  void* other_gradient;
};

struct PointwiseSum {
  double weight = 0;
  std::int64_t kept = 0;

  MASKED_LOSS_HD PointwiseSum operator+(const PointwiseSum& other) const {
    return {weight + other.weight, kept + other.kept};
  }
};

}  // namespace masked_loss
