// masked_fill and the losses of elements.
#include <algorithm>

#include "bench.h"
#include "cuda/masked_fill_kernel.h"
#include "cuda/pointwise_kernel.h"

namespace masked_loss::cuda::bench {
namespace {

enum class Fill { Apart, InPlace, Lines };  // Lines: one of the mask each

template <class T>
Case fill_case(std::int64_t rows, std::int64_t length, Fill fill, const char* dtype) {
  const char* kinds[] = {"masked_fill ", "masked_fill_ ", "masked_fill rows "};
  const auto name = kinds[int(fill)] + std::string(dtype) + " " + std::to_string(rows) + "x" + std::to_string(length);
  return {name, [=] {
            const auto lines = kEmulated ? std::min<std::int64_t>(rows, 5) : rows, width = shrunk(length, 3000);
            const auto n = lines * width;
            Random random(13);
            const Repeated<T> in(n, [&] { return element<T>(std::floor(random.uniform(0, 100))); });
            const Repeated<std::uint8_t> mask(fill == Fill::Lines ? lines : n,
                                              [&] { return std::uint8_t(random.next() % 2); });
            const Array<T> apart(fill == Fill::InPlace ? 0 : n);
            const Array<T>& out = fill == Fill::InPlace ? static_cast<const Array<T>&>(in) : apart;
            MaskedFillWork work{};
            work.length = fill == Fill::Lines ? width : n;
            work.lines =
                fill == Fill::Lines ? make_rows<3>({lines}, {{width}, {width}, {1}}) : make_rows<3>({}, {{}, {}, {}});
            work.shared_mask = fill == Fill::Lines;
            work.element_bytes = sizeof(T);
            work.out = out.data();
            work.in = fill == Fill::InPlace ? nullptr : in.data();
            work.mask = mask.data();
            const T value = element<T>(101);
            std::memcpy(work.value, &value, sizeof(T));
            const auto run = [=](cudaStream_t stream) {
              masked_fill(work, machine.multiprocessors, stream);
              (void)in, (void)mask;
            };
            const auto error = [=] {
              Errors errors;
              for (const auto i : sample(n, 400)) {
                const bool filled = mask[fill == Fill::Lines ? i / width : i] != 0;
                errors.compare(number(out.host(i)), filled ? 101 : number(in[i]), 1e-9);
              }
              return errors.worst();
            };
            const double masks = fill == Fill::Lines ? double(lines) : double(n);
            return Job{double(n) * sizeof(T) * 2 + masks,
                       run,
                       error,
                       {{out.data(), std::size_t(n) * sizeof(T), fill == Fill::InPlace}},
                       {}};
          }};
}

enum class Way { Forward, Both, Backward };  // Both: the mean and its gradients

// Half of the elements are masked.
template <class Formula, class T>
class Loss {
 public:
  using A = float;

  Loss(std::int64_t n, Way way)
      : n_(n),
        way_(way),
        input_(n, [this] { return element<T>(random_.uniform(values_.input_from, values_.input_to)); }),
        target_(n, [this] { return element<T>(random_.uniform(values_.target_from, values_.target_to)); }),
        mask_(n, [this] { return std::uint8_t(random_.next() % 2); }),
        upstream_(std::vector<A>{A(0.75)}),
        sum_(1),
        gradient_(way == Way::Forward ? 0 : n),
        other_gradient_(way == Way::Forward || !Formula::has_other_slope ? 0 : n),
        partials_(kMaxChunks),
        parts_(kMaxParts),
        divisor_(1) {
    if (Formula::has_other_slope) other_ = {n, [this] { return element<T>(random_.uniform(0.1, 2)); }};
  }

  void run(cudaStream_t stream) const {
    PointwiseWork<A> work{};
    work.count = n_;
    work.input = operand(input_);
    work.target = operand(target_);
    if (Formula::has_other_slope) work.other = operand(other_);
    work.mask = {mask_.data(), ElementType::Byte, make_rows<1>({n_}, {{1}})};
    std::copy_n(values_.numbers, kPointwiseNumbers, work.numbers);
    PointwiseTotal<A> total{nullptr, partials_.data(), nullptr, way_ == Way::Forward};
    if (way_ != Way::Forward) {
      find_divisor(work, {1, n_, false, 1, nullptr, nullptr, parts_.data(), divisor_.data()}, stream);
      total.divisor = divisor_.data();
      work.gradient = gradient_.data();
      if (Formula::has_other_slope) work.other_gradient = other_gradient_.data();
    }
    if (way_ == Way::Backward) {
      work.coefficient = {upstream_.data(), ElementType::Float, make_rows<1>({n_}, {{0}})};
    } else {
      total.result = sum_.data();
    }
    run_pointwise<T>(formula_index<Formula>(), work, total, stream);
  }

  std::vector<Result> results() const {
    const auto bytes = std::size_t(n_) * sizeof(T);
    std::vector<Result> all;
    if (way_ != Way::Backward) all.push_back({sum_.data(), sizeof(A)});
    if (way_ != Way::Forward) all.push_back({gradient_.data(), bytes});
    if (other_gradient_.size() > 0) all.push_back({other_gradient_.data(), bytes});
    return all;
  }

  double bytes() const {
    const int operands = 2 + Formula::has_other_slope, gradients = way_ == Way::Forward ? 0 : operands - 1;
    return double(n_) * ((operands + gradients) * sizeof(T) + 1);
  }

  double error() const {
    double sum = 0, size = 0;
    std::int64_t kept = 0;
    for (std::int64_t i = 0; i < std::min(n_, kPeriod); ++i) {
      if (mask_[i] == 0) continue;
      const double times = double((n_ - 1 - i) / kPeriod + 1), value = terms(i).value;
      sum += times * value, size += times * std::abs(value), kept += (n_ - 1 - i) / kPeriod + 1;
    }
    Errors errors;
    const double by = double(kept);
    if (way_ != Way::Backward) errors.compare(double(sum_.host(0)), sum / by, 2e-5 * size / by);
    if (way_ == Way::Forward) return errors.worst();
    const double factor = way_ == Way::Backward ? 0.75 / by : 1 / by;
    for (const auto i : sample(n_, 400)) {
      const auto wanted = terms(i);
      const bool keep = mask_[i] != 0;
      check(errors, gradient_.host(i), keep ? wanted.input * factor : 0, factor);
      if (Formula::has_other_slope) check(errors, other_gradient_.host(i), keep ? wanted.other * factor : 0, factor);
    }
    return errors.worst();
  }

 private:
  static Operand operand(const Array<T>& of) {
    constexpr auto type = std::is_same_v<T, float>    ? ElementType::Float
                          : std::is_same_v<T, __half> ? ElementType::Half
                                                      : ElementType::BFloat16;
    return {of.data(), type, make_rows<1>({of.size()}, {{1}})};
  }
  PointwiseTerms<double> terms(std::int64_t i) const {
    return Formula::template at<ScalarMath<double>>(number(input_[i]), number(target_[i]),
                                                    Formula::has_other_slope ? number(other_[i]) : Formula::safe_other,
                                                    values_.numbers);
  }
  static void check(Errors& errors, T actual, double expected, double factor) {
    errors.compare(number(actual), expected,
                   4 * kRounding<T> * std::abs(expected) + 2e-5 * factor + (sizeof(T) == 2 ? 1e-7 : 0));
  }

  const std::int64_t n_;
  const Way way_;
  const FormulaValues<Formula> values_;
  Random random_{17};
  const Repeated<T> input_, target_;
  const Repeated<std::uint8_t> mask_;
  const Array<A> upstream_, sum_;
  const Array<T> gradient_, other_gradient_;
  const Array<PointwiseSum> partials_, parts_;
  const Array<PointwiseDivisor> divisor_;
  Repeated<T> other_;
};

template <class Formula, class T>
Case loss_case(std::int64_t n, Way way) {
  const char* ways[] = {" forward ", " f+b ", " backward "};
  // Two formulas have the name of one loss.
  const auto name = std::string(Formula::name) + ways[int(way)] + dtype_name<T>() + " " + std::to_string(n) +
                    " formula " + std::to_string(formula_index<Formula>());
  return {name, [=] {
            const auto loss = std::make_shared<Loss<Formula, T>>(shrunk(n, 20000), way);
            return Job{loss->bytes(),
                       [loss](cudaStream_t stream) { loss->run(stream); },
                       [loss] { return loss->error(); },
                       loss->results(),
                       {}};
          }};
}

}  // namespace

std::vector<Case> element_cases() {
  using bf16 = __nv_bfloat16;
  std::vector<Case> cases;
  const auto add = [&](Case one) { cases.push_back(std::move(one)); };
  for (const auto fill : {Fill::Apart, Fill::InPlace, Fill::Lines}) {
    add(fill_case<bf16>(8192, 8192, fill, "bf16"));
    add(fill_case<float>(8192, 8192, fill, "fp32"));
  }
  add(fill_case<std::uint8_t>(8192, 8192, Fill::Apart, "uint8"));
  add(fill_case<double>(8192, 4096, Fill::Apart, "fp64"));
  constexpr std::int64_t n = std::int64_t(1) << 26;
  [&]<class... Formula>(std::tuple<Formula...>*) {
    for (const auto way : {Way::Forward, Way::Both}) {
      (add(loss_case<Formula, float>(n, way)), ...);
      (add(loss_case<Formula, bf16>(n, way)), ...);
    }
  }(static_cast<PointwiseFormulas*>(nullptr));
  add(loss_case<formula::Mse, float>(n, Way::Backward));
  add(loss_case<formula::Mse, bf16>(n, Way::Backward));
  add(loss_case<formula::Mse, float>(100, Way::Forward));
  add(loss_case<formula::Mse, float>(100, Way::Both));
  return cases;
}

}  // namespace masked_loss::cuda::bench
