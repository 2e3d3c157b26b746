#pragma once

#include <cuda_runtime_api.h>

#include <vector>

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
    Ring,    // long rows of 16-byte packs and class indices alone: by persistent clusters of `slices` blocks
    Slices,  // few long rows: by many blocks each, and the parts put together by a kernel of its own
  } kind;
  int shape;        // Packs, Slices: the index of the size of a tile
  int slices;       // of a row
  int lanes;        // Lanes: threads a row
  bool rows_first;  // Lanes: neighbouring threads take neighbouring rows, not classes
};

// For the current device. `contiguous`: classes are contiguous in all operands; `plain`: rows are whole packs at
// multiples of 16 bytes, and there are class indices without label smoothing or a class mask.
CrossEntropyRegime pick_cross_entropy_regime(CrossEntropyMode mode, std::int64_t rows, std::int64_t classes,
                                             std::int64_t element_bytes, bool contiguous, bool plain,
                                             int multiprocessors);

// All that such a call may be given, for whoever tries them.
std::vector<CrossEntropyRegime> cross_entropy_regimes(CrossEntropyMode mode, std::int64_t classes,
                                                      std::int64_t element_bytes, bool contiguous, bool plain);

// Whether a call is that.
template <class T, class A>
bool is_plain(const CrossEntropyWork<T, A>& work) {
  constexpr std::int64_t pack = 16 / sizeof(T);
  bool aligned = work.classes % pack == 0;
  const void* operands[] = {work.logits, work.gradient};
  for (int k = 0; k < 2; ++k) {
    aligned &= reinterpret_cast<std::uintptr_t>(operands[k]) % 16 == 0;
    for (int d = 0; d < work.rows.dims && operands[k] != nullptr; ++d) aligned &= work.rows.strides[k][d] % pack == 0;
  }
  return aligned && work.class_mask == nullptr && work.probabilities == nullptr && work.label_smoothing == 0;
}

// In the regime Slices a gradient in the forward pass is made by two passes, and `softmax` has to be given.
template <class T, class A>
void run_cross_entropy(const CrossEntropyCall<T, A>& call, CrossEntropyMode mode, const CrossEntropyRegime& regime,
                       int multiprocessors, cudaStream_t stream);

// gradient *= by, which is read on the device, but a zero stays +0 whatever the factor; of n elements side by side.
template <class T, class A>
void scale_gradient(T* gradient, std::int64_t n, const A* by, int multiprocessors, cudaStream_t stream);

}  // namespace masked_loss::cuda
