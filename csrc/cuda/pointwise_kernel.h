#pragma once

#include <cuda_runtime_api.h>

#include "common/pointwise_work.h"

namespace masked_loss::cuda {

// Blocks that the elements of a sum are spread over, by their number alone.
inline constexpr std::int64_t kPointwiseBlocks = 1024;

// The kept weights of elements, for each of `sequences` parts of them.
template <class A>
void weigh_elements(const PointwiseWork<A>& work, std::int64_t sequences, double times, PointwiseSum* sums,
                    cudaStream_t stream);

// What a mean divides by: the sum of the weights, or the number of parts with something kept, or what `normalizer` is.
// With `shares`, those become 1 / weight of each part, or 0.
template <class A>
void sum_elements(const PointwiseSum* sums, std::int64_t count, bool counts_sequences, const double* normalizer,
                  double* divisor, A* shares, cudaStream_t stream);

// The loss of `formula` over all elements. T is the device's type of input, target and other; `divisor` on the device,
// or null for 1; `partials` has room for kPointwiseBlocks numbers; `sum` may be null.
template <class T, class A>
void run_pointwise(int formula, const PointwiseWork<A>& work, const double* divisor, double* partials, A* sum,
                   cudaStream_t stream);

}  // namespace masked_loss::cuda
