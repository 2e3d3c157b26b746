// Compiled once for every instruction set: whatever is not in an anonymous namespace or always inline could end up as
// one copy for all of them.
#include "cpu/pointwise_kernel.h"

#include "cpu/blocks.h"
#include "cpu/vector_math.h"

namespace masked_loss::cpu::CPU_CAPABILITY {
namespace {

constexpr std::int64_t kBlock = 1024;  // elements that are visited together; what is staged stays in the L1 cache

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

template <class A>
struct Stage {
  alignas(64) A input[kBlock], target[kBlock], other[kBlock];
  alignas(64) A weight[kBlock], coefficient[kBlock], factor[kBlock];
  alignas(64) A gradient[kBlock], other_gradient[kBlock];
  alignas(64) std::uint8_t mask[kBlock], kept[kBlock];
};

// What of a block counts, and how much.
template <class A>
struct Counted {
  std::int64_t elements;     // that are kept
  const std::uint8_t* kept;  // null: all of them
  const A* factor;           // null: 1; not to be looked at where nothing is kept
};

// A weight of 0 drops its element. Chosen, not multiplied: what lies where the mask drops may be anything.
template <class A>
void weigh_by(const A* weight, std::int64_t n, Stage<A>& stage, Counted<A>& counted) {
  if (weight == nullptr) return;
  for (std::int64_t i = 0; i < n; ++i) {
    const bool keeps = (counted.kept == nullptr || counted.kept[i] != 0) && weight[i] != 0;
    const A factor = counted.factor == nullptr ? weight[i] : weight[i] * counted.factor[i];
    stage.kept[i] = keeps;
    stage.factor[i] = factor;
  }
  counted = {count_nonzero(stage.kept, n), stage.kept, stage.factor};
}

template <class A>
void multiply_by(const A* weight, std::int64_t n, Stage<A>& stage, Counted<A>& counted) {
  if (weight == nullptr || counted.elements == 0) return;
  if (counted.factor == nullptr) {
    counted.factor = weight;
    return;
  }
  for (std::int64_t i = 0; i < n; ++i) stage.factor[i] = counted.factor[i] * weight[i];
  counted.factor = stage.factor;
}

// By mask, sample weights and the shares of sequences; the factor is the product of these two.
template <class A>
Counted<A> load_counted(const PointwiseWork<A>& work, std::int64_t begin, std::int64_t n, Stage<A>& stage) {
  Counted<A> counted{n, load(work.mask, begin, n, stage.mask), nullptr};
  if (counted.kept != nullptr) counted.elements = count_nonzero(counted.kept, n);
  for (const auto* weight : {&work.sample_weight, &work.share}) {
    if (counted.elements == 0) return counted;
    weigh_by(load<A>(*weight, begin, n, stage.weight), n, stage, counted);
  }
  return counted;
}

template <class A>
void store_gradient(const PointwiseWork<A>& work, void* gradient, std::int64_t begin, std::int64_t n, const A* from) {
  const auto store_as = [&]<class T>(T* to) {
    const auto value = [&](std::int64_t i, std::int64_t lanes) {
      return lanes == Vectorized<A>::size() ? Vectorized<A>::loadu(from + i) : Vectorized<A>::loadu(from + i, lanes);
    };
    if (work.count * static_cast<std::int64_t>(sizeof(T)) >= kPastCache) {
      store_vectors<true, A>(to + begin, n, value);
    } else {
      store_vectors<false, A>(to + begin, n, value);
    }
  };
  if (gradient == nullptr) return;
  if constexpr (std::is_same_v<A, double>) {
    store_as(static_cast<double*>(gradient));
  } else if (work.input.type == ElementType::Float) {
    store_as(static_cast<float*>(gradient));
  } else if (work.input.type == ElementType::BFloat16) {
    store_as(static_cast<at::BFloat16*>(gradient));
  } else {
    store_as(static_cast<at::Half*>(gradient));
  }
}

// What the block that begins there and the next one read of an operand, where it lies side by side.
inline auto ahead(const Operand& operand, std::int64_t begin) {
  const auto bytes = element_bytes(operand.type);
  const bool dense = operand.data != nullptr && operand.at.dims == 1 && operand.at.strides[0][0] == 1;
  const auto next = dense ? Ahead{static_cast<const char*>(operand.data) + begin * bytes, kBlock * bytes} : Ahead();
  return [=](std::int64_t i, std::int64_t n) { next.fetch_at(i * bytes, n * bytes); };
}

// Repeated for every element.
inline bool is_one_number(const Operand& operand) {
  return operand.data != nullptr && (operand.at.dims == 0 || (operand.at.dims == 1 && operand.at.strides[0][0] == 0));
}

// Whether each operand that is given lies side by side in that type.
template <class A>
bool lie_as(const PointwiseWork<A>& work, ElementType type) {
  const auto lies = [&](const Operand& operand) {
    return operand.data == nullptr || (operand.type == type && operand.at.dims == 1 && operand.at.strides[0][0] == 1);
  };
  return lies(work.input) && lies(work.target) && lies(work.other);
}

// Elements [i, i + n), a vector if `whole`.
template <class A, bool whole, class T>
C10_ALWAYS_INLINE Vectorized<A> elements(const T* from, std::int64_t i, std::int64_t n) {
  using V = Vectorized<A>;
  if constexpr (std::is_same_v<T, A>) {
    return whole ? V::loadu(from + i) : V::loadu(from + i, n);
  } else {
    T part[V::size()] = {};
    const T* begin = whole ? from + i : std::copy(from + i, from + i + n, part) - n;
    V result;
    at::vec::load_to_float<T>(begin, result);
    return result;
  }
}

// What a formula reads and writes of a block.
template <class T, class A>
struct Block {
  const T *input, *target, *other;
  Counted<A> counted;
  A *loss, *gradient, *other_gradient;
};

// What a block is visited for. Its loop has no more instructions than that takes.
enum class Visit {
  Sum,             // of the losses, without factors
  SumAndGradient,  // the same
  Any,             // whatever the block asks for
};

// The sum of the losses of n elements, at most a vector.
template <class Formula, Visit of, bool whole, class T, class A>
C10_ALWAYS_INLINE Vectorized<A> visit(const Block<T, A>& block, const double* numbers, A factor_of_slopes,
                                      std::int64_t i, std::int64_t n) {
  using V = Vectorized<A>;
  const auto get = [&](const auto* from) { return elements<A, whole>(from, i, n); };
  const auto put = [&](V value, A* to) {
    if constexpr (whole) {
      value.store(to + i);
    } else {
      value.store(to + i, n);
    }
  };
  const V other = block.other == nullptr ? V(A(Formula::safe_other)) : get(block.other);
  auto terms = Formula::template at<VectorMath<A>>(get(block.input), get(block.target), other, numbers);
  const auto* kept = block.counted.kept;
  const A* factor = of == Visit::Any ? block.counted.factor : nullptr;
  const auto keep = [&](V value) {
    return kept == nullptr ? value : select(kept + i, value, V(0), whole ? V::size() : n);
  };
  V loss = terms.value, slope_factor(factor_of_slopes);
  if (factor != nullptr) {
    loss = loss * get(factor);
    slope_factor = slope_factor * get(factor);
  }
  loss = keep(loss);
  if constexpr (!whole) loss = V::set(V(0), loss, n);
  if (of == Visit::Any && block.loss != nullptr) put(loss, block.loss);
  if (of == Visit::Sum || block.gradient == nullptr) return loss;
  put(keep(terms.input * slope_factor), block.gradient);
  if constexpr (Formula::has_other_slope) put(keep(terms.other * slope_factor), block.other_gradient);
  return loss;
}

template <class Formula, Visit of, class T, class A>
double visit_block(const PointwiseWork<A>& work, A factor, std::int64_t begin, std::int64_t n, Block<T, A> block) {
  using V = Vectorized<A>;
  const auto input = ahead(work.input, begin + kBlock), target = ahead(work.target, begin + kBlock),
             other = ahead(work.other, begin + kBlock);
  V sum(0);
  std::int64_t i = 0;
  for (; i + V::size() <= n; i += V::size()) {
    input(i, V::size());
    target(i, V::size());
    if constexpr (Formula::has_other_slope) other(i, V::size());
    sum = sum + visit<Formula, of, true>(block, work.numbers, factor, i, V::size());
  }
  if (i < n) sum = sum + visit<Formula, of, false>(block, work.numbers, factor, i, n - i);
  return sum_lanes(sum);
}

template <class Formula, class A>
double run(const PointwiseWork<A>& work, A factor, std::int64_t begin, std::int64_t end) {
  constexpr bool is_float = std::is_same_v<A, float>;
  const bool bfloat16 = is_float && lie_as(work, ElementType::BFloat16);
  const bool half = is_float && lie_as(work, ElementType::Half);
  Stage<A> stage;
  auto coefficient = work.coefficient;
  if (is_one_number(coefficient)) {
    factor *= *load<A>(coefficient, begin, 1, stage.coefficient);
    coefficient = {};
  }
  double total = 0;
  for (; begin < end; begin += kBlock) {
    const auto n = std::min(kBlock, end - begin);
    auto counted = load_counted(work, begin, n, stage);
    if (counted.elements == 0) {
      if (work.loss != nullptr) std::fill(work.loss + begin, work.loss + begin + n, A(0));
      std::fill(stage.gradient, stage.gradient + n, A(0));
      store_gradient(work, work.gradient, begin, n, stage.gradient);
      store_gradient(work, work.other_gradient, begin, n, stage.gradient);
      continue;
    }
    multiply_by(load<A>(work.weight, begin, n, stage.weight), n, stage, counted);
    multiply_by(load<A>(coefficient, begin, n, stage.coefficient), n, stage, counted);
    const auto add = [&]<Visit of, class T>(const T* input, const T* target, const T* other) {
      const Block<T, A> block{input,
                              target,
                              other,
                              counted,
                              at_or_null(work.loss, begin),
                              work.gradient == nullptr ? nullptr : stage.gradient,
                              work.other_gradient == nullptr ? nullptr : stage.other_gradient};
      total += visit_block<Formula, of>(work, factor, begin, n, block);
    };
    const auto add_plain = [&]<class T>(const T* input, const T* target, const T* other) {
      if (work.gradient == nullptr) {
        add.template operator()<Visit::Sum>(input, target, other);
      } else {
        add.template operator()<Visit::SumAndGradient>(input, target, other);
      }
    };
    const bool plain = counted.factor == nullptr && work.loss == nullptr;
    if (plain && (bfloat16 || half)) {
      const auto in_place = [&]<class T>(T*) {
        const auto from = [&](const Operand& operand) {
          return at_or_null(static_cast<const T*>(operand.data), begin);
        };
        if constexpr (is_float) add_plain(from(work.input), from(work.target), from(work.other));
      };
      bfloat16 ? in_place(static_cast<at::BFloat16*>(nullptr)) : in_place(static_cast<at::Half*>(nullptr));
    } else {
      const A *input = load<A>(work.input, begin, n, stage.input),
              *target = load<A>(work.target, begin, n, stage.target),
              *other = load<A>(work.other, begin, n, stage.other);
      plain ? add_plain(input, target, other) : add.template operator()<Visit::Any>(input, target, other);
    }
    store_gradient(work, work.gradient, begin, n, stage.gradient);
    store_gradient(work, work.other_gradient, begin, n, stage.other_gradient);
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
    auto counted = load_counted(work, begin, n, stage);
    multiply_by(load<A>(work.weight, begin, n, stage.weight), n, stage, counted);
    sum.kept += counted.elements;
    if (counted.factor == nullptr) {
      sum.weight += static_cast<double>(counted.elements);
      continue;
    }
    double lanes[8] = {};
    for (std::int64_t i = 0; counted.elements > 0 && i < n; ++i) {
      lanes[i % 8] += counted.kept == nullptr || counted.kept[i] != 0 ? double(counted.factor[i]) : 0.0;
    }
    sum.weight += ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
  }
  return sum;
}

template <class A>
OutsideDomain find_outside_domain(const PointwiseWork<A>& work, const Operand& operand, const Domain& domain) {
  Stage<A> stage;
  for (std::int64_t begin = 0; begin < work.count; begin += kBlock) {
    const auto n = std::min(kBlock, work.count - begin);
    const auto counted = load_counted(work, begin, n, stage);
    if (counted.elements == 0) continue;
    const A* values = load<A>(operand, begin, n, stage.input);
    for (std::int64_t i = 0; i < n; ++i) {
      if (counted.kept != nullptr && counted.kept[i] == 0) continue;
      if (domain.excludes(values[i])) return {begin + i, values[i]};
    }
  }
  return {work.count, 0};
}

template <class A, class... Formula>
constexpr PointwiseKernelsOf<A> kernels_of(std::tuple<Formula...>*) {
  return {{{run<Formula, A>}...}, weigh<A>, find_outside_domain<A>};
}

}  // namespace

const PointwiseKernels& pointwise_kernels() {
  static constexpr PointwiseFormulas* formulas = nullptr;
  static constexpr PointwiseKernels kernels{kernels_of<float>(formulas), kernels_of<double>(formulas)};
  return kernels;
}

}  // namespace masked_loss::cpu::CPU_CAPABILITY
