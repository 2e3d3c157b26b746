#pragma once

#include <cuda_runtime_api.h>

#include <vector>

#include "common/softmax.h"

namespace masked_loss::cuda {

// How the rows are spread over threads.
struct SoftmaxRegime {
  enum Kind {
    Lanes,  // any strides: few threads a row, whose elements are read twice where something is summed first
    Packs,  // classes side by side: a row is held on chip by a warp or a block; of longer ones a part is read twice
  } kind;
  int shape;        // Packs: the index of the size of a tile
  int lanes;        // Lanes: threads a row
  bool rows_first;  // Lanes: neighbouring threads take neighbouring rows, not classes
};

// `contiguous_classes`, `contiguous_rows`: whether they are contiguous in all operands with elements.
SoftmaxRegime pick_softmax_regime(SoftmaxPass pass, std::int64_t rows, std::int64_t classes, std::int64_t element_bytes,
                                  bool contiguous_classes, bool contiguous_rows, int multiprocessors);

// All that such a call may be given, for whoever tries them.
std::vector<SoftmaxRegime> softmax_regimes(SoftmaxPass pass, std::int64_t classes, std::int64_t element_bytes,
                                           bool contiguous_classes, bool contiguous_rows);

// T is the device's type of the elements.
template <class T, class A>
void run_softmax(const SoftmaxWork<T, A>& work, SoftmaxPass pass, const SoftmaxRegime& regime, int multiprocessors,
                 cudaStream_t stream);

}  // namespace masked_loss::cuda
