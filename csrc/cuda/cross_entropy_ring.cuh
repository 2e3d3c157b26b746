// Cross entropy, forward and with its gradient, as programs of a ring.
#pragma once

#include "cuda/cross_entropy_kernel.h"
#include "cuda/exponentials.cuh"
#include "cuda/row_ring.cuh"

namespace masked_loss::cuda {

// What there is to say of the classes: nothing but which is the target; a class mask or label smoothing, and perhaps
// weights; class probabilities, and all of that.
enum class RingClasses { Plain, Extras, Probabilities };

// What a part of a row adds up to.
template <RingClasses kind>
struct ClassesState : PowerSum {
  struct Sums {
    double logits = 0, weight = 0;
  } smoothing, target;
  int classes = 0, impossible = 0;  // allowed ones; of others, whether some have a probability

  __device__ __forceinline__ ClassesState operator+(const ClassesState& other) const {
    ClassesState sum;
    sum.smoothing = {smoothing.logits + other.smoothing.logits, smoothing.weight + other.smoothing.weight};
    sum.target = {target.logits + other.target.logits, target.weight + other.target.weight};
    sum.classes = classes + other.classes;
    sum.impossible = impossible + other.impossible;
    return sum;
  }
};
template <>
struct ClassesState<RingClasses::Plain> : PowerSum {};

template <class T_, RingClasses kind, bool writes>
struct CrossEntropyRing {
  using T = T_;
  using P = Pack<T>;
  using State = ClassesState<kind>;
  static constexpr bool kExtras = kind != RingClasses::Plain, kProbable = kind == RingClasses::Probabilities;
  static constexpr int kInputs = kProbable ? 2 : 1, kDropped = 1;
  static constexpr bool kMasked = kExtras, kWrites = writes;
  static constexpr auto kShape = ring_shape(sizeof(T), kInputs, kMasked);
  // Half types take the scale into the exponent.
  static constexpr bool kFolds = sizeof(T) == 2;

  CrossEntropyWork<T, float> work;
  const std::int64_t* order;
  const std::int64_t* kept;
  std::int64_t count, classes;

  struct Row {
    std::int64_t row, index;
    bool leads, allowed;
    float target_logit;
  };
  struct Terms {
    PowerOf power;
    float scale, smoothing, of_target;
    int target;
    bool folded;
  };

  __device__ __forceinline__ std::int64_t end() const { return writes ? count : *kept; }
  __device__ __forceinline__ std::int64_t row(std::int64_t position) const { return order[position]; }
  // Also of those that were kept a divisor may have dropped some.
  __device__ __forceinline__ bool keeps(std::int64_t row) const { return work.index[row] >= 0; }
  __device__ __forceinline__ void skip(std::int64_t) const {}
  __device__ __forceinline__ const T* input(int k, std::int64_t row) const {
    return k == 0 ? work.logits + work.rows.offsets(row)[0] : work.probabilities + work.rows.offsets(row)[3];
  }
  __device__ __forceinline__ T* output(std::int64_t row) const { return work.gradient + work.rows.offsets(row)[1]; }
  __device__ __forceinline__ const std::uint8_t* mask(std::int64_t row) const {
    return work.class_mask == nullptr ? nullptr : work.class_mask + work.rows.offsets(row)[2];
  }
  __device__ __forceinline__ std::int64_t end_of(std::int64_t) const { return classes; }
  __device__ __forceinline__ T absent() const { return narrow<T>(-std::numeric_limits<float>::infinity()); }
  __device__ __forceinline__ T masked() const { return narrow<T>(0.0f); }

  __device__ __forceinline__ Row begin(std::int64_t row, bool leads) const {
    const auto index = work.index[row];
    const bool reads = leads && !kProbable, masks = reads && kMasked && work.class_mask != nullptr;
    return {row, index, leads, masks ? mask(row)[index] != 0 : true, reads ? widen(input(0, row)[index]) : 0.0f};
  }

  // Of a pack's classes. They lie anywhere, but most often at a multiple of 16 bytes.
  __device__ __forceinline__ void load_weights(float (&weights)[P::size], int c) const {
    const float* from = work.weight + c;
    if (is_aligned(from) && c + P::size <= classes) {
#pragma unroll
      for (int j = 0; j < P::size; j += 4) {
        const auto pack = load_cached(from + j);
#pragma unroll
        for (int i = 0; i < 4; ++i) weights[j + i] = pack.values[i];
      }
    } else {
#pragma unroll
      for (int j = 0; j < P::size; ++j) weights[j] = c + j < classes ? from[j] : 0;
    }
  }

  template <int packs>
  __device__ __forceinline__ void visit(State& state, const P (&pack)[kInputs][packs], unsigned kept, int c,
                                        int step) const {
    state.add(pack[0]);
    if constexpr (kExtras) {
      if (!kProbable && work.label_smoothing == 0) return;
      // Shifted by the maximum, so that large logits lose no digits.
      const float shift = state.max == -std::numeric_limits<float>::infinity() ? 0 : state.max;
      float logits = 0, weight = 0, target_logits = 0, target_weight = 0, lost = 0;
#pragma unroll
      for (int k = 0; k < packs; ++k) {
        const unsigned bits = kept >> (k * P::size) & ((1u << P::size) - 1);
        P held = pack[0][k];
        hold(held);
        float weights[P::size];
#pragma unroll
        for (float& w : weights) w = 1;
        if (work.weight != nullptr && bits != 0) load_weights(weights, c + k * step);
#pragma unroll
        for (int j = 0; j < P::size; ++j) {
          const bool counts = bits >> j & 1;
          const float w = counts ? weights[j] : 0, x = counts ? widen(held.values[j]) - shift : 0;
          logits = fmaf(w, x, logits);
          weight += w;
          if constexpr (kProbable) {
            const float probability = widen(pack[kInputs - 1][k].values[j]), q = counts ? w * probability : 0;
            target_logits = fmaf(q, x, target_logits);
            target_weight += q;
            lost = fmaxf(lost, counts ? 0 : probability);
          }
        }
      }
      state.classes += __popc(kept);
      state.impossible += lost > 0;
      state.smoothing.logits += double(logits) + double(shift) * double(weight);
      state.smoothing.weight += double(weight);
      state.target.logits += double(target_logits) + double(shift) * double(target_weight);
      state.target.weight += double(target_weight);
    }
  }

  __device__ __forceinline__ State merge(const State& a, const State& b) const {
    State all{};
    if constexpr (kExtras) all = a + b;
    static_cast<PowerSum&>(all) = cuda::merge(static_cast<const PowerSum&>(a), static_cast<const PowerSum&>(b));
    return all;
  }
  __device__ __forceinline__ State merge_warp(const State& state) const {
    State all{};
    if constexpr (kExtras) {
      if (kProbable || work.label_smoothing != 0) all = WarpSum{}(state);
    }
    static_cast<PowerSum&>(all) = cuda::merge_warp(static_cast<const PowerSum&>(state));
    return all;
  }

  __device__ __forceinline__ Terms conclude(const Row& of, const State& state) const {
    const auto softmax = state.softmax();
    const float log_sum = std::log(softmax.sum);
    const bool weighted = work.weight != nullptr && !kProbable;
    CrossEntropyRow<float> row{work.coefficient[of.row], weighted ? work.weight[of.index] : 1.0f, work.label_smoothing,
                               work.z_loss, ClassSums{}};
    float target_sum = row.target_weight;
    ClassSums target;
    if constexpr (kExtras) row.smoothing = {state.smoothing.logits, state.smoothing.weight, state.classes};
    if constexpr (kProbable) {
      target = {state.target.logits, state.target.weight, state.impossible};
      target_sum = static_cast<float>(target.weight);
    }
    if (of.leads) {
      work.loss[of.row] = kProbable ? cross_entropy_loss(row, softmax, log_sum, target)
                                    : cross_entropy_loss(row, softmax, log_sum, of.target_logit, of.allowed);
      if (work.softmax != nullptr) work.softmax[of.row] = softmax;
    }
    const auto gradient = cross_entropy_gradient(row, softmax.max + log_sum, target_sum);
    PowerOf power(state.max);
    const float scale = gradient.probability / state.sum;
    const bool folded = kFolds && scale > 0;
    if (folded) power.base -= std::log2(scale);
    return {power, scale, gradient.smoothing, gradient.target, static_cast<int>(of.index), folded};
  }

  __device__ __forceinline__ P write(const P (&pack)[kInputs], int c, const Terms& terms) const {
    float values[P::size];
#pragma unroll
    for (int j = 0; j < P::size; ++j) {
      values[j] = terms.power(widen(pack[0].values[j]));
      if (!kFolds || !terms.folded) values[j] *= terms.scale;
    }
    if (kProbable || (kExtras && terms.smoothing != 0)) {
      float weights[P::size];
#pragma unroll
      for (float& w : weights) w = 1;
      if (work.weight != nullptr) load_weights(weights, c);
#pragma unroll
      for (int j = 0; j < P::size; ++j) {
        float share = terms.smoothing;
        if constexpr (kProbable) share += terms.of_target * widen(pack[kInputs - 1].values[j]);
        values[j] -= share * weights[j];
      }
    }
    if (const auto target = unsigned(terms.target - c); !kProbable && target < unsigned(P::size)) {
#pragma unroll
      for (int j = 0; j < P::size; ++j) {
        if (unsigned(j) == target) values[j] -= terms.of_target;
      }
    }
    return narrow_pack<T>(values);
  }
};

template <class T, class A>
RingClasses ring_classes(const CrossEntropyWork<T, A>& work) {
  if (work.probabilities != nullptr) return RingClasses::Probabilities;
  const bool extras = work.class_mask != nullptr || work.label_smoothing != 0;
  return extras ? RingClasses::Extras : RingClasses::Plain;
}

template <bool writes, class T>
void run_cross_entropy_ring(const CrossEntropyCall<T, float>& call, int blocks, cudaStream_t stream) {
  const auto& work = call.work;
  const auto run = [&](auto kind) {
    launch_ring(CrossEntropyRing<T, kind(), writes>{work, call.order, call.kept, work.rows.count, work.classes}, blocks,
                stream);
  };
  switch (ring_classes(work)) {
    case RingClasses::Plain: return run(std::integral_constant<RingClasses, RingClasses::Plain>());
    case RingClasses::Extras: return run(std::integral_constant<RingClasses, RingClasses::Extras>());
    default: return run(std::integral_constant<RingClasses, RingClasses::Probabilities>());
  }
}

}  // namespace masked_loss::cuda
