// Compiled once for every instruction set: whatever is not in an anonymous namespace or always inline could end up as
// one copy for all of them.
#include "cpu/softmax_kernel.h"

#include <cmath>

#include "cpu/row_engine.h"

namespace masked_loss::cpu::CPU_CAPABILITY {
namespace {

using Pass = SoftmaxPass;

template <class A>
constexpr A kInfinity = std::numeric_limits<A>::infinity();

template <class T, class A>
class SoftmaxProgram : public RowProgram<T, A> {
 public:
  using V = Vectorized<A>;
  using Work = SoftmaxWork<T, A>;

  static constexpr bool kRanges = true;

  explicit SoftmaxProgram(const Work& work) : work_(work) {}

  std::int64_t end(std::int64_t row) const { return work_.causal_end(row); }

 protected:
  const Work& work_;
};

template <class T, class A, SoftmaxPass pass>
class ForwardProgram : public SoftmaxProgram<T, A> {
 public:
  using V = Vectorized<A>;
  using SoftmaxProgram<T, A>::SoftmaxProgram;

  static constexpr auto kKeeps = pass == Pass::Softmax      ? Keeps::Exponentials
                                 : pass == Pass::LogSoftmax ? Keeps::Inputs
                                                            : Keeps::Nothing;
  static constexpr bool kWrites = pass != Pass::Logsumexp;
  static constexpr A kMasked = pass == Pass::Softmax ? A(0) : -kInfinity<A>;

  template <int rows>
  struct State {
    A max[rows], sum[rows];
  };

  template <int rows>
  struct Terms {
    A scale[rows], log_sum[rows];
  };

  template <class Rows, int rows>
  void start(const Rows& of, State<rows>& state) const {
    std::fill(state.max, state.max + of.width(), Softmax<A>().max);
    std::fill(state.sum, state.sum + of.width(), A(0));
  }

  template <class Block, int rows>
  void visit(const Block& block, State<rows>& state) const {
    block.raise(state.max, state.sum);
    add_softmax(block, state);
  }

  void merge(State<1>& state, const State<1>& other) const {
    const auto both = masked_loss::merge(Softmax<A>{*state.max, *state.sum}, Softmax<A>{*other.max, *other.sum});
    *state.max = both.max, *state.sum = both.sum;
  }

  template <class Rows, int rows>
  void conclude(const Rows& of, State<rows>& state, Terms<rows>& terms) const {
    if constexpr (pass == Pass::Softmax) {
      for (std::int64_t w = 0; w < of.width(); ++w) terms.scale[w] = 1 / state.sum[w];
      return;
    }
    of.log(state.sum, terms.log_sum);
    for (std::int64_t w = 0; pass == Pass::Logsumexp && w < of.count(); ++w) {
      A& result = this->work_.reduced[of.position() + w];
      result = state.max[w] + terms.log_sum[w];
      // An infinite element makes a sum of exponentials NaN, though its log-sum-exp is infinite too.
      if (state.max[w] == kInfinity<A>) {
        result = of.has_nan(w) ? std::numeric_limits<A>::quiet_NaN() : kInfinity<A>;
      }
    }
  }

  template <class Block, int rows>
  void write(const Block& block, const State<rows>& state, const Terms<rows>& terms) const {
    block.write([&](auto row) {
      if constexpr (pass == Pass::Softmax) {
        return [exponential = block.exponential(row(state.max)), scale = row(block.scale()),
                mask = block.mask()](auto at) { return mask(at, exponential(at) * scale, V(kMasked)); };
      } else {
        return [x = block.input(), max = row(state.max), log_sum = row(terms.log_sum), mask = block.mask()](auto at) {
          return mask(at, x(at) - max - log_sum, V(kMasked));
        };
      }
    });
  }
};

template <class T, class A, SoftmaxPass pass>
class BackwardProgram : public SoftmaxProgram<T, A> {
 public:
  using V = Vectorized<A>;
  using SoftmaxProgram<T, A>::SoftmaxProgram;

  static constexpr auto kKeeps = pass == Pass::LogsumexpBackward ? Keeps::Nothing : Keeps::Inputs;
  static constexpr bool kHasSecond = pass != Pass::LogsumexpBackward;
  static constexpr bool kVisitsInput = pass == Pass::SoftmaxBackward;
  static constexpr bool kMinusInfinity = false;

  // What the gradient of a row sums: result * grad of softmax, grad of log_softmax.
  template <int rows>
  struct State {
    A sum[rows], log_sum_exp[rows];
  };

  template <int rows>
  struct Terms {};

  bool visits() const { return pass != Pass::LogsumexpBackward; }

  template <class Rows, int rows>
  void start(const Rows& of, State<rows>& state) const {
    std::fill(state.sum, state.sum + of.width(), A(0));
    if constexpr (pass == Pass::LogsumexpBackward) {
      std::copy_n(this->work_.row_grad + of.position(), of.count(), state.sum);
      std::copy_n(this->work_.reduced + of.position(), of.count(), state.log_sum_exp);
    }
  }

  template <class Block, int rows>
  void visit(const Block& block, State<rows>& state) const {
    block.template add<1, true>({state.sum}, [&](auto) {
      return [x = block.input(), grad = block.second(), mask = block.mask()](auto at) {
        V term = grad(at);
        // In one instruction: a product might be fused with the sum, but only in loops without a mask.
        if constexpr (pass == Pass::SoftmaxBackward) term = at::vec::fmadd(x(at), term, V(0));
        return std::array<V, 1>{mask(at, term, V(0))};
      };
    });
  }

  void merge(State<1>& state, const State<1>& other) const {
    if (visits()) *state.sum += *other.sum;
  }

  template <class Rows, int rows>
  void conclude(const Rows&, State<rows>&, Terms<rows>&) const {}

  template <class Block, int rows>
  void write(const Block& block, const State<rows>& state, const Terms<rows>&) const {
    block.write([&](auto row) {
      return [x = block.input(), grad = block.second(), mask = block.mask(), sum = row(state.sum),
              lse = row(state.log_sum_exp)](auto at) {
        V gradient;
        if constexpr (pass == Pass::SoftmaxBackward) gradient = x(at) * (grad(at) - sum);
        if constexpr (pass == Pass::LogSoftmaxBackward) gradient = grad(at) - exp_of_negative(x(at)) * sum;
        if constexpr (pass == Pass::LogsumexpBackward) gradient = exp_of_negative(x(at) - lse) * sum;
        return mask(at, gradient, V(0));
      };
    });
  }
};

template <class T, class A>
struct SoftmaxPrograms {
  using Work = SoftmaxWork<T, A>;
  using Mode = SoftmaxPass;

  static RowOperands<T> operands(const Work& work) {
    return {.rows = work.rows,
            .classes = work.classes,
            .input = {work.input, work.input_stride},
            .output = {work.result, work.result_stride},
            .mask = {work.mask, work.mask_stride},
            .second = {work.grad, work.grad_stride},
            .causal = work.queries != 0};
  }

  template <class Body>
  static auto with(const Work& work, Mode pass, std::int64_t, const Body& body) {
    switch (pass) {
      case Pass::Softmax: return body(ForwardProgram<T, A, Pass::Softmax>(work));
      case Pass::LogSoftmax: return body(ForwardProgram<T, A, Pass::LogSoftmax>(work));
      case Pass::Logsumexp: return body(ForwardProgram<T, A, Pass::Logsumexp>(work));
      case Pass::SoftmaxBackward: return body(BackwardProgram<T, A, Pass::SoftmaxBackward>(work));
      case Pass::LogSoftmaxBackward: return body(BackwardProgram<T, A, Pass::LogSoftmaxBackward>(work));
      default: return body(BackwardProgram<T, A, Pass::LogsumexpBackward>(work));
    }
  }
};

template <class T, class A>
constexpr auto kernel = RowEngine<SoftmaxPrograms<T, A>>::kernel();

}  // namespace

const SoftmaxKernels& softmax_kernels() {
  static constexpr SoftmaxKernels kernels{kernel<float, float>, kernel<double, double>, kernel<at::BFloat16, float>,
                                          kernel<at::Half, float>};
  return kernels;
}

}  // namespace masked_loss::cpu::CPU_CAPABILITY
