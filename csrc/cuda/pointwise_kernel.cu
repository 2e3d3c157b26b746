#include "cuda/pointwise_kernel.h"

#include <algorithm>

#include "cuda/elements.cuh"

namespace masked_loss::cuda {
namespace {

constexpr int kThreads = 256;

// Packs that a thread has under way: their masks are all read before the operands of any.
template <class T>
constexpr int kPacks = sizeof(T) == 8 ? 1 : 2;

template <class A>
struct DeviceMath : ScalarMath<A> {
  __device__ __forceinline__ static A exp_of_negative(A x) { return fast_exp(x); }
  __device__ __forceinline__ static A reciprocal(A x) {
    if constexpr (std::is_same_v<A, float>) {
      return __fdividef(1.0f, x);
    } else {
      return 1 / x;
    }
  }
  // Of x from 0 to 1: pow itself spills registers.
  __device__ __forceinline__ static A pow(A x, A y) { return y == 0 ? A(1) : std::exp2(y * std::log2(x)); }
};

// Operands as kernels are given them.
template <class A>
struct Elements {
  std::int64_t count;
  Strided input, target, other, mask;
  Strided factors[4];  // of the losses, in A; what one of the first `dropping` is 0 for is not kept
  int factor_count, dropping;
  double numbers[kPointwiseNumbers];
  A* loss;
  void* gradient;
  void* other_gradient;
};

template <class A>
struct Weight {
  Sum<A> sum;
  std::int64_t kept = 0;
};

struct Merge {
  template <class A>
  __device__ __forceinline__ Sum<A> operator()(const Sum<A>& a, const Sum<A>& b) const {
    return a + b;
  }
  template <class A>
  __device__ __forceinline__ Weight<A> operator()(const Weight<A>& a, const Weight<A>& b) const {
    return {a.sum + b.sum, a.kept + b.kept};
  }
};
struct WarpMerge {
  template <class V>
  __device__ __forceinline__ V operator()(const V& value) const {
    return reduce_lanes(value, 32, Merge{});
  }
};

// What losses are multiplied with; drops what has a weight of 0 from `kept`.
template <class A, int n>
__device__ __forceinline__ void load_factors(const Elements<A>& work, std::int64_t first, int count, A (&factors)[n],
                                             unsigned& kept) {
#pragma unroll
  for (A& factor : factors) factor = 1;
#pragma unroll 1
  for (int f = 0; f < work.factor_count; ++f) {
    A values[n];
    load_elements<A, n>(work.factors[f], first, count).get(values);
#pragma unroll
    for (int j = 0; j < n; ++j) {
      if (f < work.dropping && values[j] == 0) kept &= ~(1u << j);
      factors[j] *= values[j];
    }
  }
}

// Of the elements from `begin` to `end` that fall to this one of `lanes` threads.
template <class A>
__device__ Weight<A> weigh(const Elements<A>& work, std::int64_t begin, std::int64_t end, int lane, int lanes) {
  Weight<A> weight;
  if (work.factor_count == 0) {
    constexpr int n = 16;
    for (auto i = begin + lane * n; i < end; i += lanes * n) {
      const int count = static_cast<int>(min(std::int64_t(n), end - i));
      weight.kept += __popc(kept_of(work.mask, load_mask<n, true>(work.mask, i, count), count));
    }
    return weight;
  }
  constexpr int n = Pack<A>::size;
  for (auto i = begin + lane * n; i < end; i += lanes * n) {
    const int count = static_cast<int>(min(std::int64_t(n), end - i));
    auto kept = kept_of(work.mask, load_mask<n, true>(work.mask, i, count), count);
    if (kept == 0) continue;
    A factors[n], sum = 0;
    load_factors(work, i, count, factors, kept);
#pragma unroll
    for (int j = 0; j < n; ++j) sum += (kept >> j & 1) ? factors[j] : A(0);
    weight.sum.add(sum);
    weight.kept += __popc(kept);
  }
  return weight;
}

template <class A>
__device__ __forceinline__ PointwiseSum sum_of(const Elements<A>& work, const Weight<A>& weight, double times) {
  return {(work.factor_count == 0 ? double(weight.kept) : weight.sum.value()) * times, weight.kept};
}

template <class A>
__device__ __forceinline__ void give_share(const Weighing<A>& weighing, std::int64_t sequence, double weight) {
  if (weighing.shares != nullptr) weighing.shares[sequence] = weight == 0 ? A(0) : static_cast<A>(1 / weight);
}

template <class A>
__device__ __forceinline__ void give_divisor(const Weighing<A>& weighing, double value) {
  if (weighing.normalizer != nullptr) {
    value = *weighing.normalizer;
    if (value < 0) value = std::numeric_limits<double>::quiet_NaN();  // an error where it could be waited for
  }
  *weighing.divisor = {value, 1 / value};
}

// A block a part: gridDim.x of them make a sequence.
template <class A>
__global__ void __launch_bounds__(kThreads)
    weigh_parts(Elements<A> work, Weighing<A> weighing, std::int64_t part_length) {
  const auto first = std::int64_t(blockIdx.y) * weighing.length;
  const auto begin = first + std::int64_t(blockIdx.x) * part_length;
  const auto end = min(begin + part_length, first + weighing.length);
  const auto sum =
      sum_of(work, reduce_block(weigh(work, begin, end, threadIdx.x, kThreads), WarpMerge{}), weighing.times);
  if (threadIdx.x != 0) return;
  weighing.parts[blockIdx.y * gridDim.x + blockIdx.x] = sum;
}

// Sequences by `lanes` threads each, so many to a block, which counts those that have something kept.
template <class A>
__global__ void __launch_bounds__(kThreads)
    count_sequences(Elements<A> work, Weighing<A> weighing, std::int64_t to_a_block, int lanes) {
  const int lane = threadIdx.x % lanes, group = threadIdx.x / lanes;
  const auto begin = blockIdx.x * to_a_block, end = min(begin + to_a_block, weighing.sequences);
  std::int64_t with_kept = 0;
  for (auto base = begin; base < end; base += kThreads / lanes) {
    const auto s = base + group;
    Weight<A> weight;
    if (s < end) weight = weigh(work, s * weighing.length, (s + 1) * weighing.length, lane, lanes);
    weight = lanes == kThreads ? reduce_block(weight, WarpMerge{}) : reduce_lanes(weight, lanes, Merge{});
    if (lane != 0 || s >= end) continue;
    give_share(weighing, s, sum_of(work, weight, weighing.times).weight);
    with_kept += weight.kept > 0;
  }
  with_kept = reduce_block(with_kept, WarpSum{});
  if (threadIdx.x == 0) weighing.parts[blockIdx.x] = {0, with_kept};
}

// `split`: into how many parts each sequence; 0: the parts are of whole sequences, which they have counted.
template <class A>
__global__ void __launch_bounds__(kThreads) finish_divisor(Weighing<A> weighing, int parts, int split) {
  double total = 0;
  if (split > 0 && weighing.by_sequence) {
    for (auto s = threadIdx.x / 32; s < weighing.sequences; s += kThreads / 32) {
      PointwiseSum sum;
      for (int i = threadIdx.x % 32; i < split; i += 32) {
        const auto& part = weighing.parts[s * split + i];
        sum = {sum.weight + part.weight, sum.kept + part.kept};
      }
      sum = reduce_lanes(sum, 32, [](const PointwiseSum& a, const PointwiseSum& b) {
        return PointwiseSum{a.weight + b.weight, a.kept + b.kept};
      });
      if (threadIdx.x % 32 != 0) continue;
      give_share(weighing, s, sum.weight);
      total += sum.kept > 0;
    }
  } else {
    for (int i = threadIdx.x; i < parts; i += kThreads) {
      total += split > 0 ? weighing.parts[i].weight : double(weighing.parts[i].kept);
    }
  }
  total = reduce_block(total, WarpSum{});
  if (threadIdx.x == 0) give_divisor(weighing, total);
}

__device__ __forceinline__ double divided(double sum, const PointwiseDivisor* divisor) {
  const double by = divisor == nullptr ? 1 : divisor->value;
  return by == 0 ? 0 : sum / by;
}

// A block a chunk of so many packs.
template <class Formula, class T>
__global__ void __launch_bounds__(kThreads)
    pointwise_elements(Elements<Accumulation<T>> work, const PointwiseDivisor* divisor, std::int64_t chunk,
                       double* partials, Accumulation<T>* result) {
  using A = Accumulation<T>;
  constexpr int n = Pack<T>::size, packs = kPacks<T>;
  const bool has_other = Formula::takes_other && work.other.data != nullptr;
  const bool dropped = divisor != nullptr && divisor->value == 0;  // a divisor of 0 gives 0
  const A slope_factor = divisor == nullptr ? A(1) : static_cast<A>(divisor->reciprocal);
  const auto begin = blockIdx.x * chunk * n, end = min(begin + chunk * n, work.count);
  Sum<A> sum;
  for (auto i = begin + threadIdx.x * n; i < end; i += packs * kThreads * n) {
    const auto first_of = [&](int k) { return i + k * (kThreads * n); };
    const auto count_of = [&](int k) {
      return static_cast<int>(max(std::int64_t(0), min(std::int64_t(n), end - first_of(k))));
    };
    Group<unsigned char, n> mask[packs];
    Group<T, n> inputs[packs], targets[packs], others[packs];
    unsigned kept[packs];
#pragma unroll
    for (int k = 0; k < packs; ++k) mask[k] = load_mask<n>(work.mask, first_of(k), count_of(k));
#pragma unroll
    for (int k = 0; k < packs; ++k) {
      kept[k] = dropped ? 0 : kept_of(work.mask, mask[k], count_of(k));
      if (kept[k] == 0) continue;
      inputs[k] = load_elements<T, n>(work.input, first_of(k), count_of(k));
      targets[k] = load_elements<T, n>(work.target, first_of(k), count_of(k));
      if (has_other) others[k] = load_elements<T, n>(work.other, first_of(k), count_of(k));
    }
#pragma unroll
    for (int k = 0; k < packs; ++k) {
      const auto first = first_of(k);
      const int count = count_of(k);
      if (count == 0) continue;
      A losses[n] = {}, slopes[n] = {}, other_slopes[n] = {};
      if (kept[k] != 0) {
        A factors[n], sum_of_pack = 0;
        load_factors(work, first, count, factors, kept[k]);
        T input[n], target[n], other[n];
        inputs[k].get(input);
        targets[k].get(target);
        others[k].get(other);
#pragma unroll
        for (int j = 0; j < n; ++j) {
          const auto terms = Formula::template at<DeviceMath<A>>(
              widen(input[j]), widen(target[j]), has_other ? widen(other[j]) : A(Formula::safe_other), work.numbers);
          // Chosen, not multiplied: what is not kept may be anything.
          const bool counts = kept[k] >> j & 1;
          losses[j] = counts ? terms.value * factors[j] : A(0);
          slopes[j] = counts ? terms.input * (factors[j] * slope_factor) : A(0);
          other_slopes[j] = counts ? terms.other * (factors[j] * slope_factor) : A(0);
          sum_of_pack += losses[j];
        }
        sum.add(sum_of_pack);
      }
      if (work.loss != nullptr) store_elements(work.loss + first, count, losses);
      if (work.gradient != nullptr) store_elements(static_cast<T*>(work.gradient) + first, count, slopes);
      if constexpr (Formula::has_other_slope) {
        if (work.other_gradient != nullptr)
          store_elements(static_cast<T*>(work.other_gradient) + first, count, other_slopes);
      }
    }
  }
  if (result == nullptr) return;
  sum = reduce_block(sum, WarpMerge{});
  if (threadIdx.x != 0) return;
  if (gridDim.x == 1) {
    *result = static_cast<A>(divided(sum.value(), divisor));
  } else {
    partials[blockIdx.x] = sum.value();
  }
}

template <class A>
__global__ void __launch_bounds__(kThreads)
    finish_sum(const double* partials, int count, const PointwiseDivisor* divisor, A* result) {
  double sum = 0;
  for (int i = threadIdx.x; i < count; i += kThreads) sum += partials[i];
  sum = reduce_block(sum, WarpSum{});
  if (threadIdx.x == 0) *result = static_cast<A>(divided(sum, divisor));
}

template <class A>
Elements<A> elements_of(const PointwiseWork<A>& work) {
  Elements<A> elements{
      work.count, strided(work.input), strided(work.target), strided(work.other), strided(work.mask), {}, 0, 0,
      {},         work.loss,           work.gradient,        work.other_gradient};
  std::copy(std::begin(work.numbers), std::end(work.numbers), elements.numbers);
  const auto add = [&](const Operand& factor) {
    if (factor.data != nullptr) elements.factors[elements.factor_count++] = strided(factor);
  };
  add(work.sample_weight);
  add(work.share);
  elements.dropping = elements.factor_count;
  add(work.weight);
  add(work.coefficient);
  return elements;
}

template <class T, class A, int index = 0>
void launch_formula(int formula, const Elements<A>& work, const PointwiseDivisor* divisor, std::int64_t chunk,
                    unsigned blocks, double* partials, A* result, cudaStream_t stream) {
  if constexpr (index < int(kPointwiseFormulas)) {
    if (formula != index) {
      return launch_formula<T, A, index + 1>(formula, work, divisor, chunk, blocks, partials, result, stream);
    }
    using Formula = std::tuple_element_t<index, PointwiseFormulas>;
    launch(pointwise_elements<Formula, T>, {blocks, kThreads}, stream, work, divisor, chunk, partials, result);
  }
}

constexpr std::int64_t kPartLength = 1 << 14;  // elements that are worth a block

}  // namespace

template <class A>
void find_divisor(const PointwiseWork<A>& of, const Weighing<A>& weighing, cudaStream_t stream) {
  const auto work = elements_of(of);
  const auto sequences = weighing.sequences, length = weighing.length;
  int parts = 0, split = 0;
  if (sequences > 0 && (sequences == 1 || (length > 2 * kPartLength && sequences < kMaxParts))) {
    split = static_cast<int>(std::clamp<std::int64_t>(kMaxParts / sequences, 1, divide_up(length, kPartLength)));
    parts = split * static_cast<int>(sequences);
    const auto part_length = divide_up(divide_up(length, split), 16) * 16;  // of aligned loads of the mask
    launch(weigh_parts<A>, {{unsigned(split), unsigned(sequences)}, kThreads}, stream, work, weighing, part_length);
  } else if (sequences > 0) {
    int lanes = 1;
    while (lanes < 32 && lanes * 16 < length) lanes *= 2;
    if (length > 32 * 64) lanes = kThreads;
    const auto to_a_block = divide_up(sequences, std::min(kMaxParts, divide_up(sequences, kThreads / lanes)));
    parts = static_cast<int>(divide_up(sequences, to_a_block));
    launch(count_sequences<A>, {unsigned(parts), kThreads}, stream, work, weighing, to_a_block, lanes);
  }
  launch(finish_divisor<A>, {1, kThreads}, stream, weighing, parts, split);
}

template <class T, class A>
void run_pointwise(int formula, const PointwiseWork<A>& work, const PointwiseDivisor* divisor, double* partials, A* sum,
                   cudaStream_t stream) {
  constexpr std::int64_t tile = kThreads * kPacks<T>;
  const auto packs = divide_up(work.count, Pack<T>::size);
  const auto chunk = std::max<std::int64_t>(1, divide_up(packs, kMaxChunks * tile)) * tile;
  const auto blocks = static_cast<unsigned>(std::max<std::int64_t>(1, divide_up(packs, chunk)));
  launch_formula<T>(formula, elements_of(work), divisor, chunk, blocks, partials, sum, stream);
  if (sum != nullptr && blocks > 1) {
    launch(finish_sum<A>, {1, kThreads}, stream, static_cast<const double*>(partials), int(blocks), divisor, sum);
  }
}

#define INSTANTIATE(A) template void find_divisor(const PointwiseWork<A>&, const Weighing<A>&, cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

#define INSTANTIATE(T, A) \
  template void run_pointwise<T>(int, const PointwiseWork<A>&, const PointwiseDivisor*, double*, A*, cudaStream_t);
MASKED_LOSS_EACH_DTYPE(INSTANTIATE)
#undef INSTANTIATE

}  // namespace masked_loss::cuda
