#pragma once

#include <cuda_runtime_api.h>

#include "common/reductions.h"
#include "common/rows.h"

namespace masked_loss::cuda {

// The memory that find_moments wants; 0 where rows are not split.
template <class T>
std::int64_t moments_bytes(const MomentsWork<T>& work);

// T is the device's type; of order 1 what is given is the mean. How rows are split follows from sizes and addresses
// alone, and so do the results.
template <class T, class A>
void find_moments(const MomentsWork<T>& work, int order, void* memory, const MomentsResult<A>& result,
                  cudaStream_t stream);

// scale * (input - mean) + offset of what the mask keeps, and else 0. Input and result are in T, and the others in what
// it is computed in, as the result of `affine_wide` is; the result is contiguous and begins at a multiple of 16 bytes.
// Without an input there is no mean.
struct AffineWork {
  std::int64_t count;
  Operand scale, input, mean, offset, mask;
  void* result;
};

template <class T>
void affine(const AffineWork& work, cudaStream_t stream);
template <class T>
void affine_wide(const AffineWork& work, cudaStream_t stream);

}  // namespace masked_loss::cuda
