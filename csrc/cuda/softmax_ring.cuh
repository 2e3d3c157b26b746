// Softmax, log_softmax and logsumexp, and the gradients of the former two, as programs of a ring. The gradient of
// logsumexp adds nothing up, and has no need of one.
#pragma once

#include "cuda/exponentials.cuh"
#include "cuda/row_ring.cuh"
#include "cuda/softmax_kernel.h"

namespace masked_loss::cuda {

template <class T_, int inputs, bool masked_>
struct SoftmaxRows {
  using T = T_;
  using P = Pack<T>;
  static constexpr int kInputs = inputs, kDropped = inputs;
  static constexpr bool kMasked = masked_, kWrites = true;
  static constexpr auto kShape = ring_shape(sizeof(T), inputs, masked_);

  SoftmaxWork<T, float> work;
  bool log;
  std::int64_t count, classes;

  __device__ __forceinline__ std::int64_t end() const { return count; }
  __device__ __forceinline__ std::int64_t row(std::int64_t position) const { return position; }
  __device__ __forceinline__ bool keeps(std::int64_t row) const {
    return !kMasked || work.mask == nullptr || work.mask_stride != 0 || work.mask[work.rows.offsets(row)[2]] != 0;
  }
  __device__ __forceinline__ const T* input(int k, std::int64_t row) const {
    return k == 0 ? work.input + work.rows.offsets(row)[0] : work.grad + work.rows.offsets(row)[3];
  }
  __device__ __forceinline__ T* output(std::int64_t row) const { return work.result + work.rows.offsets(row)[1]; }
  __device__ __forceinline__ const std::uint8_t* mask(std::int64_t row) const {
    return work.mask == nullptr || work.mask_stride == 0 ? nullptr : work.mask + work.rows.offsets(row)[2];
  }
  __device__ __forceinline__ std::int64_t end_of(std::int64_t row) const { return work.causal_end(row); }
};

template <class T, bool masked_>
struct SoftmaxRing : SoftmaxRows<T, 1, masked_> {
  using P = Pack<T>;
  using State = PowerSum;
  struct Row {};
  struct Terms {
    PowerOf power;
    float max, log_sum, scale;
  };

  __device__ __forceinline__ T absent() const { return narrow<T>(-std::numeric_limits<float>::infinity()); }
  __device__ __forceinline__ T masked() const { return this->log ? absent() : narrow<T>(0.0f); }

  __device__ __forceinline__ Row begin(std::int64_t, bool) const { return {}; }
  template <int packs>
  __device__ __forceinline__ void visit(State& state, const P (&pack)[1][packs], unsigned, int, int) const {
    state.add(pack[0]);
  }
  __device__ __forceinline__ State merge(const State& a, const State& b) const { return cuda::merge(a, b); }
  __device__ __forceinline__ State merge_warp(const State& state) const { return cuda::merge_warp(state); }

  // Fast exponentials lose NaN: a row without a finite sum gets it from here.
  __device__ __forceinline__ Terms conclude(const Row&, const State& state) const {
    const auto softmax = state.softmax();
    const float log_sum = std::log(softmax.sum), nan = std::numeric_limits<float>::quiet_NaN();
    return {PowerOf(state.max), state.max, log_sum, std::isfinite(softmax.max + log_sum) ? 1 / state.sum : nan};
  }
  __device__ __forceinline__ P write(const P (&pack)[1], int, const Terms& terms) const {
    float values[P::size];
    if (this->log) {
#pragma unroll
      for (int j = 0; j < P::size; ++j) values[j] = widen(pack[0].values[j]) - terms.max - terms.log_sum;
    } else {
#pragma unroll
      for (int j = 0; j < P::size; ++j) values[j] = terms.power(widen(pack[0].values[j])) * terms.scale;
    }
    return narrow_pack<T>(values);
  }
};

template <class T, bool masked_>
struct LogsumexpRing : SoftmaxRing<T, masked_> {
  static constexpr bool kWrites = false;
  struct Row {
    std::int64_t row;
    bool leads;
  };

  __device__ __forceinline__ void skip(std::int64_t row) const {
    this->work.reduced[row] = -std::numeric_limits<float>::infinity();
  }
  __device__ __forceinline__ Row begin(std::int64_t row, bool leads) const { return {row, leads}; }

  // Infinite elements have an infinite sum, and not one of NaN, which theirs alone is.
  __device__ __forceinline__ typename SoftmaxRing<T, masked_>::Terms conclude(const Row& of,
                                                                              const PowerSum& state) const {
    constexpr float infinity = std::numeric_limits<float>::infinity();
    if (of.leads) {
      this->work.reduced[of.row] = state.max == infinity ? infinity + (state.sum - state.sum == 0 ? 0 : state.sum)
                                                         : log_sum_exp(state.softmax());
    }
    return {PowerOf(0), 0, 0, 0};
  }
};

template <class T, bool masked_>
struct SoftmaxBackwardRing : SoftmaxRows<T, 2, masked_> {
  using P = Pack<T>;
  struct State {
    float sum = 0, unused = 0;
  };
  struct Row {};
  using Terms = float;

  __device__ __forceinline__ T absent() const { return narrow<T>(0.0f); }
  __device__ __forceinline__ T masked() const { return absent(); }

  __device__ __forceinline__ Row begin(std::int64_t, bool) const { return {}; }
  template <int packs>
  __device__ __forceinline__ void visit(State& state, const P (&pack)[2][packs], unsigned, int, int) const {
    float sums[2] = {};
#pragma unroll
    for (int k = 0; k < packs; ++k) {
#pragma unroll
      for (int j = 0; j < P::size; ++j) {
        const float grad = widen(pack[1][k].values[j]);
        sums[j % 2] = this->log ? sums[j % 2] + grad : fmaf(widen(pack[0][k].values[j]), grad, sums[j % 2]);
      }
    }
    state.sum += sums[0] + sums[1];
  }
  __device__ __forceinline__ State merge(const State& a, const State& b) const { return {a.sum + b.sum, 0}; }
  __device__ __forceinline__ State merge_warp(const State& state) const { return {WarpSum{}(state.sum), 0}; }

  __device__ __forceinline__ Terms conclude(const Row&, const State& state) const { return state.sum; }
  __device__ __forceinline__ P write(const P (&pack)[2], int, float sum) const {
    float values[P::size];
#pragma unroll
    for (int j = 0; j < P::size; ++j) {
      const float y = widen(pack[0].values[j]), grad = widen(pack[1].values[j]);
      values[j] = this->log ? grad - fast_exp(y) * sum : y * (grad - sum);
    }
    return narrow_pack<T>(values);
  }
};

// How many blocks share a row, or 0: not for a ring.
template <class T, class A>
int softmax_ring_blocks(const SoftmaxWork<T, A>& work, SoftmaxPass pass) {
  if (std::is_same_v<T, double> || pass == SoftmaxPass::LogsumexpBackward) return 0;
  if (work.input_stride != 1 || work.grad_stride != 1 || work.result_stride != 1 || work.mask_stride > 1) return 0;
  if (!begin_alike<T>(work.rows, {{work.input, 0}, {work.result, 1}, {work.grad, 3}})) return 0;
  return ring_blocks(sizeof(T), work.grad == nullptr ? 1 : 2, work.mask != nullptr || work.queries > 0, work.classes);
}

template <bool masked, class T>
void run_softmax_ring(const SoftmaxWork<T, float>& work, SoftmaxPass pass, int blocks, cudaStream_t stream) {
  const auto count = work.rows.count, classes = work.classes;
  switch (pass) {
    case SoftmaxPass::Softmax:
    case SoftmaxPass::LogSoftmax:
      return launch_ring(SoftmaxRing<T, masked>{{work, pass == SoftmaxPass::LogSoftmax, count, classes}}, blocks,
                         stream);
    case SoftmaxPass::SoftmaxBackward:
    case SoftmaxPass::LogSoftmaxBackward:
      return launch_ring(
          SoftmaxBackwardRing<T, masked>{{work, pass == SoftmaxPass::LogSoftmaxBackward, count, classes}}, blocks,
          stream);
    default: return launch_ring(LogsumexpRing<T, masked>{{{work, false, count, classes}}}, blocks, stream);
  }
}

}  // namespace masked_loss::cuda
