#pragma once

#include <cstdint>

#include "host_device.h"

namespace masked_loss {

// What has been seen of some numbers: of order 1 their sum, of order 2 their mean and the sum of squared deviations
// from it.
struct Moments {
  std::int64_t count = 0;
  double first = 0;
  double second = 0;
};

// Of two parts; the second moments as in Chan, Golub and LeVeque, Updating Formulae and a Pairwise Algorithm for
// Computing Sample Variances, 1979.
template <int order>
MASKED_LOSS_HD Moments merge(const Moments& a, const Moments& b) {
  if (b.count == 0) return a;
  if (a.count == 0) return b;
  const std::int64_t count = a.count + b.count;
  if (order == 1) return {count, a.first + b.first, 0};
  const double between = b.first - a.first, share = static_cast<double>(b.count) / static_cast<double>(count);
  return {count, a.first + between * share,
          a.second + b.second + between * between * static_cast<double>(a.count) * share};
}

}  // namespace masked_loss
