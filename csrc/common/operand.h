#pragma once

#include "rows.h"

namespace masked_loss {

enum class ElementType { Float, Double, BFloat16, Half, Byte };

// A tensor with the result's shape, whatever its strides; without data there is none.
struct Operand {
  const void* data = nullptr;
  ElementType type;
  Rows<1> at;  // its elements in the order of the result's
};

}  // namespace masked_loss
