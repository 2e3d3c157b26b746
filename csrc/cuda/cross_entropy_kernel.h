#pragma once

#include <cuda_runtime_api.h>

#include "common/cross_entropy.h"

namespace masked_loss::cuda {

// What a part of a row has come to.
template <class A>
struct RowPart {
  Softmax<A> softmax;
  ClassSums smoothing, target;  // the latter of class probabilities
};

// T is the device's type of the logits. What order and kept mean is said in row_plan_kernel.h.
template <class T, class A>
struct CrossEntropyCall {
  CrossEntropyWork<T, A> work;
  const std::int64_t* order;
  const std::int64_t* kept;
  int slices;         // of a row
  RowPart<A>* parts;  // [N, slices], or null where a row is reduced in one go
};

// How the rows are spread over threads.
struct CrossEntropyRegime {
  enum Kind {
    Lanes,   // any strides: few threads a row, which is read twice for a gradient
    Packs,   // classes side by side: a row is held on chip by `lanes` threads of one block, or of a cluster of blocks
    Ring,    // long rows: by persistent clusters of `slices` blocks
    Slices,  // few long rows: by many blocks each, and the parts put together by a kernel of its own
  } kind;
  int shape;        // Packs, Slices: the index of the size of a tile
  int slices;       // of a row
  int lanes;        // Lanes: threads a row
  bool rows_first;  // Lanes: neighbouring threads take neighbouring rows, not classes
};

// How many blocks of a ring share a row; 0 where its rows are too short or too long, or do not begin alike in all
// operands. Classes have to be contiguous.
template <class T, class A>
int cross_entropy_ring_blocks(const CrossEntropyWork<T, A>& work, CrossEntropyMode mode);

// For the current device. `contiguous`: classes are contiguous in all operands.
CrossEntropyRegime pick_cross_entropy_regime(CrossEntropyMode mode, std::int64_t rows, std::int64_t classes,
                                             std::int64_t element_bytes, bool contiguous, int ring_blocks,
                                             int multiprocessors);

// In the regime Slices a gradient in the forward pass is made by two passes, and `softmax` has to be given.
template <class T, class A>
void run_cross_entropy(const CrossEntropyCall<T, A>& call, CrossEntropyMode mode, const CrossEntropyRegime& regime,
                       int multiprocessors, cudaStream_t stream);

// gradient *= by, which is read on the device, but a zero stays +0 whatever the factor; of n elements side by side.
template <class T, class A>
void scale_gradient(T* gradient, std::int64_t n, const A* by, int multiprocessors, cudaStream_t stream);

}  // namespace masked_loss::cuda
