#pragma once

#include <type_traits>

namespace masked_loss {

// The dtype that elements of T are computed and added up in: half types, of the host or the device, as float.
template <class T>
using Accumulation = std::conditional_t<std::is_same_v<T, double>, double, float>;

}  // namespace masked_loss
