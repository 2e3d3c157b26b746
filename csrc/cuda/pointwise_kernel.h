#pragma once

#include <cuda_runtime_api.h>

#include "common/pointwise.h"

namespace masked_loss::cuda {

// Elements are summed in chunks, and weighed in parts, that follow from their number alone: so do the sums.
inline constexpr std::int64_t kMaxChunks = 2048, kMaxParts = 1024;

// What losses are divided by, on the device.
struct PointwiseDivisor {
  double value;
  double reciprocal;
};

// How a divisor is found.
template <class A>
struct Weighing {
  std::int64_t sequences, length;  // what is weighed; 0 sequences where nothing has to be
  bool by_sequence;                // the divisor is the number of those with something kept, else the sum of weights
  double times;                    // what each weight counts
  const double* normalizer;        // takes the divisor's place; or null
  A* shares;                       // [sequences]: 1 / weight of each one, 0 for 0; or null
  PointwiseSum* parts;             // [kMaxParts]
  PointwiseDivisor* divisor;
};

// The mask, the sample weights and the weights of `work` are those of the elements that are weighed.
template <class A>
void find_divisor(const PointwiseWork<A>& work, const Weighing<A>& weighing, cudaStream_t stream);

// What becomes of the losses' sum.
template <class A>
struct PointwiseTotal {
  A* result;                        // null: it is not wanted
  PointwiseSum* partials;           // [kMaxChunks], of the blocks
  const PointwiseDivisor* divisor;  // of the sum and of the gradients; null: 1
  bool by_kept;                     // the sum is divided by the number of kept elements instead
};

// The loss of `formula` over all elements. T is the device's type of input, target and other. Loss and gradients begin
// at multiples of 16 bytes.
template <class T, class A, int index = 0>
void run_pointwise(int formula, const PointwiseWork<A>& work, const PointwiseTotal<A>& total, cudaStream_t stream);

}  // namespace masked_loss::cuda
