#pragma once

#include "rows.h"

namespace masked_loss {

enum class ElementType { Float, Double, BFloat16, Half, Byte };

constexpr std::int64_t element_bytes(ElementType type) {
  switch (type) {
    case ElementType::Double: return 8;
    case ElementType::Float: return 4;
    case ElementType::Byte: return 1;
    default: return 2;
  }
}

// A tensor with the result's shape, whatever its strides; without data there is none.
struct Operand {
  const void* data = nullptr;
  ElementType type;
  Rows<1> at;  // its elements in the order of the result's
};

}  // namespace masked_loss
