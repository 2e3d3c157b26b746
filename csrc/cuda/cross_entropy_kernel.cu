#include "cuda/cross_entropy_kernel.h"

#include <algorithm>

#include "cuda/cross_entropy_ring.cuh"
#include "cuda/row_tiles.cuh"

namespace masked_loss::cuda {
namespace {

using Mode = CrossEntropyMode;

template <class A>
__device__ __forceinline__ constexpr A infinity() {
  return std::numeric_limits<A>::infinity();
}

// What a part of a row has come to.
template <class A>
struct RowPart {
  Softmax<A> softmax;
  ClassSums smoothing, target;  // the latter of class probabilities
};

template <class T, class A>
__device__ __forceinline__ CrossEntropyRow<A> describe(const CrossEntropyWork<T, A>& work, std::int64_t r,
                                                       std::int64_t target, const ClassSums& smoothing) {
  const bool weighted = work.weight != nullptr && work.probabilities == nullptr;
  return {work.coefficient[r], weighted ? work.weight[target] : A(1), work.label_smoothing, work.z_loss, smoothing};
}

template <bool kProbabilities = true, class T, class A>
__device__ __forceinline__ void give_loss(const CrossEntropyWork<T, A>& work, std::int64_t r,
                                          const CrossEntropyRow<A>& row, const RowPart<A>& part, A target_logit,
                                          bool target_allowed) {
  const auto& softmax = part.softmax;
  const A log_sum = std::log(softmax.sum);
  work.loss[r] = kProbabilities && work.probabilities != nullptr
                     ? cross_entropy_loss(row, softmax, log_sum, part.target)
                     : cross_entropy_loss(row, softmax, log_sum, target_logit, target_allowed);
  if (work.softmax != nullptr) work.softmax[r] = softmax;
}

using Extras = CrossEntropyExtras;

constexpr RowLimits limits(Extras extras) { return {extras == Extras::Probabilities ? 4 : 8, extras == Extras::None}; }

template <class T_, Mode mode, Extras kind>
struct CrossEntropyProgram {
  using T = T_;
  using A = Accumulation<T>;
  static constexpr bool extras = kind != Extras::None, has_probabilities = kind == Extras::Probabilities;
  static constexpr bool kVisits = mode != Mode::Backward || extras, kWrites = mode != Mode::Forward;
  static constexpr bool kSecond = has_probabilities, kFillsSecond = false, kMasks = extras;
  static constexpr bool kTiles = !std::is_same_v<T, double> && limits(kind).tiles;
  static constexpr int kPacks = limits(kind).packs(sizeof(T));
  static constexpr int kResident = sizeof(T) == 8 ? (extras ? 256 : 512) : has_probabilities ? 384 : extras ? 512 : 640;

  CrossEntropyWork<T, A> work;
  const std::int64_t* order;
  const std::int64_t* kept;
  bool mask_repeats;  // over rows

  struct Known {
    std::int64_t index = -1;
  };
  struct PartOfClasses : SoftmaxPart<A> {
    ClassSums smoothing;
  };
  struct PartOfProbabilities : PartOfClasses {
    ClassSums target;
  };
  using State = std::conditional_t<has_probabilities, PartOfProbabilities,
                                   std::conditional_t<extras, PartOfClasses, SoftmaxPart<A>>>;
  struct Row {
    std::int64_t row, index;
    CrossEntropyRow<A> known;
    A target_logit;
    bool target_allowed;
    Softmax<A> softmax;  // of the forward pass
  };
  struct Terms {
    A max, scale, smoothing, target;  // the scale is of exponentials
    std::int64_t index;
  };

  __device__ __forceinline__ std::int64_t classes() const { return work.classes; }
  __host__ __device__ __forceinline__ std::int64_t count() const { return work.rows.count; }
  __device__ __forceinline__ std::int64_t end() const { return mode == Mode::Forward ? *kept : work.rows.count; }
  __device__ __forceinline__ std::int64_t row(std::int64_t position) const { return order[position]; }
  __device__ __forceinline__ RowStrides strides() const {
    return {work.logits_stride, work.probabilities_stride, work.gradient_stride, work.class_mask_stride};
  }
  __device__ __forceinline__ RowLine<T> line(std::int64_t row) const {
    const auto offsets = work.rows.offsets(row);
    RowLine<T> line{work.logits + offsets[0], nullptr, kWrites ? work.gradient + offsets[1] : nullptr, nullptr};
    if constexpr (extras) {
      if (work.class_mask != nullptr) line.mask = work.class_mask + offsets[2];
    }
    if constexpr (has_probabilities) line.second = work.probabilities + offsets[3];
    return line;
  }
  __device__ __forceinline__ bool waits() const { return false; }
  __device__ __forceinline__ std::int64_t mask_of_rows() const { return work.rows.strides[2][work.rows.dims - 1]; }
  __device__ __forceinline__ Known known(std::int64_t row) const { return {work.index[row]}; }
  __device__ __forceinline__ bool keeps(const Known& known) const { return known.index >= 0; }
  __device__ __forceinline__ std::int64_t chosen(const Known& known) const { return known.index; }
  __device__ __forceinline__ std::int64_t kept_end(std::int64_t) const { return work.classes; }

  __device__ __forceinline__ Row begin(std::int64_t row, const Known& known, bool gives) const {
    Row of{row, known.index, describe(work, row, known.index, {}), 0, true, {}};
    if constexpr (mode == Mode::Backward) {
      of.softmax = work.softmax[row];
    } else if (gives && known.index < work.classes) {  // a row without classes has a target out of range
      const auto offsets = work.rows.offsets(row);
      of.target_logit = widen(work.logits[offsets[0] + known.index * work.logits_stride]);
      if constexpr (extras) {
        if (work.class_mask != nullptr) {
          of.target_allowed = work.class_mask[offsets[2] + known.index * work.class_mask_stride] != 0;
        }
      }
    }
    return of;
  }

  __device__ __forceinline__ static A nothing() { return -infinity<A>(); }
  __device__ __forceinline__ A masked() const { return 0; }
  __device__ __forceinline__ bool smooths() const { return extras && work.label_smoothing != 0; }
  __device__ __forceinline__ A weight_of(std::int64_t c) const {
    return work.weight == nullptr ? A(1) : work.weight[c];
  }

  // What a backward pass needs of a row may be known.
  __host__ __device__ __forceinline__ bool visits() const {
    return mode != Mode::Backward || has_probabilities ||
           (extras && work.label_smoothing != 0 && (work.class_mask != nullptr || work.weight != nullptr));
  }

  template <class View>
  __device__ __forceinline__ void visit(State& state, const View& view) const {
    if constexpr (extras) {
      // Shifted by the maximum, so that large logits lose no digits.
      const A shift = greater(state.max, view.greatest());
      if (smooths()) sum_classes<false>(state.smoothing, view, shift);
      view.hold();
      if constexpr (has_probabilities) {
        sum_classes<true>(state.target, view, shift);
        view.hold();
      }
    }
    if constexpr (mode != Mode::Backward) add_softmax<false>(static_cast<SoftmaxPart<A>&>(state), view);
  }

  // What smoothing adds up over the classes, or their probabilities do.
  template <bool of_probabilities, class View>
  __device__ __forceinline__ void sum_classes(ClassSums& sums, const View& view, A shift) const {
    A logits = 0, weights = 0;
    int classes = 0;
    const auto add_class = [&](int i, A weight) {
      const bool kept = view.kept(i);
      if constexpr (of_probabilities) {
        const A probability = view.second(i);
        classes += !kept && probability > 0;
        weight *= probability;
      } else {
        classes += kept;
      }
      weight = kept ? weight : A(0);
      if constexpr (mode != Mode::Backward) logits += weight * (kept ? view.x(i) - shift : A(0));
      weights += weight;
    };
    if (work.weight == nullptr) {
#pragma unroll
      for (int i = 0; i < View::size; ++i) add_class(i, 1);
    } else {
#pragma unroll 1  // all weights at once would take too many registers
      for (int u = 0; u < View::units; ++u) {
#pragma unroll
        for (int i = 0; i < View::width; ++i) {
          add_class(i, view.kept(i) ? work.weight[view.of(i) + u * view.step()] : A(0));
        }
        view.rotate();
      }
    }
    add(sums, logits, weights, classes, shift);
  }

  __device__ __forceinline__ static void add(ClassSums& sums, A logits, A weights, int classes, A shift) {
    if constexpr (mode != Mode::Backward) sums.logits += double(logits) + double(shift) * double(weights);
    sums.weight += double(weights);
    sums.classes += classes;
  }

  __device__ __forceinline__ State merge(const State& a, const State& b) const {
    State both;
    if constexpr (mode != Mode::Backward) {
      static_cast<SoftmaxPart<A>&>(both) = merge_softmax<A>(a, b);
    }
    if constexpr (extras) both.smoothing = a.smoothing + b.smoothing;
    if constexpr (has_probabilities) both.target = a.target + b.target;
    return both;
  }
  __device__ __forceinline__ State reduce(const State& state, int lanes) const {
    State all;
    if constexpr (mode != Mode::Backward) {
      static_cast<SoftmaxPart<A>&>(all) = reduce_part<A>(state, lanes);
    }
    if constexpr (extras) {
      if (smooths()) all.smoothing = reduce_lanes(state.smoothing, lanes, Plus());
    }
    if constexpr (has_probabilities) all.target = reduce_lanes(state.target, lanes, Plus());
    return all;
  }

  __device__ __forceinline__ Terms conclude(const Row& of, const State& state, bool gives) const {
    auto row = of.known;
    RowPart<A> part;
    A target_sum = row.target_weight;
    if constexpr (extras) {
      row.smoothing =
          mode == Mode::Backward && !visits() ? ClassSums{0, double(work.classes), work.classes} : state.smoothing;
    }
    if constexpr (has_probabilities) {
      part.target = state.target;
      target_sum = static_cast<A>(state.target.weight);
    }
    part.softmax = mode == Mode::Backward ? of.softmax : Softmax<A>(state);
    if constexpr (mode != Mode::Backward) {
      if (gives) give_loss<has_probabilities>(work, of.row, row, part, of.target_logit, of.target_allowed);
    }
    if constexpr (!kWrites) return {};
    const auto gradient = cross_entropy_gradient(row, log_sum_exp(part.softmax), target_sum);
    return {part.softmax.max, gradient.probability / part.softmax.sum, gradient.smoothing, gradient.target, of.index};
  }

  template <class Index, int n>
  __device__ __forceinline__ void write(A (&x)[n], const A (&second)[n], Index first, const Terms& terms) const {
#pragma unroll
    for (A& value : x) value = exp_of(value - terms.max) * terms.scale;
    if constexpr (has_probabilities) {
#pragma unroll
      for (int j = 0; j < n; ++j) x[j] -= (terms.smoothing + terms.target * second[j]) * weight_in_row(first + j);
      return;
    }
    if constexpr (extras) {
      if (terms.smoothing != 0) {
#pragma unroll
        for (int j = 0; j < n; ++j) x[j] -= terms.smoothing * weight_in_row(first + j);
      }
    }
    if (const auto target = static_cast<Index>(terms.index) - first; target >= 0 && target < n) {
#pragma unroll
      for (int j = 0; j < n; ++j) {
        if (target == j) x[j] -= terms.target;
      }
    }
  }

  // Classes side by side may reach beyond the row.
  __device__ __forceinline__ A weight_in_row(std::int64_t c) const { return c < work.classes ? weight_of(c) : A(0); }
};

template <class T, class A>
__global__ void __launch_bounds__(256) scale_elements(T* gradient, std::int64_t n, const A* by) {
  const A factor = *by;
  if (factor == 1) return;
  const auto scaled = [&](T x) { return widen(x) == 0 ? narrow<T>(A(0)) : narrow<T>(widen(x) * factor); };
  const auto thread = std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const auto threads = std::int64_t(gridDim.x) * blockDim.x;
  const auto head = min(n, std::int64_t(elements_to_alignment(gradient)));
  const auto packs = (n - head) / Pack<T>::size, tail = head + packs * Pack<T>::size;
  for (auto p = thread; p < packs; p += threads) {
    auto pack = load_streaming(gradient + head + p * Pack<T>::size);
#pragma unroll
    for (T& value : pack.values) value = scaled(value);
    store_streaming(gradient + head + p * Pack<T>::size, pack);
  }
  if (thread < head) gradient[thread] = scaled(gradient[thread]);
  if (tail + thread < n) gradient[tail + thread] = scaled(gradient[tail + thread]);
}

// Of blocks, which read one another's shared memory. Kernels of one source are compiled for the same versions.
bool has_clusters() {
  return ptx_version<&row_packs<CrossEntropyProgram<float, Mode::ForwardGrad, Extras::None>>>() >= 90;
}

template <class T, Mode mode, Extras extras, class A>
void run_program(const CrossEntropyCall<T, A>& call, const RowRegime& regime, int multiprocessors,
                 cudaStream_t stream) {
  using Program = CrossEntropyProgram<T, mode, extras>;
  const Program program{call.work, call.order, call.kept, false};
  if constexpr (!std::is_same_v<T, double>) {
    if (regime.kind == RowRegime::Packs) {
      return launch_packs(program, regime, static_cast<typename Program::State*>(call.parts), multiprocessors, stream);
    }
  }
  launch_tiles(program, regime, multiprocessors, stream);
}

template <class T, Mode mode, class A>
void run_mode(const CrossEntropyCall<T, A>& call, const RowRegime& regime, int multiprocessors, cudaStream_t stream) {
  if constexpr (!std::is_same_v<T, double> && mode != Mode::Backward) {
    if (regime.kind == RowRegime::Ring)
      return run_cross_entropy_ring<mode == Mode::ForwardGrad>(call, regime.slices, stream);
  }
  switch (cross_entropy_extras(call.work)) {
    case Extras::None: return run_program<T, mode, Extras::None>(call, regime, multiprocessors, stream);
    case Extras::Classes: return run_program<T, mode, Extras::Classes>(call, regime, multiprocessors, stream);
    default: return run_program<T, mode, Extras::Probabilities>(call, regime, multiprocessors, stream);
  }
}

}  // namespace

RowRegime pick_cross_entropy_regime(RowFacts facts, Extras extras, int multiprocessors) {
  if (facts.ring_blocks > 0 && !has_clusters()) facts.ring_blocks = 0;
  return pick_row_regime(facts, limits(extras), multiprocessors);
}

template <class T, class A>
std::int64_t cross_entropy_part_bytes(const CrossEntropyWork<T, A>& work) {
  const auto bytes = [](auto extras) {
    return sizeof(typename CrossEntropyProgram<T, Mode::Forward, extras()>::State);
  };
  switch (cross_entropy_extras(work)) {
    case Extras::None: return bytes(std::integral_constant<Extras, Extras::None>());
    case Extras::Classes: return bytes(std::integral_constant<Extras, Extras::Classes>());
    default: return bytes(std::integral_constant<Extras, Extras::Probabilities>());
  }
}

template <class T, class A>
void run_cross_entropy(const CrossEntropyCall<T, A>& call, Mode mode, const RowRegime& regime, int multiprocessors,
                       cudaStream_t stream) {
  if (call.work.rows.count == 0) return;
  switch (mode) {
    case Mode::Forward: return run_mode<T, Mode::Forward>(call, regime, multiprocessors, stream);
    case Mode::ForwardGrad: return run_mode<T, Mode::ForwardGrad>(call, regime, multiprocessors, stream);
    case Mode::Backward: return run_mode<T, Mode::Backward>(call, regime, multiprocessors, stream);
  }
}

template <class T, class A>
void scale_gradient(T* gradient, std::int64_t n, const A* by, int multiprocessors, cudaStream_t stream) {
  if (n == 0) return;
  const auto blocks = divide_up(n, Pack<T>::size * 256);
  launch(scale_elements<T, A>, {row_grid(blocks, multiprocessors, 256), 256}, stream, gradient, n, by);
}

template <class T, class A>
int cross_entropy_ring_blocks(const CrossEntropyWork<T, A>& work, Mode mode) {
  if (std::is_same_v<T, double> || mode == Mode::Backward) return 0;
  if (work.class_mask != nullptr && work.class_mask_stride != 1) return 0;
  if (!begin_alike<T>(work.rows, {{work.logits, 0}, {work.gradient, 1}, {work.probabilities, 3}})) return 0;
  const auto kind = ring_classes(work);
  return ring_blocks(sizeof(T), kind == RingClasses::Probabilities ? 2 : 1, kind != RingClasses::Plain, work.classes);
}

#define INSTANTIATE(T, A)                                                                                    \
  template std::int64_t cross_entropy_part_bytes(const CrossEntropyWork<T, A>&);                             \
  template int cross_entropy_ring_blocks(const CrossEntropyWork<T, A>&, Mode);                               \
  template void run_cross_entropy(const CrossEntropyCall<T, A>&, Mode, const RowRegime&, int, cudaStream_t); \
  template void scale_gradient(T*, std::int64_t, const A*, int, cudaStream_t);
MASKED_LOSS_EACH_DTYPE(INSTANTIATE)
#undef INSTANTIATE

}  // namespace masked_loss::cuda
