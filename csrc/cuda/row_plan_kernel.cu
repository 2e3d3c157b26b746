#include "cuda/row_plan_kernel.h"

#include "cuda/device.cuh"

namespace masked_loss::cuda {
namespace {

constexpr int kThreads = 512;
constexpr std::int64_t kOutOfRange = -2;  // among the targets, until the plan is finished

struct MergeChunks {
  __device__ PlanChunk operator()(const PlanChunk& a, const PlanChunk& b) const {
    return {a.weight + b.weight, a.kept + b.kept, a.first < b.first ? a.first : b.first};
  }
};

// What the kept and the masked rows of a chunk follow in the order, and what the divisor is made of.
struct Totals {
  double weight = 0;
  std::int64_t kept = 0;
  std::int64_t kept_before = 0;
  std::int64_t sequences = 0;
};
struct MergeTotals {
  __device__ Totals operator()(const Totals& a, const Totals& b) const {
    return {a.weight + b.weight, a.kept + b.kept, a.kept_before + b.kept_before, a.sequences + b.sequences};
  }
};

template <class Merge>
struct Warp {
  template <class T>
  __device__ T operator()(const T& value) const {
    return reduce_lanes(value, 32, Merge{});
  }
};

template <class A>
__device__ PlanChunk read_chunk(const RowPlanWork<A>& work, std::int64_t begin, std::int64_t end) {
  const PlanChunk empty{0, 0, work.rows.count};
  PlanChunk sum = empty;
  for (auto r = begin + threadIdx.x; r < end; r += blockDim.x) {
    const auto offsets = work.rows.offsets(r);
    const auto row = resolve_row(work.view, offsets[0], offsets[1], offsets[2], offsets[3]);
    const bool in_range = row.state != RowState::OutOfRange;
    if (row.state != RowState::Masked) {
      sum = MergeChunks{}(sum, {static_cast<double>(row.counted), 1, in_range ? work.rows.count : r});
    }
    if (work.index == nullptr) continue;
    work.index[r] = in_range ? row.index : kOutOfRange;
    work.coefficient[r] = row.weight;
  }
  return reduce_block(sum, Warp<MergeChunks>{}, empty);
}

template <class A>
__device__ void finish_row(const RowPlanWork<A>& work, std::int64_t r, double divisor) {
  auto index = work.index[r];
  if (index != -1) {
    auto coefficient = index == kOutOfRange ? std::numeric_limits<A>::quiet_NaN() : work.coefficient[r];
    index = index == kOutOfRange ? 0 : index;
    if (work.divisor != Divisor::One || work.sequences > 0) {
      const double by = work.sequences > 0 ? divisor * work.sequence_weight[work.by_length(r)] : divisor;
      if (by == 0) index = -1;  // a divisor of 0 gives 0: its rows are dropped
      coefficient = static_cast<A>(coefficient / by);
    }
    if (work.upstream != nullptr && index >= 0) coefficient *= work.upstream[work.upstream_rows.offsets(r)[0]];
    work.index[r] = index;
    work.coefficient[r] = coefficient;
  }
  if (index >= 0) return;
  if (work.loss != nullptr) work.loss[r] = 0;
  if (work.softmax != nullptr) work.softmax[r] = {0, 1};
}

// How many threads before this one have the flag set, and in `count` how many of the block.
__device__ int rank_in_block(bool flag, int& count) {
  auto& warps = shared<int[32], struct Ranks>();
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const unsigned votes = __ballot_sync(kWholeWarp, flag);
  if (lane == 0) warps[warp] = __popc(votes);
  __syncthreads();
  int before = 0;
  count = 0;
  for (unsigned w = 0; w < blockDim.x / 32; ++w) {
    if (w < warp) before += warps[w];
    count += warps[w];
  }
  __syncthreads();  // before the next call writes
  return before + __popc(votes & ((1u << lane) - 1));
}

template <class A>
__device__ void finish_chunk(const RowPlanWork<A>& work, std::int64_t begin, std::int64_t end, const Totals& totals) {
  double divisor = work.sequences > 0 ? static_cast<double>(totals.sequences) : totals.weight;
  if (work.divisor == Divisor::Normalizer) {
    divisor = *work.normalizer;
    if (divisor < 0) divisor = std::numeric_limits<double>::quiet_NaN();  // an error where it could be waited for
  }
  if (begin == 0 && threadIdx.x == 0 && work.kept != nullptr) *work.kept = totals.kept;
  auto kept = totals.kept_before, masked = totals.kept + begin - totals.kept_before;
  for (auto base = begin; base < end; base += blockDim.x) {
    const auto r = base + threadIdx.x;
    const bool listed = r < end && work.index[r] != -1;
    if (work.order != nullptr) {
      int count;
      const int rank = rank_in_block(listed, count);
      if (r < end) work.order[listed ? kept + rank : masked + (threadIdx.x - rank)] = r;
      kept += count;
      masked += blockDim.x - count;
    }
    if (r < end) finish_row(work, r, divisor);
  }
}

// All rows by one block.
template <class A>
__global__ void __launch_bounds__(kThreads) plan_few_rows(RowPlanWork<A> work) {
  const auto chunk = read_chunk(work, 0, work.rows.count);
  if (threadIdx.x == 0) work.chunks[0] = chunk;
  finish_chunk(work, 0, work.rows.count, {chunk.weight, chunk.kept, 0, 0});
}

template <class A>
__global__ void __launch_bounds__(kThreads) read_many_rows(RowPlanWork<A> work, std::int64_t size) {
  const auto begin = blockIdx.x * size;
  const auto chunk = read_chunk(work, begin, min(begin + size, work.rows.count));
  if (threadIdx.x == 0) work.chunks[blockIdx.x] = chunk;
}

// One warp or one block a sequence.
template <class A, bool by_block>
__global__ void __launch_bounds__(kThreads) weigh_sequences(RowPlanWork<A> work, std::int64_t size) {
  constexpr int threads = by_block ? kThreads : 32;
  const int lane = threadIdx.x % threads, group = threadIdx.x / threads;
  const auto begin = blockIdx.x * size, end = min(begin + size, work.sequences);
  std::int64_t with_kept = 0;
  for (auto s = begin + group; s < end; s += kThreads / threads) {
    PlanChunk sum{0, 0, 0};
    const auto first = s * work.sequence_length;
    for (std::int64_t i = lane; i < work.sequence_length; i += threads) {
      const auto index = work.index[first + i];
      if (index == -1) continue;
      const A weight = work.coefficient[first + i];
      sum.weight += index < 0 || work.view.weight == nullptr ? weight : weight * work.view.weight[index];
      ++sum.kept;
    }
    sum = by_block ? reduce_block(sum, Warp<MergeChunks>{}) : Warp<MergeChunks>{}(sum);
    if (lane == 0) {
      work.sequence_weight[s] = sum.weight;
      with_kept += sum.kept > 0;
    }
  }
  with_kept = reduce_block(with_kept, WarpSum{});
  if (threadIdx.x == 0) work.sequence_chunks[blockIdx.x] = with_kept;
}

template <class A>
__global__ void __launch_bounds__(kThreads) finish_many_rows(RowPlanWork<A> work, std::int64_t size) {
  Totals totals;
  for (unsigned c = threadIdx.x; c < gridDim.x; c += blockDim.x) {
    const auto chunk = work.chunks[c];
    totals = MergeTotals{}(totals, {chunk.weight, chunk.kept, c < blockIdx.x ? chunk.kept : 0, 0});
  }
  for (auto c = std::int64_t(threadIdx.x); c < plan_chunks(work.sequences); c += blockDim.x) {
    totals.sequences += work.sequence_chunks[c];
  }
  totals = reduce_block(totals, Warp<MergeTotals>{});
  const auto begin = blockIdx.x * size;
  finish_chunk(work, begin, min(begin + size, work.rows.count), totals);
}

template <class A>
__global__ void __launch_bounds__(kThreads) sum_chunks(const PlanChunk* chunks, std::int64_t count, A* result) {
  double sum = 0;
  for (auto i = std::int64_t(threadIdx.x); i < count; i += blockDim.x) sum += chunks[i].weight;
  sum = reduce_block(sum, WarpSum{});
  if (threadIdx.x == 0) *result = static_cast<A>(sum);
}

template <class X, class Y>
__global__ void __launch_bounds__(kThreads) sum_parts(const X* x, std::int64_t n, std::int64_t part, Y* sums) {
  const auto begin = blockIdx.x * part, end = min(begin + part, n);
  double sum = 0;
  for (auto i = begin + threadIdx.x; i < end; i += blockDim.x) sum += static_cast<double>(x[i]);
  sum = reduce_block(sum, WarpSum{});
  if (threadIdx.x == 0) sums[blockIdx.x] = static_cast<Y>(sum);
}

unsigned blocks_of(std::int64_t rows) { return static_cast<unsigned>(plan_chunks(rows)); }

}  // namespace

template <class A>
void read_rows(const RowPlanWork<A>& work, cudaStream_t stream) {
  const auto rows = work.rows.count;
  if (rows > 0) launch(read_many_rows<A>, {blocks_of(rows), kThreads}, stream, work, plan_chunk(rows));
}

template <class A>
void plan_rows(const RowPlanWork<A>& work, cudaStream_t stream) {
  const auto rows = work.rows.count;
  if (rows == 0 || (plan_chunks(rows) == 1 && work.sequences == 0)) {
    return launch(plan_few_rows<A>, {1, kThreads}, stream, work);
  }
  read_rows(work, stream);
  if (work.sequences > 0) {
    const auto kernel = work.sequence_length > kThreads ? weigh_sequences<A, true> : weigh_sequences<A, false>;
    launch(kernel, {blocks_of(work.sequences), kThreads}, stream, work, plan_chunk(work.sequences));
  }
  launch(finish_many_rows<A>, {blocks_of(rows), kThreads}, stream, work, plan_chunk(rows));
}

template <class A>
void sum_weights(const PlanChunk* chunks, std::int64_t count, A* sum, cudaStream_t stream) {
  launch(sum_chunks<A>, {1, kThreads}, stream, chunks, count, sum);
}

template <class A>
void sum_losses(const A* losses, std::int64_t n, double* partials, A* sum, cudaStream_t stream) {
  constexpr std::int64_t few = 1 << 14;
  if (n <= few) return launch(sum_parts<A, A>, {1, kThreads}, stream, losses, n, few, sum);
  launch(sum_parts<A, double>, {blocks_of(n), kThreads}, stream, losses, n, plan_chunk(n), partials);
  launch(sum_parts<double, A>, {1, kThreads}, stream, partials, plan_chunks(n), kPlanChunks, sum);
}

#define INSTANTIATE(A)                                                         \
  template void read_rows(const RowPlanWork<A>&, cudaStream_t);                \
  template void plan_rows(const RowPlanWork<A>&, cudaStream_t);                \
  template void sum_weights(const PlanChunk*, std::int64_t, A*, cudaStream_t); \
  template void sum_losses(const A*, std::int64_t, double*, A*, cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace masked_loss::cuda
