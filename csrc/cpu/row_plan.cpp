#include "cpu/row_plan.h"

#include <c10/util/SmallVector.h>

#include "cpu/parallel.h"

namespace masked_loss::cpu {
namespace {

constexpr std::int64_t kChunk = 4096;  // rows; fixed, so that sums do not depend on the number of threads

struct ChunkSum {
  double weight = 0;        // of what a mean divides by
  std::int64_t kept = 0;    // rows
  std::int64_t first = -1;  // row with a target out of range
  std::int64_t index = 0;   // that target
};

template <class A>
Row<A> read_row(const RowView<A>& from, std::int64_t row) {
  const auto offsets = from.rows.offsets(row);
  return resolve_row(from.view, offsets[0], offsets[1], offsets[2], offsets[3]);
}

template <class A, class Take>
ChunkSum read_chunk(const RowView<A>& from, std::int64_t begin, std::int64_t end, const Take& take) {
  ChunkSum sum;
  for (auto r = begin; r < end; ++r) {
    const auto row = read_row(from, r);
    if (row.state == RowState::OutOfRange) {
      if (sum.first < 0) sum.first = r, sum.index = row.index;
    } else if (row.state == RowState::Kept) {
      sum.weight += row.counted;
      ++sum.kept;
    }
    take(r, row);
  }
  return sum;
}

// Calls visit(chunk, begin, end) for chunks of `chunk` rows; small ones share a task.
template <class Visit>
void for_chunks(std::int64_t rows, std::int64_t chunk, const Visit& visit) {
  if (rows == 0) return;
  const auto chunks = divide_up(rows, chunk), together = std::max<std::int64_t>(1, kChunk / chunk);
  run_tasks(divide_up(chunks, together), [&] {
    return [&](std::int64_t task) {
      const auto last = std::min(chunks, (task + 1) * together);
      for (auto c = task * together; c < last; ++c) visit(c, c * chunk, std::min(rows, (c + 1) * chunk));
    };
  });
}

using ChunkSums = c10::SmallVector<ChunkSum, 4>;

template <class A, class Take>
ChunkSums read_rows(const RowView<A>& from, std::int64_t chunk, const Take& take) {
  const auto rows = from.rows.count;
  ChunkSums sums(rows == 0 ? 0 : divide_up(rows, chunk));
  for_chunks(rows, chunk, [&](auto c, auto begin, auto end) { sums[c] = read_chunk(from, begin, end, take); });
  for (const auto& sum : sums) {
    if (sum.first >= 0) throw_out_of_range(from.arguments, sum.first, sum.index, from.view.classes);
  }
  return sums;
}

}  // namespace

template <class A>
RowPlan<A> make_row_plan(const RowView<A>& from, Reduction reduction, const OptionalTensor& normalizer) {
  const auto rows = from.rows.count;
  RowPlan<A> plan(rows);
  // A sequence is a chunk where its own weight is needed.
  const bool by_sequence = reduction == Reduction::SequenceMean;
  const auto& target = from.arguments.target;
  const auto chunk = !by_sequence ? kChunk : target.dim() > 0 && rows > 0 ? rows / target.size(0) : 1;
  const auto sums = read_rows(from, chunk, [&](std::int64_t r, const Row<A>& row) {
    plan.index[r] = row.state == RowState::Kept ? row.index : -1;
    plan.coefficient[r] = row.weight;
  });
  if (reduction == Reduction::None || reduction == Reduction::Sum) return plan;

  double total = 0;
  std::int64_t kept_chunks = 0;
  for (const auto& sum : sums) {
    total += sum.weight;
    kept_chunks += sum.kept > 0;
  }
  double divisor = by_sequence ? static_cast<double>(kept_chunks) : total;
  if (normalizer) {
    divisor = normalizer->item<double>();
    check_normalizer_value(from.arguments.op, divisor);
  }
  for_chunks(rows, chunk, [&](auto c, auto begin, auto end) {
    const double by = by_sequence ? divisor * sums[c].weight : divisor;
    for (auto r = begin; r < end; ++r) {
      if (by == 0) plan.index[r] = -1;  // a divisor of 0 gives 0: its rows are dropped
      plan.coefficient[r] = static_cast<A>(plan.coefficient[r] / by);
    }
  });
  return plan;
}

template <class A>
double sum_of_weights(const RowView<A>& from) {
  const auto sums = read_rows(from, kChunk, [](std::int64_t, const Row<A>&) {});
  double total = 0;
  for (const auto& sum : sums) total += sum.weight;
  return total;
}

template RowPlan<float> make_row_plan(const RowView<float>&, Reduction, const OptionalTensor&);
template RowPlan<double> make_row_plan(const RowView<double>&, Reduction, const OptionalTensor&);
template double sum_of_weights(const RowView<float>&);
template double sum_of_weights(const RowView<double>&);

}  // namespace masked_loss::cpu
