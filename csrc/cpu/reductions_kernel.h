#pragma once

#include "common/reductions.h"
#include "cpu/capability.h"
#include "cpu/kernel_table.h"

namespace masked_loss::cpu {

inline constexpr std::int64_t kMomentLanes = 2048;

// The rows of a tile of rows that have so many elements, at most kMomentTileElements: it stays in the L1 cache.
inline constexpr std::int64_t kMomentTileElements = 64;
constexpr std::int64_t moment_tile(std::int64_t elements) { return elements <= 4 ? 1024 : 4096 / elements / 16 * 16; }

// Lines for an operand of `affine`, at the strides of bytes that TensorIterator gives.
struct AffineLine {
  char* result;
  const char *scale, *input, *mean, *offset, *mask;  // null: not given
  std::int64_t result_stride, scale_stride, input_stride, mean_stride, offset_stride, mask_stride;
  std::int64_t count;
  bool past_cache;
};

template <class T>
struct ReductionsKernel {
  // Elements [begin, end) of a kept row, one after the other.
  Moments (*line)(const MomentsWork<T>& work, int order, std::int64_t row, std::int64_t begin, std::int64_t end);
  // Elements [begin, end) of `count` kept rows beside one another in memory, at most kMomentLanes.
  void (*lanes)(const MomentsWork<T>& work, int order, std::int64_t row, std::int64_t count, std::int64_t begin,
                std::int64_t end, Moments* results);
  // All elements of `count` kept rows, at most moment_tile of them, wherever they lie.
  void (*tile)(const MomentsWork<T>& work, int order, std::int64_t row, std::int64_t count, Moments* results);
  // The result is in T, or in what it is computed in.
  void (*affine)(const AffineLine& line);
  void (*affine_wide)(const AffineLine& line);
};

using ReductionsKernels = KernelTable<ReductionsKernel<float>, ReductionsKernel<double>, ReductionsKernel<at::BFloat16>,
                                      ReductionsKernel<at::Half>>;

MASKED_LOSS_KERNELS(const ReductionsKernels& reductions_kernels());

}  // namespace masked_loss::cpu
