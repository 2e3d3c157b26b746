#pragma once

#include "moments.h"
#include "rows.h"

namespace masked_loss {

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
