#include "cuda/cross_entropy_kernel.h"

#include <algorithm>

#include "cuda/row_packs.cuh"
#include "cuda/row_ring.cuh"

namespace masked_loss::cuda {
namespace {

using Mode = CrossEntropyMode;

template <class A>
__device__ __forceinline__ constexpr A infinity() {
  return std::numeric_limits<A>::infinity();
}

// A row's numbers that every class of it needs.
template <class A>
struct RowTerms {
  CrossEntropyGradient<A> gradient;
  A max;
  A scale;  // of exp(x - max)
};

template <class A>
__device__ __forceinline__ RowTerms<A> row_terms(const CrossEntropyRow<A>& row, Softmax<A> softmax, A target_sum) {
  const auto gradient = cross_entropy_gradient(row, log_sum_exp(softmax), target_sum);
  return {gradient, softmax.max, gradient.probability / softmax.sum};
}

// The gradient of one class, from what its exponential times the scale is.
template <class A>
__device__ __forceinline__ A class_gradient(const RowTerms<A>& terms, A scaled, A weight, bool is_target) {
  const A gradient = scaled - terms.gradient.smoothing * weight;
  return is_target ? gradient - terms.gradient.target : gradient;
}

// The same with the probability of the class.
template <class A>
__device__ __forceinline__ A class_gradient(const RowTerms<A>& terms, A scaled, A weight, A probability) {
  return scaled - (terms.gradient.smoothing + terms.gradient.target * probability) * weight;
}

// Of a part of a row, which has the sum where there are class probabilities.
template <class A>
__device__ __forceinline__ A target_sum(const CrossEntropyRow<A>& row, const RowPart<A>& part, bool has_probabilities) {
  return has_probabilities ? static_cast<A>(part.target.weight) : row.target_weight;
}

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

// The part of a row that a group of threads holds: `size` classes from `first` on, as packs of the memory that is
// written, or else read.
template <class T, class A>
struct Span : RowPacks<T> {
  const T* logits;
  T* gradient;
  const std::uint8_t* allowed;  // or null
  const A* weight;              // or null
  const T* probabilities;       // or null
  int target;
  bool aligned, probabilities_aligned;  // the logits, and these, where the packs are

  __device__ Span(const CrossEntropyWork<T, A>& work, std::int64_t r, int slice, int slices,
                  std::int64_t target_class) {
    constexpr int n = Pack<T>::size;
    const auto offsets = work.rows.offsets(r);
    const std::int64_t width = (work.classes + std::int64_t(slices) * n - 1) / (std::int64_t(slices) * n) * n;
    const std::int64_t first = min(slice * width, work.classes);
    const int size = static_cast<int>(min(width, work.classes - first));
    logits = work.logits + offsets[0] + first;
    gradient = work.gradient == nullptr ? nullptr : work.gradient + offsets[1] + first;
    allowed = work.class_mask == nullptr ? nullptr : work.class_mask + offsets[2] + first;
    weight = work.weight == nullptr ? nullptr : work.weight + first;
    probabilities = work.probabilities == nullptr ? nullptr : work.probabilities + offsets[3] + first;
    static_cast<RowPacks<T>&>(*this) = {gradient == nullptr ? logits : gradient, size};
    aligned = is_aligned(logits + this->head);
    probabilities_aligned = is_aligned(probabilities + this->head);
    const auto local = target_class - first;
    target = local >= 0 && local < size ? static_cast<int>(local) : -1;
  }

  __device__ __forceinline__ bool allows(int i) const { return allowed == nullptr || allowed[i]; }
  __device__ __forceinline__ A weight_of(int i) const { return weight == nullptr ? A(1) : weight[i]; }
};

constexpr int kLargestTile = 512 * 8;  // packs

// Rows whose classes lie side by side. A group of kLanes threads holds kPacks packs each of a row, which is a tile; the
// last tile of a row, most often the only one, is still there when the gradient is made, and others are read again.
template <class T, Mode mode, int kLanes, int kPacks, bool kExtras>
struct PackGroup {
  using A = Accumulation<T>;
  using P = Pack<T>;
  // float and double make room for their exponentials, half types compute them again.
  static constexpr bool kKeepsExponentials = mode == Mode::ForwardGrad && std::is_same_v<T, A>;
  // The largest tile leaves no registers for them.
  static constexpr bool kProbabilities = kExtras && kLanes * kPacks < kLargestTile;

  const CrossEntropyCall<T, A>& call;
  const int lane;
  P tile[kPacks];
  unsigned allowed[kExtras ? kPacks : 1];  // a bit an element
  RowPart<A> part;                         // of this thread

  __device__ __forceinline__ explicit PackGroup(const CrossEntropyCall<T, A>& of)
      : call(of), lane(threadIdx.x % kLanes) {}

  __device__ __forceinline__ static int tiles(const Span<T, A>& span) {
    return max(1, (span.packs + kLanes * kPacks - 1) / (kLanes * kPacks));
  }

  __device__ __forceinline__ void load(const Span<T, A>& span, int t) {
    const int first = t * kPacks * kLanes + lane;
    if (span.aligned) {
#pragma unroll
      for (int k = 0; k < kPacks; ++k) {
        const int p = first + k * kLanes;
        if (p < span.packs) tile[k] = load_streaming(span.logits + span.element(p));
      }
    } else {
#pragma unroll
      for (int k = 0; k < kPacks; ++k) {
        const int p = first + k * kLanes;
        if (p >= span.packs) continue;
#pragma unroll
        for (int j = 0; j < P::size; ++j) tile[k].values[j] = span.logits[span.element(p) + j];
      }
    }
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int p = first + k * kLanes;
      const bool inside = p < span.packs;
      if constexpr (kExtras) allowed[k] = 0;
#pragma unroll
      for (int j = 0; j < P::size; ++j) {
        bool counts = inside;
        if constexpr (kExtras) {
          counts = inside && span.allows(span.element(p) + j);
          allowed[k] |= unsigned(counts) << j;
        }
        if (!counts) tile[k].values[j] = narrow<T>(-infinity<A>());
      }
    }
  }

  // Visits the elements of the tile that count.
  template <class Visit>
  __device__ __forceinline__ void for_each(const Span<T, A>& span, int t, const Visit& visit) const {
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
#pragma unroll
      for (int j = 0; j < P::size; ++j) {
        if (allowed[k] >> j & 1) {
          visit(widen(tile[k].values[j]), span.element((t * kPacks + k) * kLanes + lane) + j);
        }
      }
    }
  }

  __device__ __forceinline__ void add_tile(const Span<T, A>& span, int t) {
    A max = part.softmax.max;
#pragma unroll
    for (int k = 0; k < kPacks; ++k) max = greatest(tile[k], max);
    if constexpr (kExtras) {
      if (call.work.label_smoothing != 0) {
        // Shifted by the maximum, so that large logits lose no digits.
        A logits = 0, weights = 0;
        for_each(span, t, [&](A x, int i) {
          const A weight = span.weight_of(i);
          logits += weight * (x - max);
          weights += weight;
          ++part.smoothing.classes;
        });
        part.smoothing.logits += double(logits) + double(max) * double(weights);
        part.smoothing.weight += double(weights);
      }
      if (kProbabilities && span.probabilities != nullptr) add_target(span, t, max);
    }
    A sum = part.softmax.sum * fast_exp(part.softmax.max - max);
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      if constexpr (!kKeepsExponentials) hold(tile[k]);
#pragma unroll
      for (int j = 0; j < P::size; ++j) {
        const A e = fast_exp(widen(tile[k].values[j]) - max);
        sum += e;
        if constexpr (kKeepsExponentials) tile[k].values[j] = e;
      }
      if constexpr (mode == Mode::ForwardGrad) hold(tile[k]);
    }
    part.softmax = {max, sum};
  }

  // What the probabilities of the tile's classes cost, shifted in the same way.
  __device__ __forceinline__ void add_target(const Span<T, A>& span, int t, A max) {
    constexpr int kTogether = 2;  // packs that are loaded at once, while the tile's take most registers
    A logits = 0, weights = 0;
#pragma unroll
    for (int k = 0; k < kPacks; k += kTogether) {
      P probabilities[kTogether];
#pragma unroll
      for (int l = 0; l < kTogether; ++l) {
        const int p = (t * kPacks + k + l) * kLanes + lane;
        if (p < span.packs) probabilities[l] = load_probabilities(span, p);
      }
#pragma unroll
      for (int l = 0; l < kTogether; ++l) {
        const int p = (t * kPacks + k + l) * kLanes + lane;
        if (p >= span.packs) continue;
#pragma unroll
        for (int j = 0; j < P::size; ++j) {
          const A probability = widen(probabilities[l].values[j]);
          if (allowed[k + l] >> j & 1) {
            const A weight = span.weight_of(span.element(p) + j) * probability;
            logits += weight * (widen(tile[k + l].values[j]) - max);
            weights += weight;
          } else {
            part.target.classes += probability > 0;
          }
        }
        hold(tile[k + l]);
      }
    }
    part.target.logits += double(logits) + double(max) * double(weights);
    part.target.weight += double(weights);
  }

  // Of a pack. Not streamed: a gradient needs them again.
  __device__ __forceinline__ static P load_probabilities(const Span<T, A>& span, int p) {
    const T* from = span.probabilities + span.element(p);
    if (mode != Mode::ForwardGrad) return load_pack(from, span.probabilities_aligned);
    return span.probabilities_aligned ? load_cached(from) : load_pack(from, false);
  }

  __device__ __forceinline__ void add_single(const Span<T, A>& span) {
    const int i = span.single(lane);
    if (i < 0) return;
    const A probability = kProbabilities && span.probabilities != nullptr ? widen(span.probabilities[i]) : A(0);
    if (!span.allows(i)) {
      part.target.classes = probability > 0;
      return;
    }
    const A x = widen(span.logits[i]), max = greater(part.softmax.max, x);
    part.softmax = {max, fast_exp(x - max)};  // the first of this thread
    if (kProbabilities && span.probabilities != nullptr) {
      const double weight = double(span.weight_of(i)) * double(probability);
      part.target = {weight * double(x), weight, 0};
    }
    if (kExtras && call.work.label_smoothing != 0) {
      const A weight = span.weight_of(i);
      part.smoothing = {double(weight) * double(x), double(weight), 1};
    }
  }

  // What a whole row adds up to, without its logits.
  __device__ __forceinline__ void sum_row(std::int64_t r) {
    const auto& work = call.work;
    const auto offsets = work.rows.offsets(r);
    const std::uint8_t* row = work.class_mask == nullptr ? nullptr : work.class_mask + offsets[2];
    part = {};
    if (work.label_smoothing == 0 && work.probabilities == nullptr) return;
    if (row == nullptr && work.weight == nullptr && work.probabilities == nullptr) {
      part.smoothing = {0, double(work.classes), work.classes};
      return;
    }
    for (std::int64_t c = lane; c < work.classes; c += kLanes) {
      if (row != nullptr && !row[c]) continue;
      const double weight = work.weight == nullptr ? 1.0 : double(work.weight[c]);
      part.smoothing.weight += weight;
      ++part.smoothing.classes;
      if (work.probabilities != nullptr)
        part.target.weight += weight * double(widen(work.probabilities[offsets[3] + c]));
    }
    reduce_sums();
  }

  __device__ __forceinline__ void reduce_sums() {
    if (call.work.label_smoothing != 0) part.smoothing = reduce_group<kLanes, WarpSum>(part.smoothing);
    if (kProbabilities && call.work.probabilities != nullptr) part.target = reduce_group<kLanes, WarpSum>(part.target);
  }

  // Of a row that a whole cluster holds, each block a slice of it.
  __device__ __forceinline__ void merge_cluster() {
    if (call.slices == 1) return;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
    __trap();  // a slice would pass for its row: has_clusters() asks for none here
#else
    if constexpr (kLanes > 32) {
      const auto cluster = cooperative_groups::this_cluster();
      const unsigned blocks = cluster.num_blocks();
      auto& mine = shared<RowPart<A>, struct ClusterPart>();
      if (threadIdx.x == 0) mine = part;
      cluster.sync();
      const unsigned block = threadIdx.x % 32;
      part = block < blocks ? *cluster.map_shared_rank(&mine, block) : RowPart<A>{};
      part.softmax = WarpSoftmax{}(part.softmax);
      if (kExtras && call.work.label_smoothing != 0) part.smoothing = WarpSum{}(part.smoothing);
      if (kProbabilities && call.work.probabilities != nullptr) part.target = WarpSum{}(part.target);
      cluster.sync();  // all have read, before a block goes on or leaves
    }
#endif
  }

  // Whether exponentials are in the tile, relative to `max`, or logits.
  __device__ __forceinline__ void store(const Span<T, A>& span, int t, const RowTerms<A>& terms, bool exponentials,
                                        A max) {
    const A scale = exponentials ? terms.scale * fast_exp(max - terms.max) : terms.scale;
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int p = (t * kPacks + k) * kLanes + lane;
      if (p >= span.packs) continue;
      const int first = span.element(p);
      const bool has_probabilities = kProbabilities && span.probabilities != nullptr;
      P probabilities;
      if (has_probabilities) probabilities = load_probabilities(span, p);
#pragma unroll
      for (int j = 0; j < P::size; ++j) {
        const A x = widen(tile[k].values[j]);
        const A e = exponentials ? x : fast_exp(x - terms.max);
        const bool weighs = kExtras && (terms.gradient.smoothing != 0 || has_probabilities);
        const A weight = weighs ? span.weight_of(first + j) : A(0);
        const A gradient = has_probabilities ? class_gradient(terms, e * scale, weight, widen(probabilities.values[j]))
                                             : class_gradient(terms, e * scale, weight, first + j == span.target);
        tile[k].values[j] = !kExtras || allowed[k] >> j & 1 ? narrow<T>(gradient) : narrow<T>(A(0));
      }
      store_streaming(span.gradient + first, tile[k]);
    }
  }

  __device__ __forceinline__ void store_single(const Span<T, A>& span, const RowTerms<A>& terms) const {
    const int i = span.single(lane);
    if (i < 0) return;
    A gradient = 0;
    if (span.allows(i)) {
      const A scaled = fast_exp(widen(span.logits[i]) - terms.max) * terms.scale;
      gradient = kProbabilities && span.probabilities != nullptr
                     ? class_gradient(terms, scaled, span.weight_of(i), widen(span.probabilities[i]))
                     : class_gradient(terms, scaled, span.weight_of(i), i == span.target);
    }
    span.gradient[i] = narrow<T>(gradient);
  }

  __device__ __forceinline__ void store_zeros(const Span<T, A>& span) const {
    P zeros;
#pragma unroll
    for (T& value : zeros.values) value = narrow<T>(A(0));
    for (int p = lane; p < span.packs; p += kLanes) store_streaming(span.gradient + span.element(p), zeros);
    if (const int i = span.single(lane); i >= 0) span.gradient[i] = narrow<T>(A(0));
  }

  // Every thread of the group, or of its cluster, comes here with the same row.
  __device__ __forceinline__ void visit(std::int64_t r, int slice, bool kept) {
    const auto& work = call.work;
    const auto target = kept ? work.index[r] : -1;
    const Span<T, A> span(work, r, slice, call.slices, target);
    if (target < 0) {
      if constexpr (mode != Mode::Forward) store_zeros(span);
      return;
    }
    const int last = tiles(span) - 1;
    const bool has_probabilities = kProbabilities && span.probabilities != nullptr;
    if constexpr (mode == Mode::Backward) {
      if constexpr (kExtras) sum_row(r);
      const auto row = describe(work, r, target, kExtras ? part.smoothing : ClassSums{});
      const auto terms = row_terms(row, work.softmax[r], target_sum(row, part, has_probabilities));
      for (int t = 0; t <= last; ++t) {
        load(span, t);
        store(span, t, terms, false, A(0));
      }
      store_single(span, terms);
      return;
    }
    const bool gives_loss = lane == 0 && call.parts == nullptr && span.target >= 0;
    const A target_logit = gives_loss ? widen(span.logits[span.target]) : A(0);
    part = {};
    add_single(span);
    for (int t = 0; t <= last; ++t) {
      load(span, t);
      add_tile(span, t);
    }
    const A max = part.softmax.max;
    part.softmax = reduce_group<kLanes, WarpSoftmax>(part.softmax);
    if constexpr (kExtras) reduce_sums();
    if (call.parts != nullptr) {
      if (lane == 0) call.parts[r * call.slices + slice] = part;
      return;
    }
    merge_cluster();
    const auto row = describe(work, r, target, part.smoothing);
    if (gives_loss) give_loss<kProbabilities>(work, r, row, part, target_logit, span.allows(span.target));
    if constexpr (mode == Mode::ForwardGrad) {
      const auto terms = row_terms(row, part.softmax, target_sum(row, part, has_probabilities));
      store_single(span, terms);
      store(span, last, terms, kKeepsExponentials, max);
      for (int t = last - 1; t >= 0; --t) {
        load(span, t);
        store(span, t, terms, false, A(0));
      }
    }
  }
};

// While one block reduces, others have to keep the memory busy: 768 threads of 80 registers, or half as many that hold
// twice as much.
constexpr int resident_blocks(int lanes, int packs, bool extras) {
  if (extras) return 1;
  return packs <= 4 ? 768 / std::max(lanes, 128) : std::max(1, 512 / lanes);
}

template <class T, Mode mode, int kLanes, int kPacks, bool kExtras>
__global__ void __launch_bounds__(std::max(kLanes, 128), resident_blocks(kLanes, kPacks, kExtras))
    cross_entropy_packs(CrossEntropyCall<T, Accumulation<T>> call) {
  PackGroup<T, mode, kLanes, kPacks, kExtras> group(call);
  const unsigned groups_in_block = blockDim.x / kLanes;
  const unsigned index = blockIdx.x * groups_in_block + threadIdx.x / kLanes, slices = call.slices;
  const unsigned step = gridDim.x * groups_in_block / slices;
  const auto kept = *call.kept, end = mode == Mode::Forward ? kept : call.work.rows.count;
  for (auto i = std::int64_t(index / slices); i < end; i += step) {
    group.visit(call.order[i], static_cast<int>(index % slices), i < kept);
  }
}

template <class A>
__device__ __forceinline__ RowPart<A> merge(const RowPart<A>& a, const RowPart<A>& b) {
  return {merge(a.softmax, b.softmax), a.smoothing + b.smoothing, a.target + b.target};
}

// Puts the parts of rows together, a thread a row.
template <class T>
__global__ void __launch_bounds__(128) cross_entropy_parts(CrossEntropyCall<T, Accumulation<T>> call) {
  using A = Accumulation<T>;
  const auto& work = call.work;
  const auto i = std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= *call.kept) return;
  const auto r = call.order[i], target = work.index[r];
  if (target < 0) return;
  RowPart<A> row;
  for (int s = 0; s < call.slices; ++s) {
    const auto part = call.parts[r * call.slices + s];
    row = merge(row, part);
  }
  const auto offsets = work.rows.offsets(r);
  const bool allowed = work.class_mask == nullptr || work.class_mask[offsets[2] + target];
  give_loss(work, r, describe(work, r, target, row.smoothing), row, widen(work.logits[offsets[0] + target]), allowed);
}

// What the threads that share a row have seen, all of which get it; `rows` are neighbours in a block.
template <class A>
__device__ RowPart<A> reduce_rows(RowPart<A> part, int lanes, int rows, bool rows_first, bool sums) {
  if (lanes == 1) return part;
  if (!rows_first) {
    const auto sum = [&](const ClassSums& of) { return reduce_lanes(of, lanes, [](auto a, auto b) { return a + b; }); };
    part.softmax = reduce_softmax(part.softmax, lanes);
    if (sums) part = {part.softmax, sum(part.smoothing), sum(part.target)};
    return part;
  }
  return reduce_apart(part, lanes, rows, [](const RowPart<A>& a, const RowPart<A>& b) { return merge(a, b); });
}

// Threads a row where rows are contiguous; of double each needs more registers.
constexpr int most_lanes(std::int64_t element_bytes) { return element_bytes > 4 ? 8 : 16; }

// Rows of classes anywhere in memory: `lanes` threads a row.
template <class T, Mode mode>
__global__ void __launch_bounds__(32 * most_lanes(sizeof(T)))
    cross_entropy_lanes(CrossEntropyCall<T, Accumulation<T>> call, int lanes, bool rows_first) {
  using A = Accumulation<T>;
  const auto& work = call.work;
  const int rows = blockDim.x / lanes;
  const int lane = rows_first ? threadIdx.x / rows : threadIdx.x % lanes;
  const int row_in_block = rows_first ? threadIdx.x % rows : threadIdx.x / lanes;
  for (auto first = std::int64_t(blockIdx.x) * rows; first < work.rows.count; first += std::int64_t(gridDim.x) * rows) {
    const auto r = first + row_in_block;
    const auto target = r < work.rows.count ? work.index[r] : -1;
    const auto offsets = r < work.rows.count ? work.rows.offsets(r) : std::array<std::int64_t, 4>{};
    const T* logits = work.logits + offsets[0];
    T* gradient = work.gradient == nullptr ? nullptr : work.gradient + offsets[1];
    const auto allows = [&](std::int64_t c) {
      return work.class_mask == nullptr || work.class_mask[offsets[2] + c * work.class_mask_stride];
    };
    const auto weight_of = [&](std::int64_t c) { return work.weight == nullptr ? A(1) : work.weight[c]; };
    const bool has_probabilities = work.probabilities != nullptr, sums = work.label_smoothing != 0 || has_probabilities;
    const auto probability_of = [&](std::int64_t c) {
      return widen(work.probabilities[offsets[3] + c * work.probabilities_stride]);
    };

    RowPart<A> part;
    if (target >= 0 && (mode != Mode::Backward || sums)) {
      auto& [max, sum] = part.softmax;
      for (std::int64_t c = lane; c < work.classes; c += lanes) {
        if (!allows(c)) {
          if (has_probabilities) part.target.classes += probability_of(c) > 0;
          continue;
        }
        const A x = widen(logits[c * work.logits_stride]);
        if (work.label_smoothing != 0) {
          part.smoothing = part.smoothing + ClassSums{double(weight_of(c)) * double(x), weight_of(c), 1};
        }
        if (has_probabilities) {
          const double weight = double(weight_of(c)) * double(probability_of(c));
          part.target = part.target + ClassSums{weight * double(x), weight, 0};
        }
        if constexpr (mode == Mode::Backward) continue;
        if (x > max) {
          sum = sum * fast_exp(max - x) + 1;
          max = x;
        } else {
          sum += fast_exp(x - max);
        }
      }
    }
    part = reduce_rows(part, lanes, rows, rows_first, sums);
    if (target < 0) {
      if (mode != Mode::Forward && r < work.rows.count) {
        for (std::int64_t c = lane; c < work.classes; c += lanes) gradient[c * work.gradient_stride] = narrow<T>(A(0));
      }
      continue;
    }
    part.softmax = mode == Mode::Backward ? work.softmax[r] : merge(Softmax<A>{}, part.softmax);
    const auto& softmax = part.softmax;
    const auto row = describe(work, r, target, part.smoothing);
    if constexpr (mode != Mode::Backward) {
      if (lane == 0) {
        const bool inside = target < work.classes;  // a row without classes has a target out of range
        give_loss(work, r, row, part, inside ? widen(logits[target * work.logits_stride]) : A(0),
                  !inside || allows(target));
      }
    }
    if constexpr (mode != Mode::Forward) {
      const auto terms = row_terms(row, softmax, target_sum(row, part, has_probabilities));
      for (std::int64_t c = lane; c < work.classes; c += lanes) {
        A value = 0;
        if (allows(c)) {
          const A scaled = fast_exp(widen(logits[c * work.logits_stride]) - softmax.max) * terms.scale;
          value = has_probabilities ? class_gradient(terms, scaled, weight_of(c), probability_of(c))
                                    : class_gradient(terms, scaled, weight_of(c), c == target);
        }
        gradient[c * work.gradient_stride] = narrow<T>(value);
      }
    }
  }
}

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

// Of half types an instruction counts for more than memory, of float the memory.
template <class T>
constexpr RingShape kRing = sizeof(T) == 2 ? RingShape{8, 3, 1 << 14, 13, 1} : RingShape{16, 1, 1 << 14, 12, 2};

// Long rows of class indices, with no more to say of their classes. Exponentials are powers of two: of x log2(e) less
// what the maximum's product is rounded to, one instruction in front of the exponential itself.
template <class T_, bool writes>
struct CrossEntropyRing {
  using T = T_;
  using P = Pack<T>;
  static constexpr auto kShape = kRing<T>;
  static constexpr bool kWrites = writes;
  static constexpr float kLog2e = 1.44269504f;
  // Half types take the scale into the exponent.
  static constexpr bool kFolds = sizeof(T) == 2;

  CrossEntropyWork<T, float> work;
  const std::int64_t* order;
  const std::int64_t* kept;
  std::int64_t count, classes;

  struct State {
    float max = -std::numeric_limits<float>::infinity();
    float sum = 0;  // of 2^(x log2(e) - base(max))
  };
  struct Row {
    std::int64_t row, index;
    int target;  // among the classes of the block, or outside of them
    bool gives_results;
    float target_logit;
  };
  struct Terms {
    float base, scale, of_target;
    int target;
    bool folded;
  };

  __device__ __forceinline__ std::int64_t end() const { return writes ? count : *kept; }
  __device__ __forceinline__ std::int64_t row(std::int64_t position) const { return order[position]; }
  // Also of those that were kept a divisor may have dropped some.
  __device__ __forceinline__ bool keeps(std::int64_t row) const { return work.index[row] >= 0; }
  __device__ __forceinline__ const T* input(std::int64_t row) const { return work.logits + work.rows.offsets(row)[0]; }
  __device__ __forceinline__ T* output(std::int64_t row) const { return work.gradient + work.rows.offsets(row)[1]; }

  __device__ __forceinline__ Row begin(std::int64_t row, int first, int n, int thread) const {
    const auto index = work.index[row], target = index - first;
    const bool inside = target >= 0 && target < n, gives_results = inside && thread == 0;
    return {row, index, inside ? int(target) : -1, gives_results, gives_results ? widen(input(row)[index]) : 0.0f};
  }

  __device__ __forceinline__ static P nothing() {
    P pack;
#pragma unroll
    for (T& value : pack.values) value = narrow<T>(-infinity<float>());
    return pack;
  }

  __device__ __forceinline__ static float base_of(float max) { return max == -infinity<float>() ? 0 : max * kLog2e; }
  __device__ __forceinline__ static float power(float x, float base) { return fast_exp2(fmaf(x, kLog2e, -base)); }

  template <int packs>
  __device__ __forceinline__ void visit(State& state, const P (&pack)[packs]) const {
    float max = state.max;
#pragma unroll
    for (int k = 0; k < packs; ++k) max = greatest(pack[k], max);
    const float base = base_of(max);
    float sums[4] = {state.sum * fast_exp2(base_of(state.max) - base), 0, 0, 0};
#pragma unroll
    for (int k = 0; k < packs; ++k) {
#pragma unroll
      for (int j = 0; j < P::size; ++j) sums[j % 4] += power(widen(pack[k].values[j]), base);
    }
    state = {max, (sums[0] + sums[1]) + (sums[2] + sums[3])};
  }

  __device__ __forceinline__ static float rescaled(const State& state, float base) {
    return state.sum == 0 ? 0 : state.sum * fast_exp2(base_of(state.max) - base);
  }
  __device__ __forceinline__ State merge(const State& a, const State& b) const {
    const float max = greater(a.max, b.max), base = base_of(max);
    return {max, rescaled(a, base) + rescaled(b, base)};
  }
  __device__ __forceinline__ State merge_warp(const State& state) const {
    const float max = greatest_of_warp(state.max);
    return {max, WarpSum{}(rescaled(state, base_of(max)))};
  }

  __device__ __forceinline__ Terms conclude(const Row& of, const State& state) const {
    // What the rounding of the base has multiplied the sum with.
    const float base = base_of(state.max), rounding = state.sum == 0 ? 0 : fmaf(state.max, kLog2e, -base);
    const auto softmax =
        masked_loss::merge(Softmax<float>{}, Softmax<float>{state.max, state.sum * fast_exp2(-rounding)});
    const auto row = describe(work, of.row, of.index, ClassSums{});
    RowPart<float> part;
    part.softmax = softmax;
    if (of.gives_results) give_loss<false>(work, of.row, row, part, of.target_logit, true);
    if constexpr (!writes) return {};
    const auto gradient = cross_entropy_gradient(row, log_sum_exp(softmax), row.target_weight);
    const float scale = gradient.probability / state.sum;
    const bool folded = kFolds && scale > 0;
    return {folded ? base - std::log2(scale) : base, scale, gradient.target, of.target, folded};
  }

  // A pack of the block's classes, from `first` on.
  __device__ __forceinline__ P write(const P& pack, int first, const Terms& terms) const {
    float values[P::size];
#pragma unroll
    for (int j = 0; j < P::size; ++j) {
      values[j] = power(widen(pack.values[j]), terms.base);
      if (!kFolds || !terms.folded) values[j] *= terms.scale;
    }
    if (const auto target = unsigned(terms.target - first); target < unsigned(P::size)) {
#pragma unroll
      for (int j = 0; j < P::size; ++j) {
        if (unsigned(j) == target) values[j] -= terms.of_target;
      }
    }
    return narrow_pack<T>(values);
  }
};

template <class T, bool writes, class A>
void run_ring(const CrossEntropyCall<T, A>& call, int blocks, cudaStream_t stream) {
  const auto& work = call.work;
  launch_ring(CrossEntropyRing<T, writes>{work, call.order, call.kept, work.rows.count, work.classes}, blocks, stream);
}

// The sizes of a tile, of which the first that holds a slice is taken, else the last.
struct Shape {
  int lanes, packs;
  constexpr int bytes() const { return lanes * packs * 16; }
};
constexpr Shape kShapes[] = {{32, 4}, {128, 4}, {256, 4}, {256, 8}, {512, 8}};
constexpr int kShapeCount = std::size(kShapes);
static_assert(kShapes[kShapeCount - 1].lanes * kShapes[kShapeCount - 1].packs == kLargestTile);
constexpr int kStreaming = 3;       // shapes for rows that are read once: the larger ones are for what stays on chip
constexpr int kSliceOfCluster = 3;  // the shape that a cluster's blocks have, while rows fit in it

constexpr int kMaxCluster = 8;  // what every GPU with clusters can do
constexpr int kMaxSlices = 64;  // where rows are few
constexpr std::int64_t kSliceBytes = 1 << 14;
constexpr std::int64_t kFewBytes = 128;  // bytes of a row up to which a pack a thread would leave most threads idle

template <class T, Mode mode, int shape, class A>
void run_packs(const CrossEntropyCall<T, A>& call, bool clusters, int multiprocessors, cudaStream_t stream) {
  constexpr int lanes = kShapes[shape].lanes, packs = kShapes[shape].packs, threads = std::max(lanes, 128);
  const bool extras =
      call.work.class_mask != nullptr || call.work.label_smoothing != 0 || call.work.probabilities != nullptr;
  const auto kernel =
      extras ? cross_entropy_packs<T, mode, lanes, packs, true> : cross_entropy_packs<T, mode, lanes, packs, false>;
  const auto blocks = divide_up(call.work.rows.count * call.slices, threads / lanes);
  launch(kernel,
         {grid(blocks, multiprocessors, threads, call.slices), threads, 0, clusters ? unsigned(call.slices) : 1u},
         stream, call);
}

template <class T, Mode mode, int shape = 0, class A>
void run_shape(const CrossEntropyCall<T, A>& call, const CrossEntropyRegime& regime, int multiprocessors,
               cudaStream_t stream) {
  if constexpr (shape + 1 < (mode == Mode::ForwardGrad ? kShapeCount : kStreaming)) {
    if (shape != regime.shape) {
      return run_shape<T, mode, shape + 1>(call, regime, multiprocessors, stream);
    }
  }
  const bool clusters = regime.kind == CrossEntropyRegime::Packs && call.slices > 1;
  run_packs<T, mode, shape>(call, clusters, multiprocessors, stream);
}

template <class T, Mode mode, class A>
void run_mode(CrossEntropyCall<T, A> call, const CrossEntropyRegime& regime, int multiprocessors, cudaStream_t stream) {
  if constexpr (!std::is_same_v<T, double>) {
    if constexpr (mode != Mode::Backward) {
      if (regime.kind == CrossEntropyRegime::Ring) {
        return run_ring<T, mode == Mode::ForwardGrad>(call, regime.slices, stream);
      }
    }
    if (regime.kind != CrossEntropyRegime::Lanes) {
      call.slices = regime.slices;
      if (regime.kind == CrossEntropyRegime::Packs) call.parts = nullptr;
      auto in = regime;
      if (call.work.probabilities != nullptr) in.shape = std::min(in.shape, kShapeCount - 2);
      return run_shape<T, mode>(call, in, multiprocessors, stream);
    }
  }
  const unsigned threads = std::max(128, regime.rows_first ? 32 * regime.lanes : 0);
  const auto blocks = divide_up(call.work.rows.count, threads / regime.lanes);
  launch(cross_entropy_lanes<T, mode>, {grid(blocks, multiprocessors, threads), threads}, stream, call, regime.lanes,
         regime.rows_first);
}

constexpr std::int64_t kRingBytes = 1 << 15;  // of a row, from which on a ring is filled in chunks

// Of a row, what a block can take.
template <class T>
constexpr std::int64_t ring_bytes() {
  return kRing<T>.most_chunks() * kRing<T>.chunk;
}

// Of blocks, which read one another's shared memory. Kernels of one source are compiled for the same versions.
bool has_clusters() {
  return ptx_version<&cross_entropy_packs<float, Mode::ForwardGrad, kShapes[kSliceOfCluster].lanes,
                                          kShapes[kSliceOfCluster].packs, false>>() >= 90;
}

}  // namespace

CrossEntropyRegime pick_cross_entropy_regime(Mode mode, std::int64_t rows, std::int64_t classes,
                                             std::int64_t element_bytes, bool contiguous, bool plain,
                                             int multiprocessors) {
  const auto bytes = classes * element_bytes;
  if (!contiguous || element_bytes > 4 || bytes <= kFewBytes || classes >= (std::int64_t{1} << 31)) {
    CrossEntropyRegime regime{CrossEntropyRegime::Lanes, 0, 1, 1, !contiguous};
    const auto enough = [&] {
      return contiguous ? regime.lanes * 8 >= classes || regime.lanes == 32
                        : regime.lanes * 4 >= classes || regime.lanes == most_lanes(element_bytes) ||
                              rows * regime.lanes >= std::int64_t(multiprocessors) * 1024;
    };
    while (!enough()) regime.lanes *= 2;
    return regime;
  }
  const auto shape_of = [&](std::int64_t slice, int count) {
    int shape = 0;
    while (shape + 1 < count && kShapes[shape].bytes() < slice) ++shape;
    return shape;
  };
  // Few rows: so many slices that every multiprocessor has one, of a size that is worth a block.
  const auto wanted = std::min<std::int64_t>(
      {divide_up(2 * multiprocessors, std::max<std::int64_t>(1, rows)), bytes / kSliceBytes, kMaxSlices});
  const bool gradient = mode == Mode::ForwardGrad, clusters = gradient && has_clusters();
  if (wanted > (clusters ? kMaxCluster : 1)) {
    return {CrossEntropyRegime::Slices, shape_of(divide_up(bytes, wanted), kStreaming), static_cast<int>(wanted), 1,
            false};
  }
  if (plain && has_clusters() && mode != Mode::Backward && bytes >= kRingBytes) {
    const std::int64_t most = element_bytes == 2 ? ring_bytes<__half>() : ring_bytes<float>();
    int blocks = 1;
    while (blocks < kRingCluster && blocks * most < bytes) blocks *= 2;
    if (blocks * most >= bytes) return {CrossEntropyRegime::Ring, 0, blocks, 1, false};
  }
  int slices = 1;
  if (clusters) {
    while (slices < kMaxCluster && (slices * kShapes[kSliceOfCluster].bytes() < bytes || slices < wanted)) slices *= 2;
  }
  return {CrossEntropyRegime::Packs, shape_of(divide_up(bytes, slices), gradient ? kShapeCount : kStreaming), slices, 1,
          false};
}

std::vector<CrossEntropyRegime> cross_entropy_regimes(Mode mode, std::int64_t classes, std::int64_t element_bytes,
                                                      bool contiguous, bool plain) {
  using Regime = CrossEntropyRegime;
  std::vector<Regime> all;
  for (int lanes = 1; lanes <= (contiguous ? 32 : most_lanes(element_bytes)); lanes *= 2) {
    all.push_back({Regime::Lanes, 0, 1, lanes, !contiguous});
  }
  if (!contiguous || element_bytes > 4) return all;
  const auto bytes = classes * element_bytes;
  const bool gradient = mode == Mode::ForwardGrad;
  for (int shape = 0; shape < (gradient ? kShapeCount : kStreaming); ++shape) {
    all.push_back({Regime::Packs, shape, 1, 1, false});
    for (int slices = 2; slices <= kMaxSlices && slices * kFewBytes <= bytes; slices *= 2) {
      if (gradient && has_clusters() && slices <= kMaxCluster && kShapes[shape].lanes > 32) {
        all.push_back({Regime::Packs, shape, slices, 1, false});
      }
      if (shape < kStreaming) all.push_back({Regime::Slices, shape, slices, 1, false});
    }
  }
  const auto most = element_bytes == 2 ? ring_bytes<__half>() : ring_bytes<float>();
  for (int blocks = 1; plain && has_clusters() && mode != Mode::Backward && blocks <= kRingCluster; blocks *= 2) {
    if (blocks * most >= bytes) all.push_back({Regime::Ring, 0, blocks, 1, false});
  }
  return all;
}

template <class T, class A>
void run_cross_entropy(const CrossEntropyCall<T, A>& call, Mode mode, const CrossEntropyRegime& regime,
                       int multiprocessors, cudaStream_t stream) {
  const auto rows = call.work.rows.count;
  if (rows == 0) return;
  if (regime.kind == CrossEntropyRegime::Slices && mode != Mode::Backward) {
    if constexpr (!std::is_same_v<T, double>) {
      auto forward = call;
      forward.work.gradient = nullptr;
      run_mode<T, Mode::Forward>(forward, regime, multiprocessors, stream);
      forward.slices = regime.slices;
      launch(cross_entropy_parts<T>, {static_cast<unsigned>(divide_up(rows, 128)), 128}, stream, forward);
      if (mode == Mode::ForwardGrad) run_mode<T, Mode::Backward>(call, regime, multiprocessors, stream);
    }
    return;
  }
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
  launch(scale_elements<T, A>, {grid(blocks, multiprocessors, 256), 256}, stream, gradient, n, by);
}

#define INSTANTIATE(T, A)                                                                                             \
  template void run_cross_entropy(const CrossEntropyCall<T, A>&, Mode, const CrossEntropyRegime&, int, cudaStream_t); \
  template void scale_gradient(T*, std::int64_t, const A*, int, cudaStream_t);
MASKED_LOSS_EACH_DTYPE(INSTANTIATE)
#undef INSTANTIATE

}  // namespace masked_loss::cuda
