#include "cpu/row_plan.h"

#include "cpu/parallel.h"

namespace masked_loss::cpu {
namespace {

constexpr std::int64_t kChunk = 4096;  // rows; fixed, so that sums do not depend on the number of threads

struct ChunkSum {
  double weight = 0;        // of what a mean divides by
  std::int64_t kept = 0;    // rows
  std::int64_t first = -1;  // row with a target out of range
  std::int64_t index = 0;   // that target

  template <class A>
  void operator()(std::int64_t r, const Row<A>& row) {
    if (row.state == RowState::OutOfRange) {
      if (first < 0) first = r, index = row.index;
      return;
    }
    weight += row.counted;  // nothing where it is masked
    kept += row.state == RowState::Kept;
  }
};

// Calls take(row, what it resolves to), row after row, and returns it, as std::for_each does.
template <class A, class Take>
C10_ALWAYS_INLINE Take resolve_rows(const RowRule<A>& view, const Rows<4>& rows, std::int64_t begin, std::int64_t end,
                                    Take take) {
  const auto inner = rows.dims == 0 ? 1 : rows.sizes[rows.dims - 1];
  std::int64_t steps[4] = {};
  for (int k = 0; k < 4 && rows.dims > 0; ++k) steps[k] = rows.strides[k][rows.dims - 1];
  for (auto r = begin; r < end;) {
    auto [target, mask, weight, class_mask] = rows.offsets(r);
    for (const auto last = std::min(end, r + inner - r % inner); r < last; ++r) {
      take(r, resolve_row(view, target, mask, weight, class_mask));
      target += steps[0], mask += steps[1], weight += steps[2], class_mask += steps[3];
    }
  }
  return take;
}

// The same, where most calls get a shorter loop: their view holds constants.
template <class A, class Take>
Take read_rows(const RowView<A>& from, std::int64_t begin, std::int64_t end, const Take& take) {
  const auto& view = from.view;
  const bool weighted = view.sample_weight != nullptr || view.weight != nullptr;
  if (weighted || view.class_mask != nullptr || view.target_bytes != 8 || view.ignored_count != 1 ||
      view.mask_bytes > 1) {
    return resolve_rows(view, from.rows, begin, end, take);
  }
  RowRule<A> usual{};
  usual.target = view.target;
  usual.target_bytes = 8;
  usual.classes = view.classes;
  usual.ignored[0] = view.ignored[0];
  usual.ignored_count = 1;
  if (view.mask == nullptr) return resolve_rows(usual, from.rows, begin, end, take);
  usual.mask = view.mask;
  usual.mask_bytes = 1;
  return resolve_rows(usual, from.rows, begin, end, take);
}

using ChunkSums = c10::SmallVector<ChunkSum, 4>;

// The sums of chunks of `chunk` rows; small ones share a task.
template <class A>
ChunkSums read_chunks(const RowView<A>& from, std::int64_t chunk) {
  const auto rows = from.rows.count;
  if (rows == 0) return {};
  const auto chunks = divide_up(rows, chunk), together = std::max<std::int64_t>(1, kChunk / chunk);
  ChunkSums sums(chunks);
  run_tasks(divide_up(chunks, together), [&] {
    return [&](std::int64_t task) {
      const auto last = std::min(chunks, (task + 1) * together);
      for (auto c = task * together; c < last; ++c) {
        sums[c] = read_rows(from, c * chunk, std::min(rows, (c + 1) * chunk), ChunkSum());
      }
    };
  });
  for (const auto& sum : sums) {
    if (sum.first >= 0) throw_out_of_range(from.arguments, sum.first, sum.index, from.view.classes);
  }
  return sums;
}

}  // namespace

template <class A>
RowPlan<A>::RowPlan(const RowView<A>& from, Reduction reduction, const OptionalTensor& normalizer)
    : from_(from), rows_each_(std::max<std::int64_t>(1, from.rows.count)) {
  const auto rows = from.rows.count;
  // A sequence is a chunk where its own weight is needed.
  const bool by_sequence = reduction == Reduction::SequenceMean;
  const auto chunk = !by_sequence ? kChunk : !from.sizes.empty() && rows > 0 ? rows / from.sizes[0] : 1;
  const auto sums = read_chunks(from, chunk);
  if (reduction == Reduction::None || reduction == Reduction::Sum) {
    divisors_.push_back(1);
    return;
  }
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
  if (by_sequence) {
    rows_each_ = chunk;
    for (const auto& sum : sums) divisors_.push_back(divisor * sum.weight);
  } else {
    divisors_.push_back(divisor);
  }
}

template <class A>
void RowPlan<A>::operator()(std::int64_t begin, std::int64_t end, std::int64_t* index, A* coefficient) const {
  read_rows(from_, begin, end, [=](std::int64_t r, const Row<A>& row) {
    index[r - begin] = row.state == RowState::Kept ? row.index : -1;
    coefficient[r - begin] = row.weight;
  });
  for (auto r = begin; r < end;) {
    const auto last = std::min(end, (r / rows_each_ + 1) * rows_each_);
    const double by = divisors_[r / rows_each_];
    // A divisor of 0 gives 0: its rows are dropped.
    if (by == 0) std::fill(index + (r - begin), index + (last - begin), -1);
    for (; by != 1 && r < last; ++r) coefficient[r - begin] = static_cast<A>(coefficient[r - begin] / by);
    r = last;
  }
}

template <class A>
double sum_of_weights(const RowView<A>& from) {
  double total = 0;
  for (const auto& sum : read_chunks(from, kChunk)) total += sum.weight;
  return total;
}

template class RowPlan<float>;
template class RowPlan<double>;
template double sum_of_weights(const RowView<float>&);
template double sum_of_weights(const RowView<double>&);

}  // namespace masked_loss::cpu
