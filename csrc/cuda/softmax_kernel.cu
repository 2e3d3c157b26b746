#include "cuda/softmax_kernel.h"

#include "cuda/row_tiles.cuh"
#include "cuda/softmax_ring.cuh"

namespace masked_loss::cuda {
namespace {

using Pass = SoftmaxPass;

// What kernels are compiled for: the first two do the passes of log_softmax as well.
enum class Kind { Softmax, SoftmaxBackward, Logsumexp, LogsumexpBackward };

constexpr RowLimits limits(Kind kind) { return {kind == Kind::SoftmaxBackward ? 4 : 8, true}; }

// What the programs have in common: rows in their order, of which a mask and causality keep some classes.
template <class T_, Kind kind>
struct SoftmaxRows {
  using T = T_;
  using A = Accumulation<T>;
  static constexpr bool kWrites = kind != Kind::Logsumexp, kSecond = kind == Kind::SoftmaxBackward, kFillsSecond = true;
  static constexpr bool kMasks = true, kTiles = !std::is_same_v<T, double> && limits(kind).tiles;
  static constexpr int kPacks = limits(kind).packs(sizeof(T)),
                       kResident = sizeof(T) == 8 || kind == Kind::Logsumexp ? 512 : 640;

  SoftmaxWork<T, A> work;
  bool log;
  bool mask_repeats;  // over rows

  struct Known {};

  __device__ __forceinline__ std::int64_t classes() const { return work.classes; }
  __host__ __device__ __forceinline__ std::int64_t count() const { return work.rows.count; }
  __device__ __forceinline__ std::int64_t end() const { return work.rows.count; }
  __device__ __forceinline__ std::int64_t row(std::int64_t position) const { return position; }
  __device__ __forceinline__ RowStrides strides() const {
    return {work.input_stride, work.grad_stride, work.result_stride, work.mask_stride};
  }
  __device__ __forceinline__ RowLine<T> line(std::int64_t row) const {
    const auto offsets = work.rows.offsets(row);
    return {work.input + offsets[0], kSecond ? work.grad + offsets[3] : nullptr,
            kWrites ? work.result + offsets[1] : nullptr, work.mask == nullptr ? nullptr : work.mask + offsets[2]};
  }
  __device__ __forceinline__ bool waits() const { return mask_repeats; }
  __device__ __forceinline__ std::int64_t mask_of_rows() const { return work.rows.strides[2][work.rows.dims - 1]; }
  __device__ __forceinline__ Known known(std::int64_t) const { return {}; }
  __device__ __forceinline__ bool keeps(const Known&) const { return true; }
  __device__ __forceinline__ std::int64_t chosen(const Known&) const { return 0; }
  __device__ __forceinline__ std::int64_t kept_end(std::int64_t row) const { return work.causal_end(row); }
  __host__ __device__ __forceinline__ bool visits() const { return true; }
  __device__ __forceinline__ A masked() const {
    return kind == Kind::Softmax && log ? -std::numeric_limits<A>::infinity() : A(0);
  }
};

template <class T, Kind kind>
struct SoftmaxProgram;

// Softmax, log_softmax and logsumexp.
template <class T, Kind kind>
struct Forward : SoftmaxRows<T, kind> {
  using A = Accumulation<T>;
  using Known = typename SoftmaxRows<T, kind>::Known;
  static constexpr bool kVisits = true;

  using State = SoftmaxPart<A>;
  struct Row {
    std::int64_t row;
  };
  struct Terms {
    A max, other;  // the scale of exponentials, or the logarithm of their sum
  };

  __device__ __forceinline__ static A nothing() { return -std::numeric_limits<A>::infinity(); }
  __device__ __forceinline__ Row begin(std::int64_t row, const Known&, bool) const { return {row}; }

  template <class View>
  __device__ __forceinline__ void visit(State& state, const View& view) const {
    add_softmax<kind == Kind::Logsumexp>(state, view);
  }
  __device__ __forceinline__ State merge(const State& a, const State& b) const { return merge_softmax(a, b); }
  __device__ __forceinline__ State reduce(const State& state, int lanes) const { return reduce_part(state, lanes); }

  __device__ __forceinline__ Terms conclude(const Row& row, const State& state, bool gives) const {
    if constexpr (kind == Kind::Logsumexp) {
      if (gives) this->work.reduced[row.row] = log_sum_exp(Softmax<A>(state));
      return {};
    } else {
      return {state.max, this->log ? std::log(state.sum) : 1 / state.sum};
    }
  }

  template <class Index, int n>
  __device__ __forceinline__ void write(A (&x)[n], const A (&)[n], Index, const Terms& terms) const {
    if (this->log) {
#pragma unroll
      for (A& value : x) value = value - terms.max - terms.other;
    } else {
#pragma unroll
      for (A& value : x) value = exp_of(value - terms.max) * terms.other;
    }
  }
};

// What the gradient of a row sums: result * grad of softmax, grad of log_softmax.
template <class T, Kind kind>
struct Backward : SoftmaxRows<T, kind> {
  using A = Accumulation<T>;
  using Known = typename SoftmaxRows<T, kind>::Known;
  static constexpr bool kVisits = true;

  struct State {
    A sum = 0;
  };
  struct Row {};
  using Terms = State;

  __device__ __forceinline__ static A nothing() { return 0; }
  __device__ __forceinline__ Row begin(std::int64_t, const Known&, bool) const { return {}; }

  template <class View>
  __device__ __forceinline__ void visit(State& state, const View& view) const {
    if (this->log) {
#pragma unroll
      for (int i = 0; i < view.size; ++i) state.sum += view.second(i);
    } else {
#pragma unroll
      for (int i = 0; i < view.size; ++i) state.sum += view.x(i) * view.second(i);
    }
  }
  __device__ __forceinline__ State merge(const State& a, const State& b) const { return {a.sum + b.sum}; }
  __device__ __forceinline__ State reduce(const State& state, int lanes) const {
    return {reduce_lanes(state.sum, lanes, Plus())};
  }
  __device__ __forceinline__ Terms conclude(const Row&, const State& state, bool) const { return state; }

  template <class Index, int n>
  __device__ __forceinline__ void write(A (&y)[n], const A (&grad)[n], Index, const Terms& terms) const {
#pragma unroll
    for (int j = 0; j < n; ++j) {
      y[j] = this->log ? grad[j] - exp_of(y[j]) * terms.sum : y[j] * (grad[j] - terms.sum);
    }
  }
};

template <class T, Kind kind>
struct LogsumexpGradient : SoftmaxRows<T, kind> {
  using A = Accumulation<T>;
  using Known = typename SoftmaxRows<T, kind>::Known;
  static constexpr bool kVisits = false;

  struct State {
    A none;
  };
  struct Terms {
    A lse, grad;
  };
  using Row = Terms;

  __device__ __forceinline__ static A nothing() { return 0; }
  __device__ __forceinline__ Row begin(std::int64_t row, const Known&, bool) const {
    return {this->work.reduced[row], this->work.row_grad[row]};
  }
  template <class View>
  __device__ __forceinline__ void visit(State&, const View&) const {}
  __device__ __forceinline__ State merge(const State& a, const State&) const { return a; }
  __device__ __forceinline__ State reduce(const State& state, int) const { return state; }
  __device__ __forceinline__ Terms conclude(const Row& row, const State&, bool) const { return row; }

  template <class Index, int n>
  __device__ __forceinline__ void write(A (&x)[n], const A (&)[n], Index, const Terms& terms) const {
#pragma unroll
    for (A& value : x) value = exp_of(value - terms.lse) * terms.grad;
  }
};

template <class T>
struct SoftmaxProgram<T, Kind::Softmax> : Forward<T, Kind::Softmax> {};
template <class T>
struct SoftmaxProgram<T, Kind::Logsumexp> : Forward<T, Kind::Logsumexp> {};
template <class T>
struct SoftmaxProgram<T, Kind::SoftmaxBackward> : Backward<T, Kind::SoftmaxBackward> {};
template <class T>
struct SoftmaxProgram<T, Kind::LogsumexpBackward> : LogsumexpGradient<T, Kind::LogsumexpBackward> {};

// Calls run(constant) with the kind as a constant.
template <class Run>
auto with_kind(Pass pass, const Run& run) {
  switch (pass) {
    case Pass::Softmax:
    case Pass::LogSoftmax: return run(std::integral_constant<Kind, Kind::Softmax>());
    case Pass::SoftmaxBackward:
    case Pass::LogSoftmaxBackward: return run(std::integral_constant<Kind, Kind::SoftmaxBackward>());
    case Pass::Logsumexp: return run(std::integral_constant<Kind, Kind::Logsumexp>());
    default: return run(std::integral_constant<Kind, Kind::LogsumexpBackward>());
  }
}

}  // namespace

RowRegime pick_softmax_regime(Pass pass, RowFacts facts, int multiprocessors) {
  // Of blocks, which read one another's shared memory. Kernels of one source are compiled for the same versions.
  if (facts.ring_blocks > 0 && ptx_version<&row_packs<SoftmaxProgram<float, Kind::Softmax>>>() < 90) {
    facts.ring_blocks = 0;
  }
  return with_kind(pass, [&](auto kind) { return pick_row_regime(facts, limits(kind()), multiprocessors); });
}

template <class T, class A>
void run_softmax(const SoftmaxWork<T, A>& work, Pass pass, const RowRegime& regime, void* parts, int multiprocessors,
                 cudaStream_t stream) {
  if (work.rows.count == 0) return;
  if constexpr (!std::is_same_v<T, double>) {
    if (regime.kind == RowRegime::Ring) {
      return work.mask != nullptr || work.queries > 0 ? run_softmax_ring<true>(work, pass, regime.slices, stream)
                                                      : run_softmax_ring<false>(work, pass, regime.slices, stream);
    }
  }
  with_kind(pass, [&](auto kind) {
    using Program = SoftmaxProgram<T, kind()>;
    Program program;
    program.work = work;
    program.log = pass == Pass::LogSoftmax || pass == Pass::LogSoftmaxBackward;
    program.mask_repeats = false;
    for (int d = 0; work.mask != nullptr && d < work.rows.dims; ++d) {
      program.mask_repeats |= work.rows.strides[2][d] == 0 && work.rows.sizes[d] > 1;
    }
    if constexpr (!std::is_same_v<T, double>) {
      if (regime.kind == RowRegime::Packs) {
        return launch_packs(program, regime, static_cast<typename Program::State*>(parts), multiprocessors, stream);
      }
    }
    launch_tiles(program, regime, multiprocessors, stream);
  });
}

#define INSTANTIATE(T, A)                                                  \
  template int softmax_ring_blocks(const SoftmaxWork<T, A>&, SoftmaxPass); \
  template void run_softmax(const SoftmaxWork<T, A>&, Pass, const RowRegime&, void*, int, cudaStream_t);
MASKED_LOSS_EACH_DTYPE(INSTANTIATE)
#undef INSTANTIATE

}  // namespace masked_loss::cuda
