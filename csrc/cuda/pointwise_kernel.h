#pragma once

#include <cuda_runtime_api.h>

#include "common/pointwise.h"

namespace masked_loss::cuda {

// Elements are summed in chunks, and weighed in parts, that follow from their number alone: so do the sums.
inline constexpr std::int64_t kMaxChunks = 4096, kMaxParts = 1024;

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

// The loss of `formula` over all elements. T is the device's type of input, target and other; `divisor` may be null for
// 1; `sum`, if not null, gets the sum of the losses, divided, by way of `partials`, [kMaxChunks]. Loss and gradients
// begin at multiples of 16 bytes.
template <class T, class A>
void run_pointwise(int formula, const PointwiseWork<A>& work, const PointwiseDivisor* divisor, double* partials, A* sum,
                   cudaStream_t stream);

}  // namespace masked_loss::cuda
