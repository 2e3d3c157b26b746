#pragma once

#include <cmath>

#include "host_device.h"

namespace masked_loss {

// The arithmetic of formulas on single numbers; the kernels of a CPU have the same on vectors.
template <class A>
struct ScalarMath {
  using V = A;
  MASKED_LOSS_HD static V abs(V x) { return std::fabs(x); }
  MASKED_LOSS_HD static V exp(V x) { return std::exp(x); }
  MASKED_LOSS_HD static V exp_of_negative(V x) { return std::exp(x); }  // of numbers that are not above 0
  MASKED_LOSS_HD static V expm1(V x) { return std::expm1(x); }
  MASKED_LOSS_HD static V log(V x) { return std::log(x); }
  MASKED_LOSS_HD static V log1p(V x) { return std::log1p(x); }
  MASKED_LOSS_HD static V log1p_of_fraction(V x) { return std::log1p(x); }   // of numbers in [0, 1]
  MASKED_LOSS_HD static V log_of_complement(V x) { return std::log1p(-x); }  // of 1 - x, x in [0, 1]
  MASKED_LOSS_HD static V reciprocal(V x) { return 1 / x; }                  // of numbers in [1e-12, 2]
  MASKED_LOSS_HD static V pow(V x, V y) { return std::pow(x, y); }
  MASKED_LOSS_HD static bool less(V a, V b) { return a < b; }
  MASKED_LOSS_HD static bool equal(V a, V b) { return a == b; }
  MASKED_LOSS_HD static V where(bool condition, V a, V b) { return condition ? a : b; }
};

}  // namespace masked_loss
