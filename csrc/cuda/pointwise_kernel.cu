#include "cuda/pointwise_kernel.h"

#include "cuda/device.cuh"

namespace masked_loss::cuda {
namespace {

constexpr int kThreads = 256;

template <class A>
struct DeviceMath : ScalarMath<A> {
  __device__ __forceinline__ static A exp_of_negative(A x) { return fast_exp(x); }
};

// Whether an operand's elements stand one after the other, or are one.
__device__ __forceinline__ bool is_line(const Operand& operand) {
  return operand.at.dims == 0 || (operand.at.dims == 1 && operand.at.strides[0][0] <= 1);
}

template <class T>
__device__ __forceinline__ const T* address(const Operand& operand, std::int64_t i) {
  return static_cast<const T*>(operand.data) + operand.at.offsets(i)[0];
}

// `count` elements from `first` on, up to n.
template <class T, int n>
__device__ __forceinline__ void load_elements(const Operand& operand, std::int64_t first, int count,
                                              Compute<T> (&values)[n]) {
  if (is_line(operand) && count == n) {
    if (operand.at.dims == 0 || operand.at.strides[0][0] == 0) {
      const auto value = widen(*static_cast<const T*>(operand.data));
#pragma unroll
      for (int j = 0; j < n; ++j) values[j] = value;
      return;
    }
    const T* from = address<T>(operand, first);
    constexpr int size = Pack<T>::size;
    if constexpr (n % size == 0) {
      const bool aligned = is_aligned(from);
#pragma unroll
      for (int part = 0; part < n / size; ++part) {
        const auto pack = load_pack(from + part * size, aligned);
#pragma unroll
        for (int j = 0; j < size; ++j) values[part * size + j] = widen(pack.values[j]);
      }
    } else {
#pragma unroll
      for (int j = 0; j < n; ++j) values[j] = widen(from[j]);
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < n; ++j) {
    if (j < count) values[j] = widen(*address<T>(operand, first + j));
  }
}

// A bit an element: whether it is kept, of `count` elements; and their sample weights, times the shares.
template <class A, int n>
__device__ __forceinline__ unsigned load_keep(const PointwiseWork<A>& work, std::int64_t first, int count,
                                              A (&weights)[n]) {
  unsigned kept = count == n ? (n == 32 ? ~0u : (1u << n) - 1) : (1u << count) - 1;
#pragma unroll
  for (int j = 0; j < n; ++j) weights[j] = 1;
  const auto& mask = work.mask;
  if (mask.data != nullptr) {
    if (count == n && mask.at.dims == 1 && mask.at.strides[0][0] == 1) {
      kept &= load_mask_bits<n>(address<unsigned char>(mask, first));
    } else {
#pragma unroll
      for (int j = 0; j < n; ++j) {
        if (j < count && *address<unsigned char>(mask, first + j) == 0) kept &= ~(1u << j);
      }
    }
  }
  const auto multiply = [&](const Operand& operand) {
    if (operand.data == nullptr || kept == 0) return;
    A factors[n];
    load_elements<A>(operand, first, count, factors);
#pragma unroll
    for (int j = 0; j < n; ++j) {
      if (j < count && factors[j] == 0) kept &= ~(1u << j);
      weights[j] *= factors[j];
    }
  };
  multiply(work.sample_weight);
  multiply(work.share);
  return kept;
}

struct AddSums {
  __device__ PointwiseSum operator()(const PointwiseSum& a, const PointwiseSum& b) const {
    return {a.weight + b.weight, a.kept + b.kept};
  }
};
struct WarpSums {
  __device__ PointwiseSum operator()(const PointwiseSum& value) const { return reduce_lanes(value, 32, AddSums{}); }
};

// A block a part, or several where there are more parts than blocks.
template <class A>
__global__ void __launch_bounds__(kThreads)
    weigh_parts(PointwiseWork<A> work, std::int64_t parts, std::int64_t size, double times, PointwiseSum* sums) {
  for (auto part = std::int64_t(blockIdx.x); part < parts; part += gridDim.x) {
    const auto begin = part * size, end = min(begin + size, work.count);
    PointwiseSum sum;
    for (auto i = begin + threadIdx.x; i < end; i += kThreads) {
      A weight[1];
      if (load_keep(work, i, 1, weight) == 0) continue;
      if (work.weight.data != nullptr) weight[0] *= *address<A>(work.weight, i);
      sum = AddSums{}(sum, {static_cast<double>(weight[0]), 1});
    }
    sum = reduce_block(sum, WarpSums{});
    if (threadIdx.x == 0) sums[part] = {sum.weight * times, sum.kept};
  }
}

template <class A>
__global__ void __launch_bounds__(kThreads)
    find_divisor(const PointwiseSum* sums, std::int64_t count, bool counts_sequences, const double* normalizer,
                 double* divisor, A* shares) {
  double total = 0;
  for (auto i = std::int64_t(threadIdx.x); i < count; i += kThreads) {
    total += counts_sequences ? double(sums[i].kept > 0) : sums[i].weight;
    if (shares != nullptr) shares[i] = sums[i].weight == 0 ? A(0) : static_cast<A>(1 / sums[i].weight);
  }
  total = reduce_block(total, WarpSum{});
  if (threadIdx.x != 0) return;
  if (normalizer != nullptr) {
    total = *normalizer;
    if (total < 0) total = std::numeric_limits<double>::quiet_NaN();  // an error where it could be waited for
  }
  *divisor = total;
}

template <class Formula, class T>
__global__ void __launch_bounds__(kThreads)
    pointwise_elements(PointwiseWork<Compute<T>> work, const double* divisor, double* partials) {
  using A = Compute<T>;
  constexpr int n = Pack<T>::size;
  const double by = divisor == nullptr ? 1 : *divisor;
  const A factor_of_slopes = static_cast<A>(1 / by);
  double sum = 0;
  const auto threads = std::int64_t(gridDim.x) * kThreads, packs = (work.count + n - 1) / n;
  for (auto p = std::int64_t(blockIdx.x) * kThreads + threadIdx.x; p < packs; p += threads) {
    const auto first = p * n;
    const int count = static_cast<int>(min(std::int64_t(n), work.count - first));
    A factors[n];
    // A divisor of 0 gives 0.
    const unsigned kept = by == 0 ? 0 : load_keep(work, first, count, factors);
    A losses[n] = {}, slopes[n] = {}, other_slopes[n] = {};
    if (kept != 0) {
      A input[n], target[n], other[n];
      load_elements<T>(work.input, first, count, input);
      load_elements<T>(work.target, first, count, target);
      if (work.other.data != nullptr) load_elements<T>(work.other, first, count, other);
      const auto multiply = [&](const Operand& operand) {
        if (operand.data == nullptr) return;
        A values[n];
        load_elements<A>(operand, first, count, values);
#pragma unroll
        for (int j = 0; j < n; ++j) factors[j] *= values[j];
      };
      multiply(work.weight);
      multiply(work.coefficient);
#pragma unroll
      for (int j = 0; j < n; ++j) {
        if ((kept >> j & 1) == 0) continue;
        const auto terms = Formula::template at<DeviceMath<A>>(
            input[j], target[j], work.other.data == nullptr ? A(Formula::safe_other) : other[j], work.numbers);
        losses[j] = terms.value * factors[j];
        slopes[j] = terms.input * (factors[j] * factor_of_slopes);
        other_slopes[j] = terms.other * (factors[j] * factor_of_slopes);
        sum += static_cast<double>(losses[j]);
      }
    }
    if (work.loss != nullptr) {
#pragma unroll
      for (int j = 0; j < n; ++j) {
        if (j < count) work.loss[first + j] = losses[j];
      }
    }
    const auto store = [&](void* gradient, const A(&values)[n]) {
      if (gradient == nullptr) return;
      T* to = static_cast<T*>(gradient) + first;
      Pack<T> pack;
#pragma unroll
      for (int j = 0; j < n; ++j) pack.values[j] = narrow<T>(values[j]);
      if (count == n && is_aligned(to)) return store_streaming(to, pack);
#pragma unroll
      for (int j = 0; j < n; ++j) {
        if (j < count) to[j] = pack.values[j];
      }
    };
    store(work.gradient, slopes);
    if constexpr (Formula::has_other_slope) store(work.other_gradient, other_slopes);
  }
  if (partials == nullptr) return;
  sum = reduce_block(sum, WarpSum{});
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

template <class A>
__global__ void __launch_bounds__(kThreads)
    finish_sum(const double* partials, int count, const double* divisor, A* result) {
  double sum = 0;
  for (int i = threadIdx.x; i < count; i += kThreads) sum += partials[i];
  sum = reduce_block(sum, WarpSum{});
  if (threadIdx.x != 0) return;
  const double by = divisor == nullptr ? 1 : *divisor;
  *result = by == 0 ? A(0) : static_cast<A>(sum / by);
}

std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

unsigned blocks_for(std::int64_t threads) {
  return static_cast<unsigned>(std::max<std::int64_t>(1, std::min(divide_up(threads, kThreads), kPointwiseBlocks)));
}

template <class T, class A, int index = 0>
void launch_formula(int formula, const PointwiseWork<A>& work, const double* divisor, double* partials, unsigned blocks,
                    cudaStream_t stream) {
  if constexpr (index < int(kPointwiseFormulas)) {
    if (formula != index) return launch_formula<T, A, index + 1>(formula, work, divisor, partials, blocks, stream);
    using Formula = std::tuple_element_t<index, PointwiseFormulas>;
    launch(pointwise_elements<Formula, T>, {blocks, kThreads}, stream, work, divisor, partials);
  }
}

}  // namespace

template <class A>
void weigh_elements(const PointwiseWork<A>& work, std::int64_t sequences, double times, PointwiseSum* sums,
                    cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(std::min(sequences, kPointwiseBlocks));
  launch(weigh_parts<A>, {blocks, kThreads}, stream, work, sequences, divide_up(work.count, sequences), times, sums);
}

template <class A>
void sum_elements(const PointwiseSum* sums, std::int64_t count, bool counts_sequences, const double* normalizer,
                  double* divisor, A* shares, cudaStream_t stream) {
  launch(find_divisor<A>, {1, kThreads}, stream, sums, count, counts_sequences, normalizer, divisor, shares);
}

template <class T, class A>
void run_pointwise(int formula, const PointwiseWork<A>& work, const double* divisor, double* partials, A* sum,
                   cudaStream_t stream) {
  const auto blocks = blocks_for(divide_up(work.count, Pack<T>::size));
  launch_formula<T>(formula, work, divisor, sum == nullptr ? nullptr : partials, blocks, stream);
  if (sum != nullptr) {
    launch(finish_sum<A>, {1, kThreads}, stream, static_cast<const double*>(partials), int(blocks), divisor, sum);
  }
}

#define INSTANTIATE(A)                                                                                      \
  template void weigh_elements(const PointwiseWork<A>&, std::int64_t, double, PointwiseSum*, cudaStream_t); \
  template void sum_elements(const PointwiseSum*, std::int64_t, bool, const double*, double*, A*, cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE
template void run_pointwise<float>(int, const PointwiseWork<float>&, const double*, double*, float*, cudaStream_t);
template void run_pointwise<__nv_bfloat16>(int, const PointwiseWork<float>&, const double*, double*, float*,
                                           cudaStream_t);
template void run_pointwise<__half>(int, const PointwiseWork<float>&, const double*, double*, float*, cudaStream_t);
template void run_pointwise<double>(int, const PointwiseWork<double>&, const double*, double*, double*, cudaStream_t);

}  // namespace masked_loss::cuda
