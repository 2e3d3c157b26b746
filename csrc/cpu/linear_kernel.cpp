// Compiled once for every instruction set, as cross_entropy_kernel.cpp.
#include "cpu/linear_kernel.h"

#include "cpu/row_engine.h"
#include "cpu/vector_math.h"

namespace masked_loss::cpu::CPU_CAPABILITY {
namespace {

// Blocks of logits: what they add to the states of their rows, or their gradient from the saved ones.
template <class A, LinearMode mode>
class LinearProgram : public RowProgram<A, A> {
 public:
  using V = Vectorized<A>;

  static constexpr bool kWrites = mode == LinearMode::Write;
  static constexpr bool kVisitsInput = mode == LinearMode::Visit;
  static constexpr bool kChooses = true;

  template <int rows>
  struct State {
    A max[rows], sum[rows], weighted[rows], chosen_input[rows];
    ClassSums smoothing[rows];
  };

  template <int rows>
  struct Terms {
    A scale[rows], probability[rows], entropy[rows], smoothing[rows], target[rows];
  };

  explicit LinearProgram(const LinearWork<A>& work) : work_(work), smooths_(work.label_smoothing != 0) {}

  bool visits() const { return mode == LinearMode::Visit; }
  std::int64_t chosen(std::int64_t position) const {
    const auto c = work_.target[position] - work_.first;
    return c >= 0 && c < work_.classes ? c : -1;
  }

  template <class Rows, int rows>
  void start(const Rows& of, State<rows>& state) const {
    for (std::int64_t w = 0; w < of.width(); ++w) {
      Softmax<A> softmax;
      if constexpr (mode == LinearMode::Write) {
        if (w < of.count()) softmax = work_.saved[of.position() + w].softmax;
      }
      state.max[w] = softmax.max, state.sum[w] = softmax.sum, state.weighted[w] = state.chosen_input[w] = 0;
      state.smoothing[w] = ClassSums();
    }
  }

  template <class Block, int rows>
  void visit(const Block& block, State<rows>& state) const {
    if constexpr (mode == LinearMode::Visit) {
      Softmax<A> before[Block::kRows];
      for (std::int64_t w = 0; w < block.width(); ++w) before[w] = {state.max[w], state.sum[w]};
      block.raise(state.max, state.sum);
      for (std::int64_t w = 0; w < block.width(); ++w) {
        state.weighted[w] = weighted_at(before[w], state.weighted[w], state.max[w]);
      }
      block.template add<2, true>({state.sum, state.weighted}, [&](auto row) {
        return [x = block.input(), max = row(state.max)](auto at) {
          const V shift = x(at) - max, e = exp_of_negative(shift);
          return std::array<V, 2>{e, e * at::vec::maximum(shift, V(kLowestShift))};
        };
      });
      if (smooths_) sum_classes(block, state);
    }
  }

  void merge(State<1>& state, const State<1>& other) const {
    const auto both = masked_loss::merge(row_of(state, 0), row_of(other, 0));
    *state.max = both.softmax.max, *state.sum = both.softmax.sum, *state.weighted = both.weighted;
    *state.chosen_input = both.target_logit;
    *state.smoothing = both.smoothing;
  }

  template <class Rows, int rows>
  void conclude(const Rows& of, State<rows>& state, Terms<rows>& terms) const {
    for (std::int64_t w = 0; w < of.count(); ++w) {
      const auto position = of.position() + w;
      if constexpr (mode == LinearMode::Visit) {
        auto row = row_of(state, w);
        const auto c = chosen(position);
        row.target_allowed = c >= 0 && of.allowed(w, c);
        if (c < 0) row.target_logit = 0;  // where rows are lanes, another class's
        work_.state[position] = work_.first == 0 ? row : masked_loss::merge(work_.state[position], row);
      } else {
        const auto& saved = work_.saved[position];
        const CrossEntropyRow<A> row{work_.coefficient[position],
                                     work_.target_weight == nullptr ? A(1) : work_.target_weight[position],
                                     work_.label_smoothing,
                                     work_.z_loss,
                                     {0, double(saved.weight), static_cast<std::int64_t>(saved.classes)}};
        const A entropy_grad = work_.entropy_grad == nullptr ? A(0) : work_.entropy_grad[position];
        const auto gradient = linear_gradient(row, saved, entropy_grad);
        terms.scale[w] = 1;
        terms.probability[w] = gradient.loss.probability;
        terms.entropy[w] = gradient.entropy;
        terms.smoothing[w] = gradient.loss.smoothing;
        terms.target[w] = gradient.loss.target;
      }
    }
  }

  template <class Block, int rows>
  void write(const Block& block, const State<rows>& state, const Terms<rows>& terms) const {
    if constexpr (kWrites) {
      block.write(
          [&](auto row) {
            return [x = block.input(), max = row(state.max), probability = row(terms.probability),
                    entropy = row(terms.entropy), chosen = block.where_chosen(row(terms.target)),
                    smoothing = row(terms.smoothing), mask = block.mask(), class_weight = block.of_class(work_.weight),
                    weighs = work_.weight != nullptr, smooths = smooths_](auto at) {
              const V shift = x(at) - max;
              const V factor = at::vec::fmadd(entropy, at::vec::maximum(shift, V(kLowestShift)), probability);
              V less = chosen(at);
              if (smooths) less = less + smoothing * (weighs ? class_weight(at) : V(1));
              return mask(at, at::vec::fmsub(exp_of_negative(shift), factor, less), V(0));
            };
          },
          terms.target);
    }
  }

 private:
  template <int rows>
  static LinearRow<A> row_of(const State<rows>& state, std::int64_t w) {
    LinearRow<A> row;
    row.softmax = {state.max[w], state.sum[w]};
    row.weighted = state.weighted[w];
    row.target_logit = state.chosen_input[w];
    row.smoothing = state.smoothing[w];
    return row;
  }

  // What label smoothing sums; shifted by the maximum so that large logits lose no digits.
  template <class Block, int rows>
  void sum_classes(const Block& block, State<rows>& state) const {
    alignas(64) A logits[Block::kRows] = {}, weights[Block::kRows] = {}, classes[Block::kRows] = {};
    block.template add<3>({logits, weights, classes}, [&](auto row) {
      return [x = block.input(), class_weight = block.of_class(work_.weight), mask = block.mask(),
              weighs = work_.weight != nullptr, max = row(state.max)](auto at) {
        const V zero(0), w = weighs ? class_weight(at) : V(1);
        return std::array<V, 3>{mask(at, (x(at) - max) * w, zero), mask(at, w, zero), mask(at, V(1), zero)};
      };
    });
    for (std::int64_t w = 0; w < block.width(); ++w) {
      const auto counted = static_cast<std::int64_t>(classes[w]);
      if (counted == 0) continue;
      const double weight(weights[w]);
      state.smoothing[w] =
          state.smoothing[w] + ClassSums{double(logits[w]) + double(state.max[w]) * weight, weight, counted};
    }
  }

  const LinearWork<A>& work_;
  const bool smooths_;
};

template <class A>
struct LinearPrograms {
  using Work = LinearWork<A>;
  using Mode = LinearMode;

  static RowOperands<A> operands(const Work& work) {
    return {.rows = work.rows,
            .classes = work.classes,
            .input = {work.logits, 1},
            .output = {work.gradient, 1},
            .mask = {work.class_mask, 1},
            .second = {nullptr, 1}};
  }

  template <class Body>
  static auto with(const Work& work, Mode mode, std::int64_t, const Body& body) {
    return mode == Mode::Visit ? body(LinearProgram<A, Mode::Visit>(work)) : body(LinearProgram<A, Mode::Write>(work));
  }
};

// Elements i and following of a row, -inf beyond its end.
template <class A>
Vectorized<A> load_row(const A* row, std::int64_t i, std::int64_t lanes) {
  using V = Vectorized<A>;
  if (lanes == V::size()) return V::loadu(row + i);
  return V::set(V(-std::numeric_limits<A>::infinity()), V::loadu(row + i, lanes), lanes);
}

// Calls body(i, lanes) for the vectors of a row.
template <class A, class Body>
void for_vectors(std::int64_t n, const Body& body) {
  constexpr std::int64_t size = Vectorized<A>::size();
  for (std::int64_t i = 0; i < n; i += size) body(i, std::min(size, n - i));
}

template <class A>
Softmax<A> softmax_of(const A* row, std::int64_t n) {
  using V = Vectorized<A>;
  V max(-std::numeric_limits<A>::infinity()), sum(0);
  for_vectors<A>(n, [&](auto i, auto lanes) { max = larger(load_row(row, i, lanes), max); });
  const A largest = max_lanes(max);
  for_vectors<A>(n, [&](auto i, auto lanes) { sum += exp_of_negative(load_row(row, i, lanes) - V(largest)); });
  return {largest, sum_lanes(sum)};
}

// Rows whose logits by both heads are in a cache: they are read four times.
template <DivergenceKind kind, class A>
void divergence(const DivergenceWork<A>& work, std::int64_t begin, std::int64_t end) {
  using V = Vectorized<A>;
  using Class = ClassDivergence<VectorMath<A>, kind>;
  const auto n = work.classes;
  for (std::int64_t r = begin; r < end; ++r) {
    A *x = work.logits + r * n, *t = work.target_logits + r * n;
    A* gradients[] = {at_or_null(work.gradient, r * n), at_or_null(work.target_gradient, r * n)};
    if (work.index[r] < 0) {
      work.loss[r] = 0;
      for (A* gradient : gradients) {
        if (gradient != nullptr) std::fill_n(gradient, n, A(0));
      }
      continue;
    }
    if (work.class_mask != nullptr) {
      const auto* allowed = work.class_mask + r * work.class_mask_stride;
      for (std::int64_t c = 0; c < n; ++c) {
        if (allowed[c] == 0) x[c] = t[c] = -std::numeric_limits<A>::infinity();
      }
    }
    DivergenceRow<A> row(softmax_of(x, n), softmax_of(t, n), work.beta, work.coefficient[r]);
    const V max(row.input.max), target_max(row.target.max);
    const auto at = [&](auto i, auto lanes) {
      return Class(load_row(x, i, lanes) - max, load_row(t, i, lanes) - target_max, row);
    };
    DivergenceSums<V> sums{V(0), V(0)};
    for_vectors<A>(n, [&](auto i, auto lanes) {
      const auto terms = at(i, lanes).terms(row);
      sums.target += terms.target;
      sums.input += terms.input;
    });
    row.sums = {sum_lanes(sums.target), sum_lanes(sums.input)};
    work.loss[r] = row.coefficient * row.template value<kind>();
    if (gradients[0] == nullptr && gradients[1] == nullptr) continue;
    for_vectors<A>(n, [&](auto i, auto lanes) {
      const auto of = at(i, lanes);
      if (gradients[0] != nullptr) of.input_gradient(row).store(gradients[0] + i, lanes);
      if (gradients[1] != nullptr) of.target_gradient(row).store(gradients[1] + i, lanes);
    });
  }
}

template <class A>
void soften(A* x, std::int64_t n, A cap, A temperature) {
  using V = Vectorized<A>;
  const V up(cap), inverse_cap(1 / cap), by(temperature);
  for (std::int64_t i = 0; i < n; i += V::size()) {
    const auto lanes = std::min<std::int64_t>(V::size(), n - i);
    V v = V::loadu(x + i, lanes);
    if (cap != 0) v = (v / up).tanh() * up;
    if (temperature != 1) v = v / by;
    v.store(x + i, lanes);
  }
}

template <class T, class A>
void harden(T* to, const A* gradient, const A* x, std::int64_t n, A cap, A temperature) {
  using V = Vectorized<A>;
  const V zero(0), one(1), tangent(cap == 0 ? A(0) : temperature / cap), by(1 / temperature);
  store_vectors<false, A>(to, n, [&](std::int64_t i, std::int64_t lanes) {
    const V g = V::loadu(gradient + i, lanes);
    V derivative = by;
    if (cap != 0) {
      const V t = V::loadu(x + i, lanes) * tangent;
      derivative = by * at::vec::maximum(one - t * t, zero);
    }
    // What masked classes hold is nobody's.
    return V::blendv(g * derivative, zero, g == zero);
  });
}

template <class A>
constexpr LinearKernel<A> kernel{RowEngine<LinearPrograms<A>>::kernel(),
                                 {divergence<DivergenceKind::Forward, A>, divergence<DivergenceKind::Reverse, A>,
                                  divergence<DivergenceKind::Mixture, A>},
                                 soften<A>};

}  // namespace

const LinearKernels& linear_kernels() {
  static constexpr LinearKernels kernels{
      kernel<float>,
      kernel<double>,
      {harden<float, float>, harden<double, double>, harden<at::BFloat16, float>, harden<at::Half, float>}};
  return kernels;
}

}  // namespace masked_loss::cpu::CPU_CAPABILITY
