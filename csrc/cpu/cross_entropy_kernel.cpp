// Compiled once for every instruction set: whatever is not in an anonymous namespace or always inline could end up as
// one copy for all of them.
#include "cpu/cross_entropy_kernel.h"

#include "cpu/row_engine.h"

namespace masked_loss::cpu::CPU_CAPABILITY {
namespace {

template <class T, class A, CrossEntropyMode mode>
class CrossEntropyProgram : public RowProgram<T, A> {
 public:
  using V = Vectorized<A>;
  using Work = CrossEntropyWork<T, A>;

  static constexpr auto kKeeps = mode == CrossEntropyMode::ForwardGrad ? Keeps::Exponentials : Keeps::Nothing;
  static constexpr bool kWrites = mode != CrossEntropyMode::Forward;
  static constexpr bool kHasSecond = true;  // class probabilities
  static constexpr bool kVisitsInput = mode != CrossEntropyMode::Backward;
  static constexpr bool kChooses = true;

  template <int rows>
  struct State {
    A max[rows], sum[rows], log_sum[rows], chosen_input[rows];
    ClassSums smoothing[rows], target[rows];  // the latter of class probabilities
  };

  template <int rows>
  struct Terms {
    A loss[rows], scale[rows], smoothing[rows], target[rows];  // scale is of exponentials
  };

  CrossEntropyProgram(const Work& work, std::int64_t begin)
      : work_(work), begin_(begin), smooths_(work.label_smoothing != 0), has_probabilities_(work.probabilities) {}

  bool visits() const {
    const bool counts = smooths_ && (work_.class_mask != nullptr || work_.weight != nullptr);
    return kVisitsInput || has_probabilities_ || counts;
  }
  bool skipped(std::int64_t position) const { return work_.index[position - begin_] < 0; }
  std::int64_t chosen(std::int64_t position) const { return has_probabilities_ ? -1 : work_.index[position - begin_]; }

  template <class Rows, int rows>
  void start(const Rows& of, State<rows>& state) const {
    const ClassSums all{0, double(work_.classes), work_.classes};
    for (std::int64_t w = 0; w < of.width(); ++w) {
      Softmax<A> softmax;
      if constexpr (mode == CrossEntropyMode::Backward) {
        if (w < of.count()) softmax = work_.softmax[of.position() + w - begin_];
      }
      state.max[w] = softmax.max, state.sum[w] = softmax.sum, state.chosen_input[w] = 0;
      if (smooths_) state.smoothing[w] = visits() ? ClassSums() : all;
      if (has_probabilities_) state.target[w] = ClassSums();
    }
  }

  template <class Block, int rows>
  void visit(const Block& block, State<rows>& state) const {
    if constexpr (mode != CrossEntropyMode::Backward) block.raise(state.max, state.sum);
    if (smooths_ || has_probabilities_) {
      block.mask() ? sum_classes<true>(block, state) : sum_classes<false>(block, state);
    }
    if constexpr (mode != CrossEntropyMode::Backward) add_softmax(block, state);
  }

  void merge(State<1>& state, const State<1>& other) const {
    if constexpr (mode != CrossEntropyMode::Backward) {
      const auto both = masked_loss::merge(Softmax<A>{*state.max, *state.sum}, Softmax<A>{*other.max, *other.sum});
      *state.max = both.max, *state.sum = both.sum;
      *state.chosen_input += *other.chosen_input;  // which one part has
    }
    if (smooths_ && visits()) *state.smoothing = *state.smoothing + *other.smoothing;
    if (has_probabilities_) *state.target = *state.target + *other.target;
  }

  template <class Rows, int rows>
  void conclude(const Rows& of, State<rows>& state, Terms<rows>& terms) const {
    const bool plain = !smooths_ && !has_probabilities_ && work_.class_mask == nullptr;
    if (of.any_kept()) plain ? conclude_kept<true>(of, state, terms) : conclude_kept<false>(of, state, terms);
    if constexpr (mode != CrossEntropyMode::Backward) {
      const auto first = of.position() - begin_;
      for (std::int64_t w = 0; w < of.count(); ++w) work_.loss[first + w] = of.kept(w) ? terms.loss[w] : A(0);
      for (std::int64_t w = 0; work_.softmax != nullptr && w < of.count(); ++w) {
        work_.softmax[first + w] = of.kept(w) ? Softmax<A>{state.max[w], state.sum[w]} : Softmax<A>{0, 1};
      }
    }
  }

  template <class Block, int rows>
  void write(const Block& block, const State<rows>& state, const Terms<rows>& terms) const {
    if constexpr (kWrites) {
      const bool plain = !smooths_ && !has_probabilities_ && !block.mask();
      plain ? write_as<true>(block, state, terms) : write_as<false>(block, state, terms);
    }
  }

 private:
  // What label smoothing sums over a block, or, with probabilities, their cost; shifted by the maximum so that large
  // logits lose no digits.
  template <bool masked, class Block, int rows>
  C10_NOINLINE void sum_classes(const Block& block, State<rows>& state) const {
    if (smooths_) sum_classes<masked, false>(block, state.max, state.smoothing);
    if (has_probabilities_) sum_classes<masked, true>(block, state.max, state.target);
  }

  template <bool masked, bool of_probabilities, class Block>
  void sum_classes(const Block& block, const A* max, ClassSums* sums) const {
    constexpr bool sums_logits = mode != CrossEntropyMode::Backward;
    alignas(64) A logits[Block::kRows], weights[Block::kRows], classes[Block::kRows];
    for (A* column : {logits, weights, classes}) std::fill(column, column + block.width(), A(0));
    block.template add<masked ? 3 : 2>({logits, weights, classes}, [&](auto row) {
      return [x = block.input(), q = block.second(), class_weight = block.of_class(work_.weight), mask = block.mask(),
              weighs = work_.weight != nullptr, shift = row(max)](auto at) {
        const V zero(0), one(1);
        V w = weighs ? class_weight(at) : one;
        V counted = of_probabilities ? zero : one;  // of probabilities, those that are not allowed
        if constexpr (of_probabilities) {
          const V probability = q(at);
          w = w * probability;
          if (masked) counted = mask(at, zero, V::blendv(zero, one, probability > zero));
        } else {
          counted = mask(at, one, zero);
        }
        V term = zero;
        if constexpr (sums_logits) term = mask(at, (x(at) - shift) * w, zero);
        return std::array<V, 3>{term, mask(at, w, zero), counted};
      };
    });
    for (std::int64_t w = 0; w < block.width(); ++w) {
      const double weight(weights[w]);
      const auto counted = masked ? static_cast<std::int64_t>(classes[w]) : of_probabilities ? 0 : block.n_;
      if (counted == 0 && !of_probabilities) continue;
      sums[w] = sums[w] + ClassSums{double(logits[w]) + (sums_logits ? double(max[w]) * weight : 0), weight, counted};
    }
  }

  // The loss of each row, and what its gradient is made with. `plain`: there is neither label smoothing nor a class
  // mask; what is left are vector instructions where rows are lanes.
  template <bool plain, class Rows, int rows>
  void conclude_kept(const Rows& of, State<rows>& state, Terms<rows>& terms) const {
    of.log(state.sum, state.log_sum);
    const A label_smoothing = plain ? A(0) : work_.label_smoothing, z_loss = work_.z_loss;
    const bool has_probabilities = !plain && has_probabilities_;
    alignas(64) A weight[rows];
    std::fill(weight, weight + of.width(), A(1));
    const auto first = of.position() - begin_;
    for (std::int64_t w = 0; work_.weight != nullptr && !has_probabilities && w < of.count(); ++w) {
      weight[w] = work_.weight[std::max<std::int64_t>(work_.index[first + w], 0)];
    }
    for (std::int64_t w = 0; w < of.count(); ++w) {
      const CrossEntropyRow<A> row{work_.coefficient[first + w], weight[w], label_smoothing, z_loss,
                                   plain ? ClassSums() : state.smoothing[w]};
      const Softmax<A> softmax{state.max[w], state.sum[w]};
      if constexpr (mode != CrossEntropyMode::Backward) {
        const bool allowed = plain || has_probabilities || !of.kept(w) || of.allowed(w, work_.index[first + w]);
        terms.loss[w] = has_probabilities
                            ? cross_entropy_loss(row, softmax, state.log_sum[w], state.target[w])
                            : cross_entropy_loss(row, softmax, state.log_sum[w], state.chosen_input[w], allowed);
      }
      if constexpr (kWrites) {
        const A target_sum = has_probabilities ? static_cast<A>(state.target[w].weight) : row.target_weight;
        const auto gradient = cross_entropy_gradient(row, softmax.max + state.log_sum[w], target_sum);
        terms.scale[w] = gradient.probability / softmax.sum;
        terms.smoothing[w] = gradient.smoothing;
        terms.target[w] = gradient.target;
      }
    }
  }

  template <bool plain, class Block, int rows>
  void write_as(const Block& block, const State<rows>& state, const Terms<rows>& terms) const {
    block.write(
        [&](auto row) {
          return [exponential = block.exponential(row(state.max)), scale = row(block.scale()),
                  chosen = block.where_chosen(row(terms.target)), target = row(terms.target),
                  smoothing = plain ? V(0) : row(terms.smoothing), q = block.second(), mask = block.mask(),
                  class_weight = block.of_class(work_.weight), weighs = work_.weight != nullptr, smooths = smooths_,
                  has_probabilities = has_probabilities_](auto at) {
            V less = plain || !has_probabilities ? chosen(at) : target * q(at);
            if constexpr (!plain) {
              const V weight = weighs ? class_weight(at) : V(1);
              if (has_probabilities) less = less * weight;
              if (smooths) less = less + smoothing * weight;
            }
            // Not left to the compiler, which might choose another rounding in another loop.
            const V gradient = at::vec::fmsub(exponential(at), scale, less);
            return plain ? gradient : mask(at, gradient, V(0));
          };
        },
        has_probabilities_ ? nullptr : terms.target);
  }

  const Work& work_;
  const std::int64_t begin_;
  const bool smooths_, has_probabilities_;
};

template <class T, class A>
struct CrossEntropyPrograms {
  using Work = CrossEntropyWork<T, A>;
  using Mode = CrossEntropyMode;

  static RowOperands<T> operands(const Work& work) {
    return {.rows = work.rows,
            .classes = work.classes,
            .input = {work.logits, work.logits_stride},
            .output = {work.gradient, work.gradient_stride},
            .mask = {work.class_mask, work.class_mask_stride},
            .second = {work.probabilities, work.probabilities_stride},
            .listed = work.listed,
            .count = work.count()};
  }

  template <class Body>
  static auto with(const Work& work, Mode mode, std::int64_t begin, const Body& body) {
    switch (mode) {
      case Mode::Forward: return body(CrossEntropyProgram<T, A, Mode::Forward>(work, begin));
      case Mode::ForwardGrad: return body(CrossEntropyProgram<T, A, Mode::ForwardGrad>(work, begin));
      default: return body(CrossEntropyProgram<T, A, Mode::Backward>(work, begin));
    }
  }
};

template <class T, class A>
void scale(T* to, const T* from, std::int64_t n, A by) {
  using V = Vectorized<A>;
  A stage[kBlock];
  for (std::int64_t begin = 0; begin < n; begin += kBlock) {
    const auto count = std::min(kBlock, n - begin);
    for_vectors<A>(from + begin, count, [&](V v, std::int64_t i, std::int64_t lanes) {
      // Where zero times the factor would not be +0: an infinite or a negative one.
      V::blendv(v * V(by), V(0), v == V(0)).store(stage + i, lanes);
    });
    store_vectors<false, A>(to + begin, count,
                            [&](std::int64_t i, std::int64_t lanes) { return V::loadu(stage + i, lanes); });
  }
}

template <class T, class A>
constexpr CrossEntropyKernel<T, A> kernel{RowEngine<CrossEntropyPrograms<T, A>>::kernel(), scale<T, A>};

}  // namespace

const CrossEntropyKernels& cross_entropy_kernels() {
  static constexpr CrossEntropyKernels kernels{kernel<float, float>, kernel<double, double>,
                                               kernel<at::BFloat16, float>, kernel<at::Half, float>};
  return kernels;
}

}  // namespace masked_loss::cpu::CPU_CAPABILITY
