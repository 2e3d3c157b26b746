#pragma once

#include <type_traits>

// Always inline: kernels are compiled once per instruction set, and a shared copy would be one of them for all.
#if defined(__CUDACC__)
#define MASKED_LOSS_HD __host__ __device__ __forceinline__
#else
#define MASKED_LOSS_HD inline __attribute__((always_inline))
#endif

namespace masked_loss {

// The dtype that elements of T are computed and added up in: half types, of the host or the device, as float.
template <class T>
using Accumulation = std::conditional_t<std::is_same_v<T, double>, double, float>;

}  // namespace masked_loss
