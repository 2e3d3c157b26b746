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

}  // namespace masked_loss
