#pragma once

// Always inline: kernels are compiled once per instruction set, and a shared copy would be one of them for all.
#if defined(__CUDACC__)
#define MASKED_LOSS_HD __host__ __device__ __forceinline__
#else
#define MASKED_LOSS_HD inline __attribute__((always_inline))
#endif
