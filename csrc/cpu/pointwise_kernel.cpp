// Compiled once for every instruction set: whatever is not in an anonymous namespace or always inline could end up as
// one copy for all of them.
#include "cpu/pointwise_kernel.h"

#include <cstring>

#include "cpu/vectors.h"

namespace masked_loss::cpu::CPU_CAPABILITY {
namespace {

constexpr std::int64_t kBlock =
    1024;  // elements that are visited together: what is staged of them stays in the L1 cache

template <class A>
struct VectorMath {
  using V = Vectorized<A>;
  static V abs(V x) { return x.abs(); }
  static V exp(V x) { return x.exp(); }
  static V exp_of_negative(V x) { return CPU_CAPABILITY::exp_of_negative(x); }
  static V log(V x) { return x.log(); }
  static V log1p(V x) { return x.log1p(); }
  static V pow(V x, V y) { return x.pow(y); }
  static V less(V a, V b) { return a < b; }
  static V equal(V a, V b) { return a == b; }
  static V where(V condition, V a, V b) { return V::blendv(b, a, condition); }
};

template <class A, class T>
void convert(const T* from, std::int64_t n, A* to) {
  if constexpr (std::is_same_v<A, float> && sizeof(T) == 2) {
    std::int64_t i = 0;
    for (; i + Vectorized<T>::size() <= n; i += Vectorized<T>::size()) {
      const auto [low, high] = at::vec::convert_to_float<T>(Vectorized<T>::loadu(from + i));
      low.store(to + i);
      high.store(to + i + Vectorized<float>::size());
    }
    for (; i < n; ++i) to[i] = static_cast<A>(from[i]);
  } else {
    for (std::int64_t i = 0; i < n; ++i) to[i] = static_cast<A>(from[i]);
  }
}

// Elements [begin, begin + n) of an operand as A: where they lie, or in `stage`.
template <class T, class A>
const A* load_as(const Operand& operand, std::int64_t begin, std::int64_t n, A* stage) {
  const auto& at = operand.at;
  const T* data = static_cast<const T*>(operand.data);
  const std::int64_t line = at.dims == 0 ? 1 : at.sizes[at.dims - 1],
                     stride = at.dims == 0 ? 0 : at.strides[0][at.dims - 1];
  if (at.dims <= 1 && stride == 1) {
    if constexpr (std::is_same_v<T, A>) return data + begin;
    convert(data + begin, n, stage);
    return stage;
  }
  for (std::int64_t done = 0; done < n;) {
    const auto element = begin + done;
    const auto in_line = at.dims <= 1 ? element : element % line;
    const auto count = at.dims == 0 ? n : std::min(n - done, line - in_line);
    const T* from = data + at.offsets(element)[0];
    A* to = stage + done;
    if (stride == 1) {
      convert(from, count, to);
    } else if (stride == 0) {
      std::fill(to, to + count, static_cast<A>(*from));
    } else {
      for (std::int64_t i = 0; i < count; ++i) to[i] = static_cast<A>(from[i * stride]);
    }
    done += count;
  }
  return stage;
}

template <class A>
const A* load(const Operand& operand, std::int64_t begin, std::int64_t n, A* stage) {
  if (operand.data == nullptr) return nullptr;
  switch (operand.type) {
    case ElementType::Float: return load_as<float>(operand, begin, n, stage);
    case ElementType::Double: return load_as<double>(operand, begin, n, stage);
    case ElementType::BFloat16: return load_as<at::BFloat16>(operand, begin, n, stage);
    case ElementType::Half: return load_as<at::Half>(operand, begin, n, stage);
    case ElementType::Byte: return load_as<std::uint8_t>(operand, begin, n, stage);
  }
  return nullptr;
}

bool any_byte(const std::uint8_t* bytes, std::int64_t n) {
  std::int64_t i = 0;
  std::uint64_t any = 0;
  for (; i + 8 <= n; i += 8) {
    std::uint64_t word;
    std::memcpy(&word, bytes + i, 8);
    any |= word;
  }
  for (; i < n; ++i) any |= bytes[i];
  return any != 0;
}

template <class A>
struct Stage {
  alignas(64) A input[kBlock], target[kBlock], other[kBlock], keep[kBlock], weight[kBlock], coefficient[kBlock];
  alignas(64) A gradient[kBlock], other_gradient[kBlock];
  alignas(64) std::uint8_t mask[kBlock];
};

// The sample weights of what is kept, and 0 where it is not; null where all of it is kept, with a weight of 1. `any`:
// whether anything is.
template <class A>
const A* load_keep(const PointwiseWork<A>& work, std::int64_t begin, std::int64_t n, Stage<A>& stage, bool& any) {
  any = true;
  const auto* mask = load(work.mask, begin, n, stage.mask);
  if (mask != nullptr && !any_byte(mask, n)) {
    any = false;
    return nullptr;
  }
  const A* keep = load(work.sample_weight, begin, n, stage.keep);
  const A* share = load(work.share, begin, n, stage.weight);
  if (mask == nullptr && share == nullptr) return keep;
  // Chosen, not multiplied: what lies where the mask drops may be anything.
  const auto each = [&](const auto& value) {
    for (std::int64_t i = 0; i < n; ++i) stage.keep[i] = mask == nullptr || mask[i] != 0 ? value(i) : A(0);
    return stage.keep;
  };
  if (share == nullptr)
    return keep == nullptr ? each([](auto) { return A(1); }) : each([&](auto i) { return keep[i]; });
  if (keep == nullptr) return each([&](auto i) { return share[i]; });
  return each([&](auto i) { return keep[i] == 0 || share[i] == 0 ? A(0) : keep[i] * share[i]; });
}

template <class T, class A>
void store_as(const A* from, std::int64_t n, T* to) {
  if constexpr (std::is_same_v<T, A>) {
    std::int64_t i = 0;
    const bool streams = reinterpret_cast<std::uintptr_t>(to) % 64 == 0;
    if (streams) {
      for (; i + Vectorized<A>::size() <= n; i += Vectorized<A>::size()) {
        store<true>(Vectorized<A>::loadu(from + i), to + i);
      }
    }
    std::copy(from + i, from + n, to + i);
  } else {
    using V = Vectorized<A>;
    std::int64_t i = 0;
    for (; i + 2 * V::size() <= n; i += 2 * V::size()) {
      at::vec::convert_from_float<T>(V::loadu(from + i), V::loadu(from + i + V::size())).store(to + i);
    }
    for (; i < n; ++i) to[i] = static_cast<T>(from[i]);
  }
}

template <class A>
void store_gradient(void* gradient, ElementType type, std::int64_t begin, std::int64_t n, const A* from) {
  if (gradient == nullptr) return;
  if constexpr (std::is_same_v<A, double>) {
    store_as(from, n, static_cast<double*>(gradient) + begin);
  } else if (type == ElementType::Float) {
    store_as(from, n, static_cast<float*>(gradient) + begin);
  } else if (type == ElementType::BFloat16) {
    store_as(from, n, static_cast<at::BFloat16*>(gradient) + begin);
  } else {
    store_as(from, n, static_cast<at::Half*>(gradient) + begin);
  }
}

// What a formula reads and writes of a block.
template <class A>
struct Block {
  const A *input, *target, *other, *keep, *weight, *coefficient;
  A *loss, *gradient, *other_gradient;
};

// The sum of the losses of n elements, at most a vector.
template <class Formula, class A, bool whole>
Vectorized<A> visit(const Block<A>& block, const double* numbers, A factor_of_slopes, std::int64_t i, std::int64_t n) {
  using V = Vectorized<A>;
  const auto get = [&](const A* from, A otherwise) {
    if (from == nullptr) return V(otherwise);
    if constexpr (whole) return V::loadu(from + i);
    return V::loadu(from + i, n);
  };
  const auto put = [&](V value, A* to) {
    if constexpr (whole) {
      value.store(to + i);
    } else {
      value.store(to + i, n);
    }
  };
  auto terms = Formula::template at<VectorMath<A>>(get(block.input, 0), get(block.target, 0),
                                                   get(block.other, A(Formula::safe_other)), numbers);
  V factor(1);
  if (block.weight != nullptr) factor = get(block.weight, 1);
  if (block.coefficient != nullptr) factor = factor * get(block.coefficient, 1);
  const V keep = get(block.keep, 1), masked = keep == V(0);
  if (block.keep != nullptr) factor = factor * keep;
  const auto finish = [&](V value, V by) {
    const V result = value * by;
    return block.keep == nullptr ? result : V::blendv(result, V(0), masked);
  };
  V loss = finish(terms.value, factor);
  if constexpr (!whole) loss = V::set(V(0), loss, n);
  if (block.loss != nullptr) put(loss, block.loss);
  const V slope_factor = factor * V(factor_of_slopes);
  if (block.gradient != nullptr) put(finish(terms.input, slope_factor), block.gradient);
  if constexpr (Formula::has_other_slope) {
    if (block.other_gradient != nullptr) put(finish(terms.other, slope_factor), block.other_gradient);
  }
  return loss;
}

template <class Formula, class A>
double run(const PointwiseWork<A>& work, A factor, std::int64_t begin, std::int64_t end) {
  using V = Vectorized<A>;
  Stage<A> stage;
  double total = 0;
  const auto type = work.input.type;
  for (; begin < end; begin += kBlock) {
    const auto n = std::min(kBlock, end - begin);
    bool any;
    const A* keep = load_keep(work, begin, n, stage, any);
    if (!any) {
      if (work.loss != nullptr) std::fill(work.loss + begin, work.loss + begin + n, A(0));
      if (work.gradient != nullptr || work.other_gradient != nullptr)
        std::fill(stage.gradient, stage.gradient + n, A(0));
      store_gradient(work.gradient, type, begin, n, stage.gradient);
      store_gradient(work.other_gradient, type, begin, n, stage.gradient);
      continue;
    }
    const Block<A> block{load(work.input, begin, n, stage.input),
                         load(work.target, begin, n, stage.target),
                         load(work.other, begin, n, stage.other),
                         keep,
                         load(work.weight, begin, n, stage.weight),
                         load(work.coefficient, begin, n, stage.coefficient),
                         work.loss == nullptr ? nullptr : work.loss + begin,
                         work.gradient == nullptr ? nullptr : stage.gradient,
                         work.other_gradient == nullptr ? nullptr : stage.other_gradient};
    V sum(0);
    std::int64_t i = 0;
    for (; i + V::size() <= n; i += V::size())
      sum = sum + visit<Formula, A, true>(block, work.numbers, factor, i, V::size());
    if (i < n) sum = sum + visit<Formula, A, false>(block, work.numbers, factor, i, n - i);
    total += sum_lanes(sum);
    store_gradient(work.gradient, type, begin, n, stage.gradient);
    store_gradient(work.other_gradient, type, begin, n, stage.other_gradient);
  }
  finish_stores();
  return total;
}

template <class A>
PointwiseSum weigh(const PointwiseWork<A>& work, std::int64_t begin, std::int64_t end) {
  Stage<A> stage;
  PointwiseSum sum;
  for (; begin < end; begin += kBlock) {
    const auto n = std::min(kBlock, end - begin);
    if (work.sample_weight.data == nullptr && work.weight.data == nullptr) {
      const auto* mask = load(work.mask, begin, n, stage.mask);
      std::int64_t kept = 0;
      for (std::int64_t i = 0; i < n; ++i) kept += mask == nullptr || mask[i] != 0;
      sum.kept += kept;
      sum.weight += static_cast<double>(kept);
      continue;
    }
    bool any;
    const A* keep = load_keep(work, begin, n, stage, any);
    if (!any) continue;
    const A* weight = load(work.weight, begin, n, stage.weight);
    double lanes[8] = {};
    for (std::int64_t i = 0; i < n; ++i) {
      const A k = keep == nullptr ? A(1) : keep[i];
      if (k == 0) continue;
      ++sum.kept;
      lanes[i % 8] += double(weight == nullptr ? k : k * weight[i]);
    }
    sum.weight += ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
  }
  return sum;
}

template <class A>
std::int64_t find_unfit(const PointwiseWork<A>& work, bool (*fits)(double, double), std::int64_t begin,
                        std::int64_t end) {
  Stage<A> stage;
  for (; begin < end; begin += kBlock) {
    const auto n = std::min(kBlock, end - begin);
    bool any;
    const A* keep = load_keep(work, begin, n, stage, any);
    if (!any) continue;
    const A* input = load(work.input, begin, n, stage.input);
    const A* other = load(work.other, begin, n, stage.other);
    for (std::int64_t i = 0; i < n; ++i) {
      if (keep != nullptr && keep[i] == 0) continue;
      if (!fits(input[i], other == nullptr ? 0 : other[i])) return begin + i;
    }
  }
  return end;
}

template <class A, class... Formula>
constexpr PointwiseKernelsOf<A> kernels_of(std::tuple<Formula...>*) {
  return {{{run<Formula, A>}...}, weigh<A>, find_unfit<A>};
}

}  // namespace

const PointwiseKernels& pointwise_kernels() {
  static constexpr PointwiseFormulas* formulas = nullptr;
  static constexpr PointwiseKernels kernels{kernels_of<float>(formulas), kernels_of<double>(formulas)};
  return kernels;
}

}  // namespace masked_loss::cpu::CPU_CAPABILITY
