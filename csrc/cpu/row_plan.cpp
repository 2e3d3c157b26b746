#include "cpu/row_plan.h"

#include <ATen/ops/ne.h>
#include <c10/util/SmallVector.h>

#include "common/row_plan.h"
#include "common/rows.h"
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

// Reads the N-sized arguments of a call, whatever their strides.
template <class A>
class RowReader {
 public:
  explicit RowReader(const RowArguments& arguments) {
    constexpr auto type = std::is_same_v<A, double> ? at::kDouble : at::kFloat;
    const auto& target = arguments.target;
    std::array<at::DimVector, 4> strides;
    view_ = {};
    view_.target = target.const_data_ptr();
    view_.target_bytes = static_cast<int>(target.itemsize());
    strides[0] = row_strides(target);
    if (arguments.mask) {
      view_.mask = arguments.mask->const_data_ptr();
      view_.mask_bytes = static_cast<int>(arguments.mask->itemsize());
      strides[1] = row_strides(*arguments.mask);
    }
    if (arguments.sample_weight) {
      sample_weight_ = arguments.sample_weight->to(type);
      view_.sample_weight = sample_weight_.const_data_ptr<A>();
      strides[2] = row_strides(sample_weight_);
    }
    if (arguments.weight) {
      weight_ = arguments.weight->to(type).contiguous();
      view_.weight = weight_.const_data_ptr<A>();
    }
    // Without a number of classes only negative targets are known to be wrong.
    view_.classes = arguments.classes ? arguments.classes->expect_int() : std::numeric_limits<std::int64_t>::max();
    if (arguments.class_mask) {
      const ClassMask classes(arguments);
      class_mask_ = classes.mask;
      view_.class_mask = class_mask_.const_data_ptr<bool>();
      view_.class_mask_stride = class_mask_.stride(classes.dim);
      view_.class_mask_size = class_mask_.size(classes.dim);
      strides[3] = classes.strides;
    }
    view_.ignored = arguments.ignore_index.data();
    view_.ignored_count = static_cast<int>(arguments.ignore_index.size());
    rows_ = make_rows<4>(target.sizes(), strides);
  }

  std::int64_t count() const { return rows_.count; }
  std::int64_t classes() const { return view_.classes; }

  Row<A> operator()(std::int64_t row) const {
    const auto offsets = rows_.offsets(row);
    return resolve_row(view_, offsets[0], offsets[1], offsets[2], offsets[3]);
  }

 private:
  Tensor sample_weight_, weight_, class_mask_;  // own what view_ points to
  RowArgumentsView<A> view_;
  Rows<4> rows_;
};

template <class A, class Take>
ChunkSum read_chunk(const RowReader<A>& read, std::int64_t begin, std::int64_t end, const Take& take) {
  ChunkSum sum;
  for (auto r = begin; r < end; ++r) {
    const auto row = read(r);
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
ChunkSums read_rows(const RowArguments& arguments, const RowReader<A>& read, std::int64_t chunk, const Take& take) {
  const auto rows = read.count();
  ChunkSums sums(rows == 0 ? 0 : divide_up(rows, chunk));
  for_chunks(rows, chunk, [&](auto c, auto begin, auto end) { sums[c] = read_chunk(read, begin, end, take); });
  for (const auto& sum : sums) {
    if (sum.first >= 0) throw_out_of_range(arguments, sum.first, sum.index, read.classes());
  }
  return sums;
}

}  // namespace

ClassMask::ClassMask(const RowArguments& arguments) : mask(*arguments.class_mask) {
  if (mask.scalar_type() != at::kBool) mask = mask.ne(0);
  const bool shared = mask.dim() == 1 && arguments.target.dim() != 0;
  dim = shared ? 0 : arguments.dim;
  if (!shared) strides = row_strides(mask, dim);
}

template <class A>
RowPlan<A> make_row_plan(const RowArguments& arguments, Reduction reduction, const OptionalTensor& normalizer) {
  const RowReader<A> read(arguments);
  const auto rows = read.count();
  RowPlan<A> plan(rows);
  // A sequence is a chunk where its own weight is needed.
  const bool by_sequence = reduction == Reduction::SequenceMean;
  const auto& target = arguments.target;
  const auto chunk = !by_sequence ? kChunk : target.dim() > 0 && rows > 0 ? rows / target.size(0) : 1;
  const auto sums = read_rows(arguments, read, chunk, [&](std::int64_t r, const Row<A>& row) {
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
    check_normalizer_value(divisor);
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
double sum_of_weights(const RowArguments& arguments) {
  const RowReader<A> read(arguments);
  const auto sums = read_rows(arguments, read, kChunk, [](std::int64_t, const Row<A>&) {});
  double total = 0;
  for (const auto& sum : sums) total += sum.weight;
  return total;
}

template RowPlan<float> make_row_plan(const RowArguments&, Reduction, const OptionalTensor&);
template RowPlan<double> make_row_plan(const RowArguments&, Reduction, const OptionalTensor&);
template double sum_of_weights<float>(const RowArguments&);
template double sum_of_weights<double>(const RowArguments&);

}  // namespace masked_loss::cpu
