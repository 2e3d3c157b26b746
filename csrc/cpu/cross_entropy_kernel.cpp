// Compiled once for every instruction set: whatever is not in an anonymous namespace or always inline could end up as
// one copy for all of them.
#include "cpu/cross_entropy_kernel.h"

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <utility>

namespace masked_loss::cpu::CPU_CAPABILITY {
namespace {

using at::vec::Vectorized;

constexpr std::int64_t kBlock = 2048;       // classes that are visited together: their numbers stay in the L1 cache
constexpr std::int64_t kSmallClasses = 64;  // up to here, rows are computed beside one another in vectors
constexpr std::int64_t kLanes = 64;         // rows beside one another; fewer where many classes would fill the L2 cache
constexpr std::int64_t kFewLanes = 16;
constexpr std::int64_t kManyClasses = 1024;

Vectorized<float> fast_exp(Vectorized<float> x) { return x.exp_u20(); }
Vectorized<double> fast_exp(Vectorized<double> x) { return x.exp(); }

template <class A>
A sum_lanes(Vectorized<A> v) {
  A lanes[Vectorized<A>::size()];
  v.store(lanes);
  for (int step = Vectorized<A>::size() / 2; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
  }
  return lanes[0];
}

template <class A>
A max_lanes(Vectorized<A> v) {
  A lanes[Vectorized<A>::size()];
  v.store(lanes);
  A max = lanes[0];
  for (const A lane : lanes) max = max_or_nan(max, lane);
  return max;
}

template <class A>
A max_of(const A* x, std::int64_t n) {
  using V = Vectorized<A>;
  constexpr auto lowest = std::numeric_limits<A>::lowest();
  V max0(lowest), max1(lowest);
  std::int64_t i = 0;
  for (; i + 2 * V::size() <= n; i += 2 * V::size()) {
    max0 = at::vec::maximum(max0, V::loadu(x + i));
    max1 = at::vec::maximum(max1, V::loadu(x + i + V::size()));
  }
  A max = max_lanes(at::vec::maximum(max0, max1));
  for (; i < n; ++i) max = max_or_nan(max, x[i]);
  return max;
}

// Half types as float in `stage`; take(low, high) sees whole vectors. Returns how many elements it has seen.
template <class T, class Take>
std::int64_t load_converted(const T* x, std::int64_t n, float* stage, const Take& take) {
  using V = Vectorized<T>;
  std::int64_t done = 0;
  for (; done + V::size() <= n; done += V::size()) {
    const auto [low, high] = at::vec::convert_to_float<T>(V::loadu(x + done));
    low.store(stage + done);
    high.store(stage + done + Vectorized<float>::size());
    take(low, high);
  }
  for (auto i = done; i < n; ++i) stage[i] = static_cast<float>(x[i]);
  return done;
}

// Σ exp(x - max); with Store, each of them goes to `out`. `ahead` is what is read next, of `step` bytes for each vector
// here: it is fetched while the exponentials keep the core busy.
template <bool Store, class A>
A exp_sum(const A* x, A* out, std::int64_t n, A max, const void* ahead = nullptr, int step = 0) {
  const char* next = static_cast<const char*>(ahead);
  using V = Vectorized<A>;
  const V shift(max);
  V sum0(0), sum1(0);
  std::int64_t i = 0;
  for (; i + 2 * V::size() <= n; i += 2 * V::size()) {
    if (next != nullptr) {
      for (int fetched = 0; fetched < 2 * step; fetched += 64) __builtin_prefetch(next + fetched);
      next += 2 * step;
    }
    const V e0 = fast_exp(V::loadu(x + i) - shift), e1 = fast_exp(V::loadu(x + i + V::size()) - shift);
    if constexpr (Store) {
      e0.store(out + i);
      e1.store(out + i + V::size());
    }
    sum0 = sum0 + e0;
    sum1 = sum1 + e1;
  }
  for (; i < n; i += V::size()) {
    const auto count = std::min<std::int64_t>(V::size(), n - i);
    const V e = fast_exp(V::loadu(x + i, count) - shift);
    if constexpr (Store) e.store(out + i, count);
    sum0 = V::set(sum0, sum0 + e, count);
  }
  return sum_lanes(sum0 + sum1);
}

// A block of logits as A, masked classes as -inf: where it lies, or in `stage`.
template <class T, class A>
const A* load_block(const T* x, const bool* allowed, std::int64_t n, A* stage) {
  constexpr auto minus_infinity = -std::numeric_limits<A>::infinity();
  if constexpr (std::is_same_v<T, A>) {
    if (allowed == nullptr) return x;
    for (std::int64_t i = 0; i < n; ++i) stage[i] = allowed[i] ? x[i] : minus_infinity;
  } else {
    load_converted(x, n, stage, [](auto, auto) {});
    if (allowed != nullptr) {
      for (std::int64_t i = 0; i < n; ++i) stage[i] = allowed[i] ? stage[i] : minus_infinity;
    }
  }
  return stage;
}

// The same, and its maximum; half types are converted and compared in one pass.
template <class T, class A>
std::pair<const A*, A> load_block_max(const T* x, const bool* allowed, std::int64_t n, A* stage) {
  if constexpr (!std::is_same_v<T, A>) {
    if (allowed == nullptr) {
      using V = Vectorized<A>;
      constexpr auto lowest = std::numeric_limits<A>::lowest();
      V max0(lowest), max1(lowest);
      const auto done = load_converted(x, n, stage, [&](V low, V high) {
        max0 = at::vec::maximum(max0, low);
        max1 = at::vec::maximum(max1, high);
      });
      return {stage, max_or_nan(max_lanes(at::vec::maximum(max0, max1)), max_of(stage + done, n - done))};
    }
  }
  const A* block = load_block(x, allowed, n, stage);
  return {block, max_of(block, n)};
}

template <class T, class A>
void store_block(T* out, const A* x, std::int64_t n) {
  if constexpr (!std::is_same_v<T, A>) {
    using V = Vectorized<A>;
    std::int64_t i = 0;
    for (; i + 2 * V::size() <= n; i += 2 * V::size()) {
      at::vec::convert_from_float<T>(V::loadu(x + i), V::loadu(x + i + V::size())).store(out + i);
    }
    for (; i < n; ++i) out[i] = static_cast<T>(x[i]);
  } else if (out != x) {
    std::copy(x, x + n, out);
  }
}

// What label smoothing sums over a block, shifted by its maximum so that large logits lose no digits.
template <class A>
void add_smoothing(Smoothing& smoothing, const A* x, const A* weight, const bool* allowed, std::int64_t n, A max) {
  A logits = 0, weights = 0;
  std::int64_t classes = 0;
  // Sixteen partial sums, which the compiler keeps in vectors.
  A lane_logits[16] = {}, lane_weights[16] = {};
  for (std::int64_t begin = 0; begin < n; begin += 16) {
    const auto count = std::min<std::int64_t>(16, n - begin);
    for (std::int64_t i = 0; i < count; ++i) {
      const A w = weight == nullptr ? A(1) : weight[begin + i], term = w * (x[begin + i] - max);
      const bool counts = allowed == nullptr || allowed[begin + i];
      lane_logits[i] += counts ? term : A(0);
      lane_weights[i] += counts ? w : A(0);
    }
  }
  for (int i = 0; i < 16; ++i) logits += lane_logits[i], weights += lane_weights[i];
  if (allowed == nullptr) {
    classes = n;
  } else {
    for (std::int64_t i = 0; i < n; ++i) classes += allowed[i];
  }
  if (classes == 0) return;
  smoothing.logits += double(logits) + double(max) * double(weights);
  smoothing.weight += double(weights);
  smoothing.classes += classes;
}

// The gradient, exponential * scale - smoothing * w_c; exactly +0 at masked classes. `out` may be `exponentials`.
template <class T, class A>
void finish_block(T* out, const A* exponentials, std::int64_t n, A scale, A smoothing, const A* weight,
                  const bool* allowed) {
  using V = Vectorized<A>;
  const auto for_all = [&](const auto& gradient) {
    std::int64_t i = 0;
    for (; i + 2 * V::size() <= n; i += 2 * V::size()) {
      const V low = gradient(V::loadu(exponentials + i), i);
      const V high = gradient(V::loadu(exponentials + i + V::size()), i + V::size());
      if constexpr (std::is_same_v<T, A>) {
        low.store(out + i);
        high.store(out + i + V::size());
      } else {
        at::vec::convert_from_float<T>(low, high).store(out + i);
      }
    }
    for (; i < n; ++i) {
      out[i] = static_cast<T>(exponentials[i] * scale - smoothing * (weight == nullptr ? A(1) : weight[i]));
    }
  };
  const V scales(scale), smoothings(smoothing);
  if (smoothing == 0) {
    for_all([&](V e, std::int64_t) { return e * scales; });
  } else if (weight == nullptr) {
    for_all([&](V e, std::int64_t) { return e * scales - smoothings; });
  } else {
    for_all([&](V e, std::int64_t i) { return e * scales - smoothings * V::loadu(weight + i); });
  }
  if (allowed != nullptr) {
    for (std::int64_t i = 0; i < n; ++i) out[i] = allowed[i] ? out[i] : T(0);
  }
}

template <class A>
A target_gradient(const CrossEntropyGradient<A>& gradient, A probability, A target_weight) {
  return gradient.probability * probability - gradient.smoothing * target_weight - gradient.target;
}

// Rows whose classes lie beside one another, one at a time.
template <class T, class A, CrossEntropyMode mode>
class RowKernel {
 public:
  RowKernel(const CrossEntropyWork<T, A>& work, A* scratch)
      : work_(work), maxima_(scratch), stage_(scratch + blocks(work.classes)) {}

  static std::int64_t blocks(std::int64_t classes) { return (classes + kBlock - 1) / kBlock; }

  static std::int64_t scratch_size(const CrossEntropyWork<T, A>& work) {
    return blocks(work.classes) + (keeps_row() ? work.classes : std::min(kBlock, work.classes));
  }

  void operator()(std::int64_t r) const {
    const auto [logits_offset, gradient_offset, class_mask_offset] = work_.rows.offsets(r);
    const T* x = work_.logits + logits_offset;
    T* gradient = mode == CrossEntropyMode::Forward ? nullptr : work_.gradient + gradient_offset;
    const bool* allowed = work_.class_mask == nullptr ? nullptr : work_.class_mask + class_mask_offset;
    const auto target = work_.index[r];
    if (target < 0) {
      if constexpr (mode != CrossEntropyMode::Forward) std::fill(gradient, gradient + work_.classes, T(0));
      if constexpr (mode != CrossEntropyMode::Backward) work_.loss[r] = 0;
      if (mode == CrossEntropyMode::Forward && work_.softmax != nullptr) work_.softmax[r] = {0, 1};
      return;
    }
    const A target_weight = work_.weight == nullptr ? A(1) : work_.weight[target];
    const bool target_allowed = allowed == nullptr || allowed[target];
    const A target_logit = static_cast<A>(x[target]);
    CrossEntropyRow<A> row{work_.coefficient[r], target_weight, work_.label_smoothing, work_.z_loss, {}};
    const auto give_target = [&](T* gradient, Softmax<A> softmax, const CrossEntropyGradient<A>& terms) {
      const A probability = std::exp(target_logit - softmax.max) / softmax.sum;
      if (target_allowed) gradient[target] = T(target_gradient(terms, probability, target_weight));
    };
    if constexpr (mode == CrossEntropyMode::Backward) {
      const auto softmax = work_.softmax[r];
      if (work_.label_smoothing != 0) sum_weights(allowed, row.smoothing);
      const auto terms = cross_entropy_gradient(row, log_sum_exp(softmax));
      recompute(x, gradient, allowed, softmax, terms);
      give_target(gradient, softmax, terms);
    } else {
      // Half types are computed in a row of their own; others where the gradient goes.
      A* exponentials = nullptr;
      if constexpr (mode == CrossEntropyMode::ForwardGrad) {
        if constexpr (std::is_same_v<T, A>) {
          exponentials = gradient;
        } else {
          exponentials = stage_;
        }
      }
      const auto softmax = visit(x, allowed, exponentials, row.smoothing);
      work_.loss[r] = cross_entropy_loss(row, softmax, target_logit, target_allowed);
      if constexpr (mode == CrossEntropyMode::Forward) {
        if (work_.softmax != nullptr) work_.softmax[r] = softmax;
      } else {
        const auto terms = cross_entropy_gradient(row, log_sum_exp(softmax));
        finish(exponentials, gradient, allowed, softmax, terms);
        give_target(gradient, softmax, terms);
      }
    }
  }

 private:
  static constexpr bool keeps_row() { return mode == CrossEntropyMode::ForwardGrad && !std::is_same_v<T, A>; }

  // One read of the row and one exponential an element. Where they are kept, each is relative to its block's maximum.
  Softmax<A> visit(const T* x, const bool* allowed, A* exponentials, Smoothing& smoothing) const {
    Softmax<A> softmax;
    for (std::int64_t b = 0, i = 0; i < work_.classes; ++b, i += kBlock) {
      const auto n = std::min(kBlock, work_.classes - i);
      const bool* block_allowed = allowed == nullptr ? nullptr : allowed + i;
      A* kept = exponentials == nullptr ? nullptr : exponentials + i;
      const auto [block, max] = load_block_max(x + i, block_allowed, n, kept == nullptr ? stage_ : kept);
      if (work_.label_smoothing != 0) {
        add_smoothing(smoothing, block, weights(i), block_allowed, n, max);
      }
      constexpr int step = Vectorized<A>::size() * sizeof(T);
      const T* ahead = x + i + kBlock;
      const A sum = kept == nullptr ? exp_sum<false>(block, kept, n, max, ahead, step)
                                    : exp_sum<true>(block, kept, n, max, ahead, step);
      maxima_[b] = max;
      softmax = merge(softmax, {max, sum});
    }
    return softmax;
  }

  void finish(A* exponentials, T* gradient, const bool* allowed, Softmax<A> softmax,
              const CrossEntropyGradient<A>& terms) const {
    for (std::int64_t b = 0, i = 0; i < work_.classes; ++b, i += kBlock) {
      const auto n = std::min(kBlock, work_.classes - i);
      const A scale = terms.probability * (std::exp(maxima_[b] - softmax.max) / softmax.sum);
      finish_block(gradient + i, exponentials + i, n, scale, terms.smoothing, weights(i),
                   allowed == nullptr ? nullptr : allowed + i);
    }
  }

  void recompute(const T* x, T* gradient, const bool* allowed, Softmax<A> softmax,
                 const CrossEntropyGradient<A>& terms) const {
    const A scale = terms.probability / softmax.sum;
    for (std::int64_t i = 0; i < work_.classes; i += kBlock) {
      const auto n = std::min(kBlock, work_.classes - i);
      const bool* block_allowed = allowed == nullptr ? nullptr : allowed + i;
      const A* block = load_block(x + i, block_allowed, n, stage_);
      exp_sum<true>(block, stage_, n, softmax.max);
      finish_block(gradient + i, stage_, n, scale, terms.smoothing, weights(i), block_allowed);
    }
  }

  void sum_weights(const bool* allowed, Smoothing& smoothing) const {
    for (std::int64_t c = 0; c < work_.classes; ++c) {
      if (allowed != nullptr && !allowed[c]) continue;
      smoothing.weight += work_.weight == nullptr ? 1.0 : double(work_.weight[c]);
      ++smoothing.classes;
    }
  }

  const A* weights(std::int64_t i) const { return work_.weight == nullptr ? nullptr : work_.weight + i; }

  const CrossEntropyWork<T, A>& work_;
  A* maxima_;  // of the blocks
  A* stage_;
};

// Rows beside one another in vectors: few classes, or classes that are apart in memory. A tile holds the logits, and
// then the exponentials, of up to kLanes rows as [classes, lanes].
template <class T, class A, CrossEntropyMode mode>
class TileKernel {
 public:
  TileKernel(const CrossEntropyWork<T, A>& work, A* scratch)
      : work_(work), lanes_(lanes(work.classes)), tile_(scratch) {}

  static std::int64_t lanes(std::int64_t classes) { return classes <= kManyClasses ? kLanes : kFewLanes; }

  static std::int64_t scratch_size(const CrossEntropyWork<T, A>& work) { return work.classes * lanes(work.classes); }

  void operator()(std::int64_t begin, std::int64_t end) {
    for (auto r = begin; r < end; r += lanes_) run(r, std::min(lanes_, end - r));
  }

 private:
  using V = Vectorized<A>;

  void run(std::int64_t first, std::int64_t count) {
    count_ = count;
    bool any = false;
    for (std::int64_t w = 0; w < count; ++w) {
      offsets_[w] = work_.rows.offsets(first + w);
      kept_[w] = work_.index[first + w] >= 0;
      any |= kept_[w];
    }
    width_ = (count + V::size() - 1) / V::size() * V::size();
    for (auto w = count; w < width_; ++w) kept_[w] = false;
    if (any) {
      gather();
      compute(first);
    }
    if constexpr (mode != CrossEntropyMode::Forward) scatter(any);
    for (std::int64_t w = 0; w < count; ++w) {
      if (kept_[w]) continue;
      if constexpr (mode != CrossEntropyMode::Backward) work_.loss[first + w] = 0;
      if (mode == CrossEntropyMode::Forward && work_.softmax != nullptr) work_.softmax[first + w] = {0, 1};
    }
  }

  // Whether the rows of operand k lie one after the other.
  bool adjacent(int k) const {
    for (std::int64_t w = 1; w < count_; ++w) {
      if (offsets_[w][k] != offsets_[0][k] + w) return false;
    }
    return true;
  }

  bool allowed(std::int64_t w, std::int64_t c) const {
    return work_.class_mask == nullptr || work_.class_mask[offsets_[w][2] + c * work_.class_mask_stride];
  }

  void gather() {
    const bool rows_adjacent = adjacent(0);
    for (std::int64_t c = 0; c < work_.classes; ++c) {
      A* lane = tile_ + c * lanes_;
      const T* x = work_.logits + c * work_.logits_stride;
      if (rows_adjacent) {
        const A* block = load_block<T, A>(x + offsets_[0][0], nullptr, count_, lane);
        if (block != lane) std::copy(block, block + count_, lane);
      } else {
        for (std::int64_t w = 0; w < count_; ++w) lane[w] = static_cast<A>(x[offsets_[w][0]]);
      }
      for (auto w = count_; w < width_; ++w) lane[w] = 0;
      if (work_.class_mask != nullptr) {
        for (std::int64_t w = 0; w < count_; ++w) {
          if (!allowed(w, c)) lane[w] = -std::numeric_limits<A>::infinity();
        }
      }
    }
  }

  void compute(std::int64_t first) {
    const auto classes = work_.classes;
    Smoothing smoothing[kLanes];
    if (work_.label_smoothing != 0) smooth(smoothing);
    for (std::int64_t w = 0; w < count_; ++w) {
      const auto target = work_.index[first + w];
      target_logit_[w] = kept_[w] ? tile_[target * lanes_ + w] : A(0);
    }
    if constexpr (mode == CrossEntropyMode::Backward) {
      for (std::int64_t w = 0; w < width_; ++w) {
        const auto softmax = kept_[w] ? work_.softmax[first + w] : Softmax<A>{0, 1};
        max_[w] = softmax.max, sum_[w] = softmax.sum;
      }
    } else {
      for (std::int64_t w = 0; w < width_; w += V::size()) {
        V max(std::numeric_limits<A>::lowest());
        for (std::int64_t c = 0; c < classes; ++c) max = at::vec::maximum(max, V::loadu(tile_ + c * lanes_ + w));
        max.store(max_ + w);
      }
    }
    for (std::int64_t w = 0; w < width_; w += V::size()) {
      const V max = V::loadu(max_ + w);
      V sum(0);
      for (std::int64_t c = 0; c < classes; ++c) {
        A* lane = tile_ + c * lanes_ + w;
        const V e = fast_exp(V::loadu(lane) - max);
        if constexpr (mode != CrossEntropyMode::Forward) e.store(lane);
        sum = sum + e;
      }
      if constexpr (mode != CrossEntropyMode::Backward) sum.store(sum_ + w);
    }
    for (std::int64_t w = 0; w < width_; ++w) {
      scale_[w] = smoothed_[w] = 0;
      if (kept_[w]) finish(first + w, w, smoothing[w]);
    }
  }

  // The numbers of one row, once its exponentials are summed.
  void finish(std::int64_t r, std::int64_t w, const Smoothing& smoothing) {
    const auto target = work_.index[r];
    const A target_weight = work_.weight == nullptr ? A(1) : work_.weight[target];
    const CrossEntropyRow<A> row{work_.coefficient[r], target_weight, work_.label_smoothing, work_.z_loss, smoothing};
    // From an empty state, so that an infinite logit gives NaN as it does in a row that is merged from blocks.
    const auto softmax = merge(Softmax<A>{}, {max_[w], sum_[w]});
    if constexpr (mode != CrossEntropyMode::Backward) {
      work_.loss[r] = cross_entropy_loss(row, softmax, target_logit_[w], allowed(w, target));
      if (mode == CrossEntropyMode::Forward && work_.softmax != nullptr) work_.softmax[r] = softmax;
    }
    if constexpr (mode != CrossEntropyMode::Forward) {
      const auto terms = cross_entropy_gradient(row, log_sum_exp(softmax));
      scale_[w] = terms.probability / sum_[w];
      smoothed_[w] = terms.smoothing;
      const A probability = std::exp(target_logit_[w] - max_[w]) / sum_[w];
      if (allowed(w, target)) target_[w] = target_gradient(terms, probability, target_weight);
    }
    target_index_[w] = target;
  }

  // The exponentials become gradients in the tile, and go where they belong.
  void scatter(bool any) {
    const bool rows_adjacent = adjacent(1);
    for (std::int64_t c = 0; c < work_.classes; ++c) {
      A* lane = tile_ + c * lanes_;
      T* gradient = work_.gradient + c * work_.gradient_stride;
      if (any) {
        const A weight = work_.weight == nullptr ? A(1) : work_.weight[c];
        for (std::int64_t w = 0; w < width_; ++w) {
          const A value = lane[w] * scale_[w] - smoothed_[w] * weight;
          lane[w] = kept_[w] ? value : A(0);
        }
        if (work_.class_mask != nullptr) {
          for (std::int64_t w = 0; w < count_; ++w) {
            if (!allowed(w, c)) lane[w] = 0;
          }
        }
      } else {
        std::fill(lane, lane + width_, A(0));
      }
      if (rows_adjacent) {
        store_block(gradient + offsets_[0][1], lane, count_);
      } else {
        for (std::int64_t w = 0; w < count_; ++w) gradient[offsets_[w][1]] = static_cast<T>(lane[w]);
      }
    }
    for (std::int64_t w = 0; w < count_; ++w) {
      if (!kept_[w] || !allowed(w, target_index_[w])) continue;
      work_.gradient[offsets_[w][1] + target_index_[w] * work_.gradient_stride] = static_cast<T>(target_[w]);
    }
  }

  void smooth(Smoothing (&smoothing)[kLanes]) const {
    for (std::int64_t c = 0; c < work_.classes; ++c) {
      const double weight = work_.weight == nullptr ? 1.0 : double(work_.weight[c]);
      for (std::int64_t w = 0; w < count_; ++w) {
        if (!allowed(w, c)) continue;
        smoothing[w].logits += weight * double(tile_[c * lanes_ + w]);
        smoothing[w].weight += weight;
        ++smoothing[w].classes;
      }
    }
  }

  const CrossEntropyWork<T, A>& work_;
  const std::int64_t lanes_;
  std::int64_t count_ = 0, width_ = 0;  // rows of this tile, and the same in whole vectors
  A* tile_;
  std::array<std::int64_t, 3> offsets_[kLanes];
  std::int64_t target_index_[kLanes];
  bool kept_[kLanes];
  A max_[kLanes], sum_[kLanes], target_logit_[kLanes], scale_[kLanes], smoothed_[kLanes], target_[kLanes];
};

template <class T, class A>
bool by_rows(const CrossEntropyWork<T, A>& work) {
  return work.classes > kSmallClasses && work.logits_stride == 1 &&
         (work.gradient == nullptr || work.gradient_stride == 1) &&
         (work.class_mask == nullptr || work.class_mask_stride == 1);
}

template <CrossEntropyMode mode, class T, class A>
void run_mode(const CrossEntropyWork<T, A>& work, std::int64_t begin, std::int64_t end, A* scratch) {
  if (by_rows(work)) {
    const RowKernel<T, A, mode> kernel(work, scratch);
    for (auto r = begin; r < end; ++r) kernel(r);
  } else {
    TileKernel<T, A, mode>(work, scratch)(begin, end);
  }
}

template <class T, class A>
void run(const CrossEntropyWork<T, A>& work, CrossEntropyMode mode, std::int64_t begin, std::int64_t end, A* scratch) {
  switch (mode) {
    case CrossEntropyMode::Forward: return run_mode<CrossEntropyMode::Forward>(work, begin, end, scratch);
    case CrossEntropyMode::ForwardGrad: return run_mode<CrossEntropyMode::ForwardGrad>(work, begin, end, scratch);
    case CrossEntropyMode::Backward: return run_mode<CrossEntropyMode::Backward>(work, begin, end, scratch);
  }
}

template <class T, class A>
std::int64_t scratch_size(const CrossEntropyWork<T, A>& work, CrossEntropyMode mode) {
  if (!by_rows(work)) return TileKernel<T, A, CrossEntropyMode::Forward>::scratch_size(work);
  return mode == CrossEntropyMode::ForwardGrad ? RowKernel<T, A, CrossEntropyMode::ForwardGrad>::scratch_size(work)
                                               : RowKernel<T, A, CrossEntropyMode::Forward>::scratch_size(work);
}

template <class T, class A>
void scale(T* gradient, std::int64_t n, A by) {
  A stage[kBlock];
  for (std::int64_t begin = 0; begin < n; begin += kBlock) {
    const auto count = std::min(kBlock, n - begin);
    const A* block = load_block<T, A>(gradient + begin, nullptr, count, stage);
    for (std::int64_t i = 0; i < count; ++i) {
      const A scaled = block[i] * by;
      stage[i] = block[i] == 0 ? A(0) : scaled;
    }
    store_block(gradient + begin, stage, count);
  }
}

template <class T, class A>
constexpr CrossEntropyKernel<T, A> kernel{run<T, A>, scratch_size<T, A>, scale<T, A>};

}  // namespace

const CrossEntropyKernels& cross_entropy_kernels() {
  static constexpr CrossEntropyKernels kernels{kernel<float, float>, kernel<double, double>,
                                               kernel<at::BFloat16, float>, kernel<at::Half, float>};
  return kernels;
}

}  // namespace masked_loss::cpu::CPU_CAPABILITY
