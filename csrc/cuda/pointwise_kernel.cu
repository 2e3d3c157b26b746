#include "cuda/pointwise_kernel.h"

#include <algorithm>

#include "cuda/elements.cuh"

namespace masked_loss::cuda {
namespace {

constexpr int kThreads = 256;

// Packs that a thread has under way, their masks and operands at once: none of them waits for another.
template <class Formula, class T>
constexpr int kPacks = sizeof(T) == 8                           ? 1
                       : sizeof(T) == 2 || Formula::takes_other ? 2
                                                                : 4;

// Blocks of a multiprocessor: without a bound the compiler spreads packs over more registers than it takes, with more
// of them those of float spill.
template <class T>
constexpr int kResident = sizeof(T) == 4 ? 2 : 3;

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
  // Within 2 units in the last place, without a branch. The polynomial was fitted to log(1 + x) / x from 0 to 1.
  __device__ __forceinline__ static A log1p_of_fraction(A x) {
    if constexpr (std::is_same_v<A, float>) {
      constexpr float fitted[] = {-0.0032440233f, 0.0198514536f, -0.0569595173f, 0.106036536f,  -0.153055921f,
                                  0.196759388f,   -0.249541342f, 0.333299637f,   -0.499999017f, 1.0f};
      float sum = fitted[0];
#pragma unroll
      for (int i = 1; i < 10; ++i) sum = x * sum + fitted[i];
      return x * sum;
    } else {
      return log1p(x);
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
  bool contiguous;  // input, target, other and mask
};

template <class A>
struct Counted {
  Sum<A> sum;
  std::int64_t kept = 0;
};

struct Merge {
  template <class A>
  __device__ __forceinline__ Sum<A> operator()(const Sum<A>& a, const Sum<A>& b) const {
    return a + b;
  }
  template <class A>
  __device__ __forceinline__ Counted<A> operator()(const Counted<A>& a, const Counted<A>& b) const {
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
                                             Kept<n>& kept) {
#pragma unroll
  for (A& factor : factors) factor = 1;
#pragma unroll 1
  for (int f = 0; f < work.factor_count; ++f) {
    A values[n];
    load_elements<A, n>(work.factors[f], first, count).get(values);
#pragma unroll
    for (int j = 0; j < n; ++j) {
      if (f < work.dropping && values[j] == 0) kept.drop(j);
      factors[j] *= values[j];
    }
  }
}

// Of the elements from `begin` to `end` that fall to this one of `lanes` threads.
template <class A>
__device__ Counted<A> weigh(const Elements<A>& work, std::int64_t begin, std::int64_t end, int lane, int lanes) {
  Counted<A> weight;
  if (work.factor_count == 0) {
    constexpr int n = 16;
    for (auto i = begin + lane * n; i < end; i += lanes * n) {
      const int count = static_cast<int>(min(std::int64_t(n), end - i));
      weight.kept += load_kept<n, true>(work.mask, i, count).count();
    }
    return weight;
  }
  constexpr int n = Pack<A>::size;
  for (auto i = begin + lane * n; i < end; i += lanes * n) {
    const int count = static_cast<int>(min(std::int64_t(n), end - i));
    auto kept = load_kept<n, true>(work.mask, i, count);
    if (!kept.any()) continue;
    A factors[n], sum = 0;
    load_factors(work, i, count, factors, kept);
#pragma unroll
    for (int j = 0; j < n; ++j) sum += kept[j] ? factors[j] : A(0);
    weight.sum.add(sum);
    weight.kept += kept.count();
  }
  return weight;
}

template <class A>
__device__ __forceinline__ PointwiseSum sum_of(const Elements<A>& work, const Counted<A>& weight, double times) {
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
    Counted<A> weight;
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
      for (int i = threadIdx.x % 32; i < split; i += 32) sum = sum + weighing.parts[s * split + i];
      sum = WarpSum{}(sum);
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

template <class A>
__device__ __forceinline__ void give_total(const PointwiseTotal<A>& total, const PointwiseSum& sum) {
  const double by = total.by_kept ? double(sum.kept) : total.divisor == nullptr ? 1 : total.divisor->value;
  *total.result = static_cast<A>(by == 0 ? 0 : sum.weight / by);
}

// A pack of each operand.
template <class T, int n>
struct Operands {
  Kept<n> kept;
  Group<T, n> input, target, other;
};

// A block a chunk of so many packs. `slopes`: gradients are wanted.
template <class Formula, class T, bool slopes>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    pointwise_elements(Elements<Accumulation<T>> work, std::int64_t chunk, PointwiseTotal<Accumulation<T>> total) {
  using A = Accumulation<T>;
  constexpr int n = Pack<T>::size, packs = kPacks<Formula, T>;
  constexpr auto step = std::int64_t(kThreads) * n, tile = packs * step;
  const bool has_other = Formula::takes_other && work.other.data != nullptr;
  const bool dropped = total.divisor != nullptr && total.divisor->value == 0;  // a divisor of 0 gives 0
  const A slope_factor = total.divisor == nullptr ? A(1) : static_cast<A>(total.divisor->reciprocal);
  const auto begin = blockIdx.x * chunk * n, end = min(begin + chunk * n, work.count);
  Counted<A> counted;
  for (auto at = begin; at < end; at += tile) {
    const auto first_of = [&](int k) { return at + threadIdx.x * n + k * step; };
    const auto count_of = [&](int k) {
      return static_cast<int>(max(std::int64_t(0), min(std::int64_t(n), end - first_of(k))));
    };
    Operands<T, n> operands[packs];
    if (work.contiguous && at + tile <= end) {
#pragma unroll
      for (int k = 0; k < packs; ++k) {
        operands[k].kept = load_contiguous_kept<n>(work.mask, first_of(k));
        operands[k].input = load_contiguous<T, n>(work.input, first_of(k));
        operands[k].target = load_contiguous<T, n>(work.target, first_of(k));
        if (has_other) operands[k].other = load_contiguous<T, n>(work.other, first_of(k));
      }
    } else {
#pragma unroll
      for (int k = 0; k < packs; ++k) operands[k].kept = load_kept<n>(work.mask, first_of(k), count_of(k));
#pragma unroll
      for (int k = 0; k < packs; ++k) {
        // A mask that is repeated has come from a cache, and says the same of many packs.
        if (count_of(k) == 0 || (work.mask.repeats && !operands[k].kept.any())) continue;
        operands[k].input = load_elements<T, n>(work.input, first_of(k), count_of(k));
        operands[k].target = load_elements<T, n>(work.target, first_of(k), count_of(k));
        if (has_other) operands[k].other = load_elements<T, n>(work.other, first_of(k), count_of(k));
      }
    }
#pragma unroll
    for (int k = 0; k < packs; ++k) {
      const auto first = first_of(k);
      const int count = count_of(k);
      auto& kept = operands[k].kept;
      if (dropped) kept = Kept<n>::first(0);
      A factors[n], sum = 0, losses[n], input_slopes[n], other_slopes[n];
      load_factors(work, first, count, factors, kept);
      T input[n], target[n], other[n];
      operands[k].input.get(input);
      operands[k].target.get(target);
      operands[k].other.get(other);
#pragma unroll
      for (int j = 0; j < n; ++j) {
        const auto terms = Formula::template at<DeviceMath<A>>(
            widen(input[j]), widen(target[j]), has_other ? widen(other[j]) : A(Formula::safe_other), work.numbers);
        // Chosen, not multiplied: what is not kept may be anything.
        losses[j] = kept[j] ? terms.value * factors[j] : A(0);
        sum += losses[j];
        if constexpr (slopes) {
          input_slopes[j] = kept[j] ? terms.input * (factors[j] * slope_factor) : A(0);
          other_slopes[j] = kept[j] ? terms.other * (factors[j] * slope_factor) : A(0);
        }
      }
      counted.sum.add(sum);
      if (total.by_kept) counted.kept += kept.count();
      if (count == 0) continue;
      if (work.loss != nullptr) store_elements(work.loss + first, count, losses);
      if constexpr (slopes) {
        store_elements(static_cast<T*>(work.gradient) + first, count, input_slopes);
        if (Formula::has_other_slope && work.other_gradient != nullptr) {
          store_elements(static_cast<T*>(work.other_gradient) + first, count, other_slopes);
        }
      }
    }
  }
  if (total.result == nullptr) return;
  counted = reduce_block(counted, WarpMerge{});
  if (threadIdx.x != 0) return;
  const PointwiseSum sum{counted.sum.value(), counted.kept};
  if (gridDim.x == 1) {
    give_total(total, sum);
  } else {
    total.partials[blockIdx.x] = sum;
  }
}

template <class A>
__global__ void __launch_bounds__(kThreads) finish_sum(PointwiseTotal<A> total, int count) {
  PointwiseSum sum;
  for (int i = threadIdx.x; i < count; i += kThreads) sum = sum + total.partials[i];
  sum = reduce_block(sum, WarpSum{});
  if (threadIdx.x == 0) give_total(total, sum);
}

template <class A>
Elements<A> elements_of(const PointwiseWork<A>& work) {
  Elements<A> elements{work.count,
                       strided(work.input),
                       strided(work.target),
                       strided(work.other),
                       strided(work.mask),
                       {},
                       0,
                       0,
                       {},
                       work.loss,
                       work.gradient,
                       work.other_gradient,
                       true};
  for (const auto* operand : {&elements.input, &elements.target, &elements.other, &elements.mask}) {
    elements.contiguous &= operand->contiguous;
  }
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

template <class T, class A, int index>
void run_pointwise(int formula, const PointwiseWork<A>& of, const PointwiseTotal<A>& to, cudaStream_t stream) {
  if constexpr (index < int(kPointwiseFormulas)) {
    if (formula != index) return run_pointwise<T, A, index + 1>(formula, of, to, stream);
    using Formula = std::tuple_element_t<index, PointwiseFormulas>;
    constexpr std::int64_t tile = kThreads * kPacks<Formula, T>;
    const auto packs = divide_up(of.count, Pack<T>::size);
    const auto chunk = std::max<std::int64_t>(1, divide_up(packs, kMaxChunks * tile)) * tile;
    const auto blocks = static_cast<unsigned>(std::max<std::int64_t>(1, divide_up(packs, chunk)));
    const auto kernel =
        of.gradient == nullptr ? pointwise_elements<Formula, T, false> : pointwise_elements<Formula, T, true>;
    launch(kernel, {blocks, kThreads}, stream, elements_of(of), chunk, to);
    if (to.result != nullptr && blocks > 1) launch(finish_sum<A>, {1, kThreads}, stream, to, int(blocks));
  }
}

#define INSTANTIATE(A) template void find_divisor(const PointwiseWork<A>&, const Weighing<A>&, cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

#define INSTANTIATE(T, A) \
  template void run_pointwise<T>(int, const PointwiseWork<A>&, const PointwiseTotal<A>&, cudaStream_t);
MASKED_LOSS_EACH_DTYPE(INSTANTIATE)
#undef INSTANTIATE

}  // namespace masked_loss::cuda
