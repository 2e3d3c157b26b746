#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <type_traits>

namespace masked_loss::cpu {

// A kernel, or several in a struct, for each dtype.
template <class OfFloat, class OfDouble, class OfBFloat16, class OfHalf>
struct KernelTable {
  OfFloat of_float;
  OfDouble of_double;
  OfBFloat16 of_bfloat16;
  OfHalf of_half;

  template <class T>
  const auto& of() const {
    if constexpr (std::is_same_v<T, float>) {
      return of_float;
    } else if constexpr (std::is_same_v<T, double>) {
      return of_double;
    } else if constexpr (std::is_same_v<T, at::BFloat16>) {
      return of_bfloat16;
    } else {
      return of_half;
    }
  }
};

}  // namespace masked_loss::cpu
