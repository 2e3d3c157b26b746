#pragma once

// Only for the kernel file, as blocks.h.
#include "cpu/blocks.h"
#include "cpu/cross_entropy_kernel.h"

namespace masked_loss::cpu::CPU_CAPABILITY {
namespace {

constexpr std::int64_t kLongRow = 1 << 18;  // classes; exponentials of a longer row would not stay in the L2 cache

// What label smoothing sums over a block, or, with probabilities, their cost; shifted by the block's maximum so that
// large logits lose no digits.
template <class A>
ClassSums class_sums(const A* x, const A* probabilities, const A* weight, const std::uint8_t* allowed, std::int64_t n,
                     A max) {
  using V = Vectorized<A>;
  const V shift(max), zero(0), one(1);
  V logits(0), weights(0), not_allowed(0);
  for_vectors<A>(x, n, [&](V v, std::int64_t i, std::int64_t lanes) {
    V w = weight == nullptr ? one : V::loadu(weight + i, lanes);
    if (probabilities != nullptr) w = w * V::loadu(probabilities + i, lanes);
    if (lanes != V::size()) w = V::set(zero, w, lanes);
    V term = (v - shift) * w;
    if (allowed != nullptr) {
      if (probabilities != nullptr) {
        const V excluded = select(allowed + i, zero, V::loadu(probabilities + i, lanes), lanes);
        not_allowed = V::blendv(not_allowed, one, excluded > zero);
      }
      term = select(allowed + i, term, zero, lanes);
      w = select(allowed + i, w, zero, lanes);
    } else if (lanes != V::size()) {
      term = V::set(zero, term, lanes);
    }
    logits = logits + term;
    weights = weights + w;
  });
  ClassSums sums;
  if (probabilities != nullptr) {
    sums.classes = max_lanes(not_allowed) > 0;
  } else {
    sums.classes = allowed == nullptr ? n : count_nonzero(allowed, n);
    if (sums.classes == 0) return {};
  }
  sums.weight = double(sum_lanes(weights));
  sums.logits = double(sum_lanes(logits)) + double(max) * sums.weight;
  return sums;
}

// The gradient, exponential * scale - (smoothing + target * q_c) * w_c, without probabilities q no target; exactly +0
// at masked classes. `out` may be `exponentials`.
template <bool past_cache, class T, class A>
void finish_block(T* out, const A* exponentials, std::int64_t n, A scale, A smoothing, const A* probabilities, A target,
                  const A* weight, const std::uint8_t* allowed) {
  using V = Vectorized<A>;
  const V scales(scale), smoothings(smoothing), targets(target), zero(0);
  const auto load = [](const A* from, std::int64_t i, std::int64_t lanes) {
    return lanes == V::size() ? V::loadu(from + i) : V::loadu(from + i, lanes);
  };
  const auto for_all = [&](const auto& gradient) {
    store_vectors<past_cache, A>(out, n, [&](std::int64_t i, std::int64_t lanes) {
      return gradient(load(exponentials, i, lanes) * scales, i, lanes);
    });
  };
  const auto less = [&](V v, std::int64_t i, std::int64_t lanes) {
    const V by = probabilities == nullptr ? smoothings : smoothings + targets * load(probabilities, i, lanes);
    return v - (weight == nullptr ? by : by * load(weight, i, lanes));
  };
  const bool plain = smoothing == 0 && probabilities == nullptr;
  if (allowed != nullptr) {
    for_all([&](V v, std::int64_t i, std::int64_t lanes) {
      return select(allowed + i, plain ? v : less(v, i, lanes), zero, lanes);
    });
  } else if (!plain) {
    for_all(less);
  } else {
    for_all([](V v, std::int64_t, std::int64_t) { return v; });
  }
}

// Rows whose classes lie beside one another, one at a time.
template <class T, class A, CrossEntropyMode mode>
class RowKernel {
 public:
  // Exponentials of a block may be kept between its visit and its finish: where the gradient goes, or, if that is to be
  // written only once, in `row`, which is null where several threads share a row.
  RowKernel(const CrossEntropyWork<T, A>& work, std::int64_t begin, std::int64_t r, A* row)
      : work_(work), r_(r), planned_(r - begin), target_(work.index[planned_]), past_cache_(past_cache(work)) {
    const auto [logits, gradient, class_mask, probabilities] = work.rows.offsets(r);
    logits_ = work.logits + logits;
    if constexpr (mode != CrossEntropyMode::Forward) gradient_ = work.gradient + gradient;
    allowed_ = at_or_null(work.class_mask, class_mask);
    probabilities_ = at_or_null(work.probabilities, probabilities);
    if constexpr (mode == CrossEntropyMode::ForwardGrad) {
      kept_ = row;
      if constexpr (std::is_same_v<T, A>) {
        if (row == nullptr) kept_ = gradient_;
      }
    }
  }

  static bool keeps_row(const CrossEntropyWork<T, A>& work) {
    return mode == CrossEntropyMode::ForwardGrad &&
           (!std::is_same_v<T, A> || (past_cache(work) && work.classes <= kLongRow));
  }

  void visit(std::int64_t begin, std::int64_t end, CrossEntropyBlock<A>* blocks) const {
    if (target_ < 0) return;
    A stage[kBlock], probabilities_stage[kBlock];
    for (auto b = begin; b < end; ++b) {
      const auto i = b * kBlock, n = std::min(kBlock, work_.classes - i);
      const std::uint8_t* allowed = at_or_null(allowed_, i);
      const A* weight = at_or_null(work_.weight, i);
      A* kept = at_or_null(kept_, i);
      const A* block = load_block(logits_ + i, allowed, n, kept == nullptr ? stage : kept);
      const A max = max_of(block, n);
      if (work_.label_smoothing != 0) {
        blocks[b].smoothing = class_sums<A>(block, nullptr, weight, allowed, n, max);
      }
      if (probabilities_ != nullptr) {
        blocks[b].target = class_sums(block, load_probabilities(i, n, probabilities_stage), weight, allowed, n, max);
      }
      const Ahead ahead(logits_ + i + n, n), also(at_or_null(probabilities_, i + n), n);
      const A sum = kept == nullptr ? exp_sum<false>(block, kept, n, max, ahead, also)
                                    : exp_sum<true>(block, kept, n, max, ahead, also);
      blocks[b].softmax = {max, sum};
    }
  }

  CrossEntropyEnd<A> conclude(const CrossEntropyBlock<A>* blocks) const {
    if (target_ < 0) {
      if constexpr (mode != CrossEntropyMode::Backward) work_.loss[planned_] = 0;
      if (mode == CrossEntropyMode::Forward && work_.softmax != nullptr) work_.softmax[r_] = {0, 1};
      return {};
    }
    CrossEntropyRow<A> row{work_.coefficient[planned_], target_weight(), work_.label_smoothing, work_.z_loss, {}};
    Softmax<A> softmax;
    ClassSums target;
    const bool has_probabilities = probabilities_ != nullptr;
    if constexpr (mode == CrossEntropyMode::Backward) {
      softmax = work_.softmax[r_];
      if (work_.label_smoothing != 0) row.smoothing = sum_weights();
      if (has_probabilities) target = sum_probabilities();
    } else {
      softmax = blocks[0].softmax;
      for (std::int64_t b = 1; b * kBlock < work_.classes; ++b) softmax = merge(softmax, blocks[b].softmax);
      for (std::int64_t b = 0; work_.label_smoothing != 0 && b * kBlock < work_.classes; ++b) {
        row.smoothing = row.smoothing + blocks[b].smoothing;
      }
      for (std::int64_t b = 0; has_probabilities && b * kBlock < work_.classes; ++b) target = target + blocks[b].target;
      const A log_sum = std::log(softmax.sum);
      work_.loss[planned_] = has_probabilities
                                 ? cross_entropy_loss(row, softmax, log_sum, target)
                                 : cross_entropy_loss(row, softmax, log_sum, target_logit(), target_allowed());
      if (mode == CrossEntropyMode::Forward && work_.softmax != nullptr) work_.softmax[r_] = softmax;
    }
    if constexpr (mode == CrossEntropyMode::Forward) return {};
    const A target_sum = has_probabilities ? static_cast<A>(target.weight) : row.target_weight;
    return {softmax, cross_entropy_gradient(row, log_sum_exp(softmax), target_sum)};
  }

  void finish(std::int64_t begin, std::int64_t end, const CrossEntropyBlock<A>* blocks,
              const CrossEntropyEnd<A>& row_end) const {
    if constexpr (mode != CrossEntropyMode::Forward) {
      if (past_cache_) {
        finish_as<true>(begin, end, blocks, row_end);
      } else {
        finish_as<false>(begin, end, blocks, row_end);
      }
    }
  }

 private:
  template <bool past_cache>
  void finish_as(std::int64_t begin, std::int64_t end, const CrossEntropyBlock<A>* blocks,
                 const CrossEntropyEnd<A>& row_end) const {
    const auto first = begin * kBlock, last = std::min(work_.classes, end * kBlock);
    if (target_ < 0) return fill<past_cache>(gradient_ + first, last - first, T(0));
    using V = Vectorized<A>;
    const auto& [softmax, terms] = row_end;
    A stage[kBlock + V::size()];  // whole vectors of it are loaded
    A probabilities_stage[kBlock];
    for (auto b = begin; b < end; ++b) {
      const auto i = b * kBlock, n = std::min(kBlock, work_.classes - i);
      const std::uint8_t* allowed = at_or_null(allowed_, i);
      const A* exponentials = at_or_null(kept_, i);
      A max = softmax.max;
      if (exponentials == nullptr) {
        const A* block = load_block(logits_ + i, allowed, n, stage);
        exp_sum<true>(block, stage, n, max, Ahead(logits_ + i + n, n));
        exponentials = stage;
      } else {
        max = blocks[b].softmax.max;
      }
      const A shift = max == softmax.max ? A(1) : std::exp(max - softmax.max);
      const A scale = terms.probability * (shift / softmax.sum);
      const A* weight = at_or_null(work_.weight, i);
      const A* probabilities = load_probabilities(i, n, probabilities_stage);
      T* out = gradient_ + i;
      const auto finish = [&](auto goes_past_cache, auto* to) {
        finish_block<goes_past_cache()>(to, exponentials, n, scale, terms.smoothing, probabilities, terms.target,
                                        weight, allowed);
      };
      if (probabilities == nullptr && target_ >= i && target_ < i + n && target_allowed()) {
        // Put right before it is stored: a cache line that has gone past the cache would be read again.
        finish(std::false_type(), stage);
        stage[target_ - i] -= terms.target;
        store_vectors<past_cache, A>(out, n, [&](auto k, std::int64_t) { return V::loadu(stage + k); });
      } else if (static_cast<const void*>(exponentials) == out) {
        finish(std::false_type(), out);
      } else {
        finish(std::bool_constant<past_cache>(), out);
      }
    }
  }

  ClassSums sum_weights() const {
    if (allowed_ == nullptr && work_.weight == nullptr) return {0, double(work_.classes), work_.classes};
    ClassSums smoothing;
    for (std::int64_t c = 0; c < work_.classes; ++c) {
      if (allowed_ != nullptr && !allowed_[c]) continue;
      smoothing.weight += work_.weight == nullptr ? 1.0 : double(work_.weight[c]);
      ++smoothing.classes;
    }
    return smoothing;
  }

  // Classes [i, i + n) as A, or null: where they lie, or in `stage`.
  const A* load_probabilities(std::int64_t i, std::int64_t n, A* stage) const {
    if (probabilities_ == nullptr) return nullptr;
    return load_block(probabilities_ + i, static_cast<const std::uint8_t*>(nullptr), n, stage);
  }

  ClassSums sum_probabilities() const {
    ClassSums sum;
    A stage[kBlock];
    for (std::int64_t i = 0; i < work_.classes; i += kBlock) {
      const auto n = std::min(kBlock, work_.classes - i);
      const A* block = load_probabilities(i, n, stage);
      sum = sum + class_sums(block, block, at_or_null(work_.weight, i), at_or_null(allowed_, i), n, A(0));
    }
    return sum;
  }

  A target_weight() const {
    return work_.weight == nullptr || probabilities_ != nullptr ? A(1) : work_.weight[target_];
  }
  A target_logit() const { return static_cast<A>(logits_[target_]); }
  bool target_allowed() const { return allowed_ == nullptr || allowed_[target_]; }

  const CrossEntropyWork<T, A>& work_;
  const std::int64_t r_, planned_, target_;
  const T* logits_;
  T* gradient_ = nullptr;
  const std::uint8_t* allowed_;
  const T* probabilities_;
  A* kept_ = nullptr;
  const bool past_cache_;
};

}  // namespace
}  // namespace masked_loss::cpu::CPU_CAPABILITY
