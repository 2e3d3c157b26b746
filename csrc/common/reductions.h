#pragma once

#include <cstdint>

#include "rows.h"

namespace masked_loss {

// What has been seen of some numbers: of order 1 their sum, of order 2 their mean and the sum of squared deviations
// from it. Numbers that are added up are kept as N, whose differences may have another type.
template <class N>
struct MomentsOf {
  std::int64_t count = 0;
  N first{};
  N second{};
};
using Moments = MomentsOf<double>;

// Of two parts; the second moments as in Chan, Golub and LeVeque, Updating Formulae and a Pairwise Algorithm for
// Computing Sample Variances, 1979.
template <int order, class N>
MASKED_LOSS_HD MomentsOf<N> merge(const MomentsOf<N>& a, const MomentsOf<N>& b) {
  if (b.count == 0) return a;
  if (a.count == 0) return b;
  const std::int64_t count = a.count + b.count;
  if constexpr (order == 1) return {count, a.first + b.first, N{}};
  using A = decltype(b.first - a.first);
  const A between = b.first - a.first, share = static_cast<A>(b.count) / static_cast<A>(count);
  return {count, a.first + between * share, a.second + b.second + between * between * static_cast<A>(a.count) * share};
}

// Elements anywhere in memory: those of one row of `kept` and all of `reduced` make one result. Offsets are those of
// input and mask.
template <class T>
struct MomentsWork {
  Rows<2> kept, reduced;
  const T* input;
  const std::uint8_t* mask;  // or null; a byte each, which keeps where it is not 0
};

// Where the moments of every kept row go, one after the other. Of order 0 there is the first alone, of order 1 no
// second.
template <class A>
struct MomentsResult {
  A* first;
  A* second;
  std::int64_t* count;
};

}  // namespace masked_loss
