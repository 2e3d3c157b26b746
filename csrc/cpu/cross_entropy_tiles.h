#pragma once

// Only for the kernel file, as blocks.h.
#include "cpu/blocks.h"
#include "cpu/cross_entropy_kernel.h"

namespace masked_loss::cpu::CPU_CAPABILITY {
namespace {

constexpr std::int64_t kLanes = 128;  // rows beside one another; few classes of them stay in the L1 cache

// Rows beside one another in vectors, as lanes: few classes, or classes that are apart in memory. A tile of them is
// [classes, lanes]; it is visited in blocks of classes, or in one where it stays in the L2 cache.
template <class T, class A, CrossEntropyMode mode>
class TileKernel {
 public:
  TileKernel(const CrossEntropyWork<T, A>& work, A* scratch)
      : work_(work),
        lanes_(lanes(work)),
        block_(block(work)),
        keeps_tile_(mode == CrossEntropyMode::ForwardGrad && block_ == work.classes),
        past_cache_(past_cache(work)),
        tile_(next_line(scratch)),
        stage_(tile_ + block_ * lanes_),
        probabilities_(stage_ + (transposes(work) ? block_ * lanes_ : 0)) {
    const auto dims = work.rows.dims;
    for (int k = 0; k < 4; ++k) stride_[k] = dims == 0 ? 0 : work.rows.strides[k][dims - 1];
    inner_ = dims == 0 ? 1 : work.rows.sizes[dims - 1];
    std::fill(target_weight_, target_weight_ + lanes_, A(1));
    std::fill(target_allowed_, target_allowed_ + lanes_, true);
  }

  // Fewer where there would not be tiles for many threads.
  static std::int64_t lanes(const CrossEntropyWork<T, A>& work) {
    auto lanes = kLanes;
    while (lanes > kFewLanes && lanes * kTiles > work.rows.count) lanes /= 2;
    return lanes;
  }

  static std::int64_t scratch_size(const CrossEntropyWork<T, A>& work) {
    const int tiles = 1 + transposes(work) + (work.probabilities != nullptr);
    return 64 / std::int64_t(sizeof(A)) + tiles * block(work) * lanes(work) + V::size();
  }

  void operator()(std::int64_t begin, std::int64_t end) {
    for (auto r = begin; r < end; r += lanes_) run(r, std::min(lanes_, end - r), r - begin);
  }

 private:
  using V = Vectorized<A>;
  static constexpr std::int64_t kTile = 1 << 17;  // elements that stay in the L2 cache
  static constexpr std::int64_t kTileBlock = 16;  // classes, where the tile does not
  static constexpr std::int64_t kFewLanes = 32, kTiles = 16;
  static constexpr std::int64_t kGroup = 4;  // classes that a pass takes together
  static constexpr std::int64_t kPadded = kLanes + V::size();

  // Lanes whose rows are one step apart.
  struct Part {
    std::int64_t lane, count;
    std::array<std::int64_t, 4> offsets;
  };

  // [classes, lanes]
  struct Block {
    const A* data;
    std::int64_t stride;

    V at(std::int64_t i, std::int64_t w) const { return V::loadu(data + i * stride + w); }
  };

  static bool transposes(const CrossEntropyWork<T, A>& work) {
    return work.logits_stride == 1 || (work.gradient != nullptr && work.gradient_stride == 1) ||
           (work.probabilities != nullptr && work.probabilities_stride == 1);
  }

  static std::int64_t block(const CrossEntropyWork<T, A>& work) {
    return work.classes * lanes(work) <= kTile ? work.classes : kTileBlock;
  }

  void run(std::int64_t first, std::int64_t count, std::int64_t planned) {
    first_ = first, count_ = count, planned_ = planned;
    width_ = (count + V::size() - 1) / V::size() * V::size();
    split();
    read_plan();
    if (any_kept_) {
      start();
      if constexpr (mode != CrossEntropyMode::Backward) for_blocks([&](auto c, auto n) { visit(c, n); });
      if (work_.probabilities == nullptr) take_targets();
      const bool plain = work_.label_smoothing == 0 && work_.class_mask == nullptr && work_.probabilities == nullptr;
      plain ? conclude<true>() : conclude<false>();
    }
    write_results();
    if constexpr (mode != CrossEntropyMode::Forward) for_blocks([&](auto c, auto n) { finish(c, n); });
  }

  template <class Body>
  void for_blocks(const Body& body) const {
    for (std::int64_t c = 0; c < work_.classes; c += block_) body(c, std::min(block_, work_.classes - c));
  }

  template <class Body>
  void for_lanes(const Body& body) const {
    for (std::int64_t w = 0; w < width_; w += V::size()) body(w);
  }

  // Class by class, as they lie in memory, but a few together: what is kept for a lane is then loaded less often.
  template <class Body>
  void for_groups(std::int64_t n, const Body& body) const {
    for (std::int64_t i = 0; i < n; i += kGroup) {
      if (i + kGroup <= n) {
        for_lanes([&](std::int64_t w) { body(w, i, i + kGroup); });
      } else {
        for_lanes([&](std::int64_t w) { body(w, i, n); });
      }
    }
  }

  void split() {
    parts_ = 0;
    for (std::int64_t lane = 0; lane < count_; lane += part_[parts_++].count) {
      const auto together = std::min(count_ - lane, inner_ - (first_ + lane) % inner_);
      part_[parts_] = {lane, together, work_.rows.offsets(first_ + lane)};
    }
    one_mask_ = parts_ == 1 && stride_[2] == 0;
    for (int p = 0; work_.class_mask != nullptr && p < parts_; ++p) {
      const auto& part = part_[p];
      for (std::int64_t i = 0; i < part.count; ++i) mask_offset_[part.lane + i] = part.offsets[2] + i * stride_[2];
    }
  }

  void read_plan() {
    std::fill(std::copy_n(work_.index + planned_, count_, target_), target_ + width_, -1);
    std::fill(std::copy_n(work_.coefficient + planned_, count_, coefficient_), coefficient_ + width_, A(0));
    std::int64_t kept = 0;
    for (std::int64_t w = 0; w < width_; ++w) {
      kept_[w] = target_[w] >= 0;
      kept += kept_[w];
    }
    any_kept_ = kept > 0, any_masked_ = kept < count_;
  }

  void start() {
    for (std::int64_t w = 0; w < width_; ++w) {
      Softmax<A> softmax;
      if constexpr (mode == CrossEntropyMode::Backward) {
        if (w < count_) softmax = work_.softmax[first_ + w];
      }
      max_[w] = softmax.max, sum_[w] = softmax.sum;
    }
    if (work_.label_smoothing != 0) std::fill(smoothing_, smoothing_ + width_, ClassSums{});
    if (work_.probabilities != nullptr) std::fill(target_sums_, target_sums_ + width_, ClassSums{});
  }

  void take_targets() {
    for (int p = 0; p < parts_; ++p) {
      const auto& part = part_[p];
      const T* x = work_.logits + part.offsets[0];
      for (std::int64_t i = 0, w = part.lane; i < part.count; ++i, ++w) {
        const auto target = std::max<std::int64_t>(target_[w], 0);  // a masked row's is not used
        target_logit_[w] = static_cast<A>(x[i * stride_[0] + target * work_.logits_stride]);
        if (work_.weight != nullptr) target_weight_[w] = work_.weight[target];
        if (work_.class_mask != nullptr) target_allowed_[w] = allowed(w, target);
      }
    }
    std::fill(target_logit_ + count_, target_logit_ + width_, A(0));
  }

  // Classes [c, c + n) of the logits, -inf where masked.
  Block load(std::int64_t c, std::int64_t n) {
    const bool as_they_are = work_.class_mask == nullptr;
    const Block block = load(work_.logits, 0, work_.logits_stride, c, n, tile_, as_they_are);
    if (!as_they_are) set_masked_classes(c, n, -std::numeric_limits<A>::infinity());
    return block;
  }

  Block load_probabilities(std::int64_t c, std::int64_t n) {
    // Past the cache what is written may begin within a vector, and so reads on behind the last lane.
    return load(work_.probabilities, 3, work_.probabilities_stride, c, n, probabilities_, /*in_place=*/!past_cache_);
  }

  // Classes [c, c + n) of an operand as A: in place where that can be, or in `tile`. Nothing is made of what masked
  // lanes hold.
  Block load(const T* data, int operand, std::int64_t class_stride, std::int64_t c, std::int64_t n, A* tile,
             bool in_place) {
    const auto lane_stride = stride_[operand];
    if constexpr (std::is_same_v<T, A>) {
      if (in_place && parts_ == 1 && lane_stride == 1 && count_ == width_) {
        return {data + part_[0].offsets[operand] + c * class_stride, class_stride};
      }
    }
    for (int p = 0; p < parts_; ++p) {
      const auto& part = part_[p];
      const T* x = data + part.offsets[operand] + c * class_stride;
      A* lane = tile + part.lane;
      if (lane_stride == 1 || part.count == 1) {
        for (std::int64_t i = 0; i < n; ++i) convert(x + i * class_stride, lane + i * lanes_, part.count);
      } else if (class_stride == 1) {
        load_transposed(x, lane_stride, part.count, n, lane);
      } else {
        for (std::int64_t i = 0; i < n; ++i) {
          for (std::int64_t w = 0; w < part.count; ++w) {
            lane[i * lanes_ + w] = static_cast<A>(x[i * class_stride + w * lane_stride]);
          }
        }
      }
    }
    for (std::int64_t i = 0; count_ < width_ && i < n; ++i) {
      std::fill(tile + i * lanes_ + count_, tile + i * lanes_ + width_, A(0));
    }
    return {tile, lanes_};
  }

  static void convert(const T* from, A* to, std::int64_t n) {
    for_vectors<A>(from, n, [&](V v, std::int64_t i, std::int64_t lanes) { v.store(to + i, lanes); });
  }

  // Calls body(offset, offset of a dense copy, elements) for rows of n elements: for all of them at once where they lie
  // beside one another.
  template <class Body>
  static void for_rows(std::int64_t count, std::int64_t n, std::int64_t stride, const Body& body) {
    if (stride == n) return body(0, 0, count * n);
    for (std::int64_t w = 0; w < count; ++w) body(w * stride, w * n, n);
  }

  void load_transposed(const T* x, std::int64_t lane_stride, std::int64_t count, std::int64_t n, A* lane) {
    if constexpr (std::is_same_v<T, A>) {
      transpose(x, lane_stride, lane, lanes_, count, n);
    } else {
      for_rows(count, n, lane_stride,
               [&](auto from, auto to, auto elements) { convert(x + from, stage_ + to, elements); });
      transpose(stage_, n, lane, lanes_, count, n);
    }
  }

  bool allowed(std::int64_t w, std::int64_t c) const {
    return work_.class_mask == nullptr || work_.class_mask[mask_offset_[w] + c * work_.class_mask_stride];
  }

  void set_masked_classes(std::int64_t c, std::int64_t n, A value) const {
    for (std::int64_t i = 0; i < n; ++i) {
      A* lane = tile_ + i * lanes_;
      if (one_mask_) {
        if (!allowed(0, c + i)) std::fill(lane, lane + width_, value);
        continue;
      }
      for (std::int64_t w = 0; w < count_; ++w) lane[w] = allowed(w, c + i) ? lane[w] : value;
    }
  }

  // Sums exponentials relative to the maximum so far. What the next tile reads is fetched meanwhile.
  void visit(std::int64_t c, std::int64_t n) {
    const Block block = load(c, n);
    A before[kLanes];
    std::copy_n(max_, width_, before);
    for_groups(n, [&](std::int64_t w, std::int64_t begin, std::int64_t end) {
      V max = V::loadu(max_ + w);
      for (auto i = begin; i < end; ++i) max = larger(block.at(i, w), max);
      max.store(max_ + w);
    });
    if (work_.label_smoothing != 0) sum_classes(c, n, block, nullptr, smoothing_);
    if (work_.probabilities != nullptr) {
      kept_probabilities_ = load_probabilities(c, n);
      sum_classes(c, n, block, &kept_probabilities_, target_sums_);
    }
    for_lanes([&](std::int64_t w) {
      (V::loadu(sum_ + w) * exp_of_negative(V::loadu(before + w) - V::loadu(max_ + w))).store(sum_ + w);
    });
    const T* next = work_.logits + part_[0].offsets[0] + c * work_.logits_stride + lanes_ * stride_[0];
    const auto next_stride = work_.logits_stride == 1 ? lanes_ : work_.logits_stride;
    const bool keeps = mode == CrossEntropyMode::ForwardGrad && keeps_tile_;
    for_groups(n, [&](std::int64_t w, std::int64_t begin, std::int64_t end) {
      const V max = V::loadu(max_ + w);
      V sum = V::loadu(sum_ + w);
      for (auto i = begin; i < end; ++i) {
        __builtin_prefetch(next + i * next_stride + w, 0, 2);
        const V e = exp_of_negative(block.at(i, w) - max);
        if (keeps) e.store(tile_ + i * lanes_ + w);
        sum = sum + e;
      }
      sum.store(sum_ + w);
    });
  }

  // Adds a block's part of what label smoothing sums, or, with probabilities, their cost; shifted by the maximum so
  // that large logits lose no digits.
  void sum_classes(std::int64_t c, std::int64_t n, const Block& block, const Block* probabilities, ClassSums* sums) {
    for_lanes([&](std::int64_t w) {
      const V shift = V::loadu(max_ + w), zero(0);
      V logits = zero, weights = zero, classes = zero, not_allowed = zero;  // the last 1 where one is positive
      for (std::int64_t i = 0; i < n; ++i) {
        V weight(work_.weight == nullptr ? A(1) : work_.weight[c + i]), counted(1);
        if (probabilities != nullptr) weight = weight * probabilities->at(i, w);
        V term = weight * (block.at(i, w) - shift);
        if (work_.class_mask != nullptr) {
          bool allows[V::size()];
          for (int l = 0; l < V::size(); ++l) allows[l] = w + l < count_ && allowed(w + l, c + i);
          if (probabilities != nullptr) {
            const V excluded = select(allows, zero, probabilities->at(i, w));
            not_allowed = V::blendv(not_allowed, V(1), excluded > zero);
          }
          term = select(allows, term, zero);
          weight = select(allows, weight, zero);
          counted = select(allows, counted, zero);
        }
        logits = logits + term;
        weights = weights + weight;
        classes = classes + counted;
      }
      A parts[4][V::size()];
      logits.store(parts[0]), weights.store(parts[1]), classes.store(parts[2]), not_allowed.store(parts[3]);
      for (int l = 0; l < V::size(); ++l) {
        const auto counts = static_cast<std::int64_t>(probabilities == nullptr ? parts[2][l] : A(parts[3][l] > 0));
        if (counts == 0 && probabilities == nullptr) continue;
        const double weight(parts[1][l]);
        sums[w + l] = sums[w + l] + ClassSums{double(parts[0][l]) + double(max_[w + l]) * weight, weight, counts};
      }
    });
  }

  void sum_weights(std::int64_t w) {
    if (work_.class_mask == nullptr && work_.weight == nullptr) {
      smoothing_[w] = {0, double(work_.classes), work_.classes};
      return;
    }
    for (std::int64_t c = 0; c < work_.classes; ++c) {
      if (allowed(w, c))
        smoothing_[w] = smoothing_[w] + ClassSums{0, work_.weight == nullptr ? 1.0 : double(work_.weight[c]), 1};
    }
  }

  // The loss of each row, and the factors that its gradient is made with. `plain`: there is neither label smoothing nor
  // a class mask; what is left are vector instructions.
  template <bool plain>
  void conclude() {
    if (mode == CrossEntropyMode::Backward && work_.label_smoothing != 0) {
      for (std::int64_t w = 0; w < count_; ++w) sum_weights(w);
    }
    const bool has_probabilities = !plain && work_.probabilities != nullptr;
    if (mode == CrossEntropyMode::Backward && has_probabilities) {
      for_blocks([&](auto c, auto n) {
        const Block block = load_probabilities(c, n);
        sum_classes(c, n, block, &block, target_sums_);
      });
    }
    for_lanes([&](std::int64_t w) { V::loadu(sum_ + w).log().store(log_sum_ + w); });
    const A label_smoothing = plain ? A(0) : work_.label_smoothing, z_loss = work_.z_loss;
    for (std::int64_t w = 0; w < width_; ++w) {
      const CrossEntropyRow<A> row{coefficient_[w], target_weight_[w], label_smoothing, z_loss,
                                   plain ? ClassSums() : smoothing_[w]};
      const Softmax<A> softmax{max_[w], sum_[w]};
      if constexpr (mode != CrossEntropyMode::Backward) {
        const A loss = has_probabilities ? cross_entropy_loss(row, softmax, log_sum_[w], target_sums_[w])
                                         : cross_entropy_loss(row, softmax, log_sum_[w], target_logit_[w],
                                                              plain || target_allowed_[w]);
        loss_[w] = kept_[w] ? loss : A(0);
      }
      if constexpr (mode != CrossEntropyMode::Forward) {
        const A target_sum = has_probabilities ? static_cast<A>(target_sums_[w].weight) : row.target_weight;
        const auto terms = cross_entropy_gradient(row, softmax.max + log_sum_[w], target_sum);
        scale_[w] = terms.probability / softmax.sum;
        smoothed_[w] = terms.smoothing;
        target_gradient_[w] = terms.target;
      }
    }
  }

  void write_results() {
    if (mode != CrossEntropyMode::Backward) {
      if (!any_kept_) std::fill(loss_, loss_ + count_, A(0));
      std::copy_n(loss_, count_, work_.loss + planned_);
    }
    if (mode != CrossEntropyMode::Forward || work_.softmax == nullptr) return;
    for (std::int64_t w = 0; w < count_; ++w) {
      work_.softmax[first_ + w] = kept_[w] ? Softmax<A>{max_[w], sum_[w]} : Softmax<A>{0, 1};
    }
  }

  // Exponentials become gradients, and go where they belong.
  void finish(std::int64_t c, std::int64_t n) {
    if (!any_kept_) {
      std::fill(tile_, tile_ + n * lanes_, A(0));
      return store_block(c, n);
    }
    for (std::int64_t w = 0; w < width_; ++w) target_class_[w] = static_cast<A>(target_[w] - c);
    const Block from = keeps_tile_ ? Block{tile_, lanes_} : load(c, n);
    if (work_.probabilities != nullptr && !keeps_tile_) kept_probabilities_ = load_probabilities(c, n);
    if (keeps_tile_ && parts_ == 1 && stride_[1] == 1 && work_.class_mask == nullptr) {
      T* out = work_.gradient + part_[0].offsets[1];
      for (std::int64_t i = 0; i < n; ++i) {
        const auto gradient = gradient_of(c, i, from);
        store_row(out + i * work_.gradient_stride, count_, [&](auto w, auto) { return gradient(w); });
      }
      return;
    }
    for (std::int64_t i = 0; i < n; ++i) {
      const auto gradient = gradient_of(c, i, from);
      for_lanes([&](std::int64_t w) { gradient(w).store(tile_ + i * lanes_ + w); });
    }
    if (work_.class_mask != nullptr) set_masked_classes(c, n, A(0));
    store_block(c, n);
  }

  // -> gradient(lane) of class c + i, for any lane, as what is written may begin within a vector
  auto gradient_of(std::int64_t c, std::int64_t i, const Block& from) const {
    const V weight(work_.weight == nullptr ? A(1) : work_.weight[c + i]), index(static_cast<A>(i));
    return [=, this, smooths = work_.label_smoothing != 0, keeps = keeps_tile_, masks = any_masked_,
            has_probabilities = work_.probabilities != nullptr](std::int64_t w) {
      const V x = from.at(i, w), e = keeps ? x : exp_of_negative(x - V::loadu(max_ + w));
      const V target = V::loadu(target_gradient_ + w);
      V less = has_probabilities ? target * kept_probabilities_.at(i, w) * weight
                                 : where_equal(V::loadu(target_class_ + w), index, target);
      if (smooths) less = less + V::loadu(smoothed_ + w) * weight;
      // Not left to the compiler, which might choose another rounding in another loop.
      const V gradient = at::vec::fmsub(e, V::loadu(scale_ + w), less);
      return masks ? select(kept_ + w, gradient, V(0)) : gradient;
    };
  }

  void store_block(std::int64_t c, std::int64_t n) {
    for (int p = 0; p < parts_; ++p) {
      const auto& part = part_[p];
      T* out = work_.gradient + part.offsets[1] + c * work_.gradient_stride;
      const A* lane = tile_ + part.lane;
      if (stride_[1] == 1 || part.count == 1) {
        for (std::int64_t i = 0; i < n; ++i) store_from(lane + i * lanes_, out + i * work_.gradient_stride, part.count);
      } else if (work_.gradient_stride == 1) {
        transpose(lane, lanes_, stage_, n, n, part.count);
        for_rows(part.count, n, stride_[1],
                 [&](auto to, auto from, auto elements) { store_from(stage_ + from, out + to, elements); });
      } else {
        for (std::int64_t i = 0; i < n; ++i) {
          for (std::int64_t w = 0; w < part.count; ++w) {
            out[i * work_.gradient_stride + w * stride_[1]] = static_cast<T>(lane[i * lanes_ + w]);
          }
        }
      }
    }
  }

  template <class Value>
  void store_row(T* out, std::int64_t n, const Value& value) const {
    past_cache_ ? store_vectors<true, A>(out, n, value) : store_vectors<false, A>(out, n, value);
  }

  void store_from(const A* from, T* out, std::int64_t n) const {
    store_row(out, n, [from](std::int64_t i, std::int64_t) { return V::loadu(from + i); });
  }

  const CrossEntropyWork<T, A>& work_;
  const std::int64_t lanes_, block_;
  const bool keeps_tile_;  // as exponentials, which are made anew otherwise
  const bool past_cache_;
  std::array<std::int64_t, 4> stride_;              // between lanes of a part
  std::int64_t inner_;                              // rows that are one step apart
  std::int64_t first_ = 0, count_ = 0, width_ = 0;  // rows of this tile, and the same in whole vectors
  std::int64_t planned_ = 0;                        // where the plan has them
  A *tile_, *stage_;                                // a block; and transposed, [lanes, classes]
  A* probabilities_;                                // a block of them,
  Block kept_probabilities_;                        // or where it lies
  int parts_ = 0;
  Part part_[kLanes];
  bool any_kept_ = false, any_masked_ = false, one_mask_ = false;
  std::int64_t target_[kLanes], mask_offset_[kLanes];
  bool kept_[kPadded], target_allowed_[kLanes];
  ClassSums smoothing_[kLanes], target_sums_[kLanes];
  alignas(64) A coefficient_[kLanes], target_weight_[kLanes], target_logit_[kLanes];
  alignas(64) A sum_[kLanes], log_sum_[kLanes], loss_[kLanes];
  alignas(64) A max_[kPadded], scale_[kPadded], smoothed_[kPadded], target_class_[kPadded], target_gradient_[kPadded];
};

}  // namespace
}  // namespace masked_loss::cpu::CPU_CAPABILITY
