#pragma once

#include <cuda_runtime_api.h>

#include "common/row_plan.h"
#include "common/rows.h"
#include "common/softmax.h"

namespace masked_loss::cuda {

// Rows are planned in chunks: chunk sizes follow from the number of rows alone, so that sums do too.
inline constexpr std::int64_t kPlanChunk = 2048;
inline constexpr std::int64_t kPlanChunks = 1024;  // at most, where there are more rows the chunks are larger

MASKED_LOSS_HD std::int64_t plan_chunk(std::int64_t rows) {
  const std::int64_t chunk = (rows + kPlanChunks - 1) / kPlanChunks;
  return chunk < kPlanChunk ? kPlanChunk : chunk;
}
MASKED_LOSS_HD std::int64_t plan_chunks(std::int64_t rows) { return (rows + plan_chunk(rows) - 1) / plan_chunk(rows); }

enum class Divisor { One, Weights, Normalizer };

// What is known of the rows of a chunk.
struct PlanChunk {
  double weight;       // of what a mean divides by
  std::int64_t kept;   // rows
  std::int64_t first;  // row with a target out of range, or the number of rows
};

// A is the dtype of weights and losses. Null pointers: not wanted.
template <class A>
struct RowPlanWork {
  RowRule<A> view;
  Rows<4> rows;  // offsets of target, mask, sample weight and class mask

  Divisor divisor;
  const double* normalizer;      // on the device
  std::int64_t sequences;        // 0 but for the mean over sequences, each of
  std::int64_t sequence_length;  // so many rows
  Quotient by_length;
  double* sequence_weight;        // [sequences]
  std::int64_t* sequence_chunks;  // [plan_chunks(sequences)]: how many of each have something kept

  const A* upstream;  // multiplies the coefficients
  Rows<1> upstream_rows;

  PlanChunk* chunks;  // [plan_chunks(rows)]
  // The target of a kept row, -1 of a masked one; a target out of range becomes 0 with a coefficient of NaN.
  std::int64_t* index;  // [N]
  A* coefficient;       // [N], sample weight x reduction x upstream
  std::int64_t* order;  // [N], all rows: first those that were kept, some of which a divisor of 0 may have dropped
  std::int64_t* kept;   // how many those are
  A* loss;              // [N], set to 0 where a row is masked
  Softmax<A>* softmax;  // [N], set to {0, 1} there
};

template <class A>
void plan_rows(const RowPlanWork<A>& work, cudaStream_t stream);

// The chunks alone.
template <class A>
void read_rows(const RowPlanWork<A>& work, cudaStream_t stream);

// The sum of the chunks' weights.
template <class A>
void sum_weights(const PlanChunk* chunks, std::int64_t count, A* sum, cudaStream_t stream);

// The sum of n losses, in two steps where they are many; `partials` has room for plan_chunks(n) numbers.
template <class A>
void sum_losses(const A* losses, std::int64_t n, double* partials, A* sum, cudaStream_t stream);

}  // namespace masked_loss::cuda
