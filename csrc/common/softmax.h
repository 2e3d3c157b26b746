#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "host_device.h"

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

}  // namespace masked_loss
