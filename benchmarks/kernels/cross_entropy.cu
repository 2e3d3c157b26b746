// Rows of cross_entropy, their plan, and whole steps.
#include <algorithm>
#include <numeric>

#include "bench.h"
#include "cuda/cross_entropy_kernel.h"
#include "cuda/row_plan_kernel.h"

namespace masked_loss::cuda::bench {
namespace {

using Mode = CrossEntropyMode;

struct Shape {
  std::int64_t rows, classes;
  std::int64_t inner = 0;  // classes lie apart: [rows / inner, classes, inner]
  double kept = 1;         // share of the rows
};

enum class Extra { None, ClassMask, EachMask, Smoothing, Weight, ZLoss, Probabilities };

Shape shrunk(const Shape& of) {
  if (!kEmulated) return of;
  Shape small = of;
  small.classes = bench::shrunk(of.classes, 24000);
  if (of.inner > 0) {
    small.classes = bench::shrunk(of.classes, 80);
    small.inner = bench::shrunk(of.inner, 72);
    small.rows = small.inner * 2;
  } else {
    small.rows = std::min<std::int64_t>(of.rows, of.classes > 2048 ? 4 : 40);
  }
  return small;
}

// The rows that are kept, and what the plan would have made of them.
struct Planned {
  std::vector<std::int64_t> index, order;
  std::vector<float> coefficient;
  std::int64_t kept = 0;

  Planned(const Shape& of, bool probabilities) {
    Random random(3);
    std::vector<std::int64_t> masked;
    for (std::int64_t r = 0; r < of.rows; ++r) {
      const bool keep = r == 0 || random.uniform() < of.kept;
      index.push_back(!keep ? -1 : probabilities ? 0 : random.next() % of.classes);
      coefficient.push_back(float(random.uniform(0.5, 1)));
      (keep ? order : masked).push_back(r);
    }
    kept = std::int64_t(order.size());
    order.insert(order.end(), masked.begin(), masked.end());
  }
};

// As a call of the library.
template <class T, class A>
RowRegime pick(const CrossEntropyCall<T, A>& of, Mode mode) {
  auto facts = cross_entropy_facts(of.work);
  facts.ring_blocks = cross_entropy_ring_blocks(of.work, mode);
  return pick_cross_entropy_regime(facts, cross_entropy_extras(of.work), machine.multiprocessors);
}
template <class T, class A>
Array<unsigned char> parts_of(CrossEntropyCall<T, A>& of, const RowRegime& regime) {
  const Array<unsigned char> parts(regime.kind == RowRegime::Packs && regime.slices > 1
                                       ? of.work.rows.count * regime.slices * cross_entropy_part_bytes(of.work)
                                       : 0);
  of.parts = parts.data();
  return parts;
}

template <class T>
class Rowwise {
 public:
  using A = float;

  Rowwise(const Shape& of, Mode mode, Extra extra)
      : of_(of),
        mode_(mode),
        extra_(extra),
        elements_(of.rows * of.classes),
        planned_(of, extra == Extra::Probabilities),
        logits_(elements_, [this] { return element<T>(random_.normal(2)); }),
        gradient_(mode == Mode::Forward ? 0 : elements_),
        index_(planned_.index),
        order_(planned_.order),
        kept_(std::vector<std::int64_t>{planned_.kept}),
        coefficient_(planned_.coefficient),
        loss_(of.rows),
        softmax_(of.rows) {
    if (extra == Extra::ClassMask || extra == Extra::EachMask) {
      class_mask_ = {extra == Extra::ClassMask ? of.classes : elements_,
                     [this] { return std::uint8_t(random_.uniform() < 0.75); }};
    }
    if (extra == Extra::Probabilities) {
      probabilities_ = {elements_, [&] { return element<T>(random_.uniform() * 2 / double(of.classes)); }};
    }
    if (extra == Extra::Weight) weight_ = {of.classes, [this] { return A(random_.uniform(0.5, 2)); }};
  }

  // Runs the forward pass that a backward pass reads from.
  void prepare() {
    if (mode_ != Mode::Backward) return;
    auto of = call();
    of.work.gradient = nullptr;
    of.work.softmax = softmax_.data();
    caller(pick(of, Mode::Forward), Mode::Forward)(machine.stream);
  }

  std::function<void(cudaStream_t)> caller(const RowRegime& regime, Mode mode) const {
    auto of = call();
    if (mode == Mode::Backward || mode != mode_) of.work.softmax = softmax_.data();
    const auto parts = parts_of(of, regime);
    if (mode == Mode::Forward) of.work.gradient = nullptr;
    return [of, mode, regime, parts](cudaStream_t stream) {
      run_cross_entropy(of, mode, regime, machine.multiprocessors, stream);
    };
  }

  std::function<void(cudaStream_t)> best() const { return caller(pick(call(), mode_), mode_); }

  std::vector<Variant> variants() const {
    std::vector<Variant> all;
    for (const auto& regime : other_regimes(pick(call(), mode_))) {
      all.push_back({to_string(regime), caller(regime, mode_)});
    }
    return all;
  }

  std::vector<Result> results() const {
    if (mode_ == Mode::Backward) return {{gradient_.data(), elements_ * sizeof(T)}};
    std::vector<Result> written{{loss_.data(), loss_.size() * sizeof(A)}};
    if (mode_ == Mode::ForwardGrad) written.push_back({gradient_.data(), elements_ * sizeof(T)});
    return written;
  }

  double bytes() const {
    const double row = double(of_.classes) * sizeof(T), kept = double(planned_.kept);
    double bytes = kept * row + (mode_ == Mode::Forward ? 0 : of_.rows * row);
    if (extra_ == Extra::EachMask) bytes += kept * double(of_.classes);
    if (extra_ == Extra::Probabilities) bytes += kept * row;
    return bytes;
  }

  double error() const {
    Errors errors;
    for (const auto r : sample(of_.rows)) check_row(errors, r);
    return errors.worst();
  }

 private:
  CrossEntropyCall<T, A> call() const {
    CrossEntropyCall<T, A> call{};
    auto& work = call.work;
    const auto C = of_.classes, inner = of_.inner;
    if (inner > 0) {
      const std::vector<std::int64_t> strides{C * inner, 1};
      work.rows = make_rows<4>({of_.rows / inner, inner}, {strides, strides, {}, strides});
    } else {
      work.rows = make_rows<4>(
          {of_.rows},
          {{C}, {C}, extra_ == Extra::EachMask ? std::vector<std::int64_t>{C} : std::vector<std::int64_t>{}, {C}});
    }
    work.classes = C;
    work.logits_stride = work.gradient_stride = work.class_mask_stride = work.probabilities_stride =
        std::max<std::int64_t>(inner, 1);
    work.logits = logits_.data();
    work.gradient = gradient_.size() == 0 ? nullptr : gradient_.data();
    work.class_mask = class_mask_.size() == 0 ? nullptr : class_mask_.data();
    work.probabilities = probabilities_.size() == 0 ? nullptr : probabilities_.data();
    work.weight = weight_.size() == 0 ? nullptr : weight_.data();
    work.label_smoothing = smoothing();
    work.z_loss = z_loss();
    work.index = index_.data();
    work.coefficient = coefficient_.data();
    work.loss = loss_.data();
    call.order = order_.data();
    call.kept = kept_.data();
    return call;
  }

  A smoothing() const { return extra_ == Extra::Smoothing ? A(0.1) : A(0); }
  A z_loss() const { return extra_ == Extra::ZLoss ? A(1e-3) : A(0); }
  std::int64_t offset(std::int64_t r, std::int64_t c) const {
    const auto inner = of_.inner;
    return inner == 0 ? r * of_.classes + c : (r / inner * of_.classes + c) * inner + r % inner;
  }
  bool allows(std::int64_t r, std::int64_t c) const {
    return class_mask_.size() == 0 || class_mask_[extra_ == Extra::EachMask ? offset(r, c) : c] != 0;
  }
  double weight(std::int64_t c) const { return weight_.size() == 0 ? 1 : double(weight_[c]); }
  double probability(std::int64_t r, std::int64_t c) const { return number(probabilities_[offset(r, c)]); }

  std::vector<T> gradient_of(std::int64_t r) const {
    if (of_.inner == 0) return gradient_.host(r * of_.classes, of_.classes);
    std::vector<T> row;
    for (std::int64_t c = 0; c < of_.classes; ++c) row.push_back(gradient_.host(offset(r, c)));
    return row;
  }

  void check_row(Errors& errors, std::int64_t r) const {
    const auto target = planned_.index[std::size_t(r)];
    const auto gradient = mode_ == Mode::Forward ? std::vector<T>() : gradient_of(r);
    if (target < 0) {
      for (const T x : gradient) errors.compare(number(x), 0, 1e-30);
      return;
    }
    const bool probable = extra_ == Extra::Probabilities;
    Softmax<double> softmax;
    ClassSums smoothing_sums, target_sums;
    for (std::int64_t c = 0; c < of_.classes; ++c) {
      if (!allows(r, c)) continue;
      const double x = number(logits_[offset(r, c)]), w = weight(c);
      softmax = merge(softmax, {x, 1.0});
      smoothing_sums = smoothing_sums + ClassSums{w * x, w, 1};
      const double q = probable ? w * probability(r, c) : 0;
      target_sums = target_sums + ClassSums{q * x, q, 0};
    }
    const CrossEntropyRow<double> row{double(planned_.coefficient[std::size_t(r)]), probable ? 1.0 : weight(target),
                                      smoothing(), z_loss(), smoothing_sums};
    if (mode_ != Mode::Backward) {
      const double log_sum = std::log(softmax.sum);
      const double loss =
          probable ? cross_entropy_loss(row, softmax, log_sum, target_sums)
                   : cross_entropy_loss(row, softmax, log_sum, number(logits_[offset(r, target)]), allows(r, target));
      errors.compare(double(loss_.host(r)), loss, 1e-5 * (4 + std::abs(loss)));
    }
    if (mode_ == Mode::Forward) return;
    const auto terms =
        cross_entropy_gradient(row, log_sum_exp(softmax), probable ? target_sums.weight : row.target_weight);
    for (std::int64_t c = 0; c < of_.classes; ++c) {
      double expected = 0, size = 0;
      const auto add = [&](double term) { expected += term, size += std::abs(term); };
      if (allows(r, c)) {
        add(terms.probability * std::exp(number(logits_[offset(r, c)]) - softmax.max) / softmax.sum);
        add(-terms.smoothing * weight(c));
        if (probable) {
          add(-terms.target * weight(c) * probability(r, c));
        } else if (c == target) {
          add(-terms.target);
        }
      }
      errors.compare(number(gradient[std::size_t(c)]), expected,
                     1e-5 * size + kRounding<T> * std::abs(expected) + (sizeof(T) == 2 ? 1e-7 : 1e-12));
    }
  }

  const Shape of_;
  const Mode mode_;
  const Extra extra_;
  const std::int64_t elements_;
  Random random_;
  const Planned planned_;
  const Repeated<T> logits_;
  const Array<T> gradient_;
  const Array<std::int64_t> index_, order_, kept_;
  const Array<A> coefficient_, loss_;
  const Array<Softmax<A>> softmax_;
  Repeated<std::uint8_t> class_mask_;
  Repeated<T> probabilities_;
  Repeated<A> weight_;
};

std::string text(const Shape& of) {
  auto text = std::to_string(of.rows) + "x" + std::to_string(of.classes);
  if (of.inner > 0) {
    text = "[" + std::to_string(of.rows / of.inner) + "," + std::to_string(of.classes) + "," +
           std::to_string(of.inner) + "]";
  }
  if (of.kept < 1) text += " " + std::to_string(int(100 * of.kept)) + "% kept";
  return text;
}

template <class T>
Case rows_case(const Shape& of, Mode mode, Extra extra = Extra::None) {
  const char* modes[] = {"forward", "f+b", "backward"};
  const char* extras[] = {"",        " class_mask[C]", " class_mask[N,C]", " smoothing",
                          " weight", " z_loss",        " probabilities"};
  const auto name =
      std::string("cross_entropy ") + modes[int(mode)] + " " + dtype_name<T>() + " " + text(of) + extras[int(extra)];
  return {name, [=] {
            const auto rows = std::make_shared<Rowwise<T>>(shrunk(of), mode, extra);
            rows->prepare();
            return Job{rows->bytes(), rows->best(), [rows] { return rows->error(); }, rows->results(),
                       rows->variants()};
          }};
}

// The plan of rows of which a tenth is masked; whole sequences have a mean of their own where `length` is not 0.
class Plan {
 public:
  Plan(std::int64_t rows, std::int64_t length, std::int64_t classes)
      : rows_(rows),
        length_(length),
        target_(rows, [=, this] { return std::int64_t(random_.next() % classes); }),
        mask_(rows, [this] { return std::uint8_t(random_.uniform() < 0.9); }),
        index_(rows),
        order_(rows),
        kept_(1),
        coefficient_(rows),
        loss_(rows),
        chunks_(plan_chunks(rows)),
        sequence_weight_(sequences()),
        sequence_chunks_(std::max<std::int64_t>(1, plan_chunks(sequences()))) {
    work_.view.target = target_.data();
    work_.view.target_bytes = 8;
    work_.view.mask = mask_.data();
    work_.view.mask_bytes = 1;
    work_.view.classes = classes;
    work_.rows = make_rows<4>({rows}, {{1}, {1}, {}, {}});
    work_.divisor = Divisor::Weights;
    if (length > 0) {
      work_.sequences = sequences();
      work_.sequence_length = length;
      work_.by_length = Quotient(length);
      work_.sequence_weight = sequence_weight_.data();
      work_.sequence_chunks = sequence_chunks_.data();
    }
    work_.chunks = chunks_.data();
    work_.index = index_.data();
    work_.coefficient = coefficient_.data();
    work_.order = order_.data();
    work_.kept = kept_.data();
    work_.loss = loss_.data();
  }

  const RowPlanWork<float>& work() const { return work_; }
  const Array<float>& loss() const { return loss_; }
  std::int64_t target(std::int64_t r) const { return target_[r]; }
  bool keeps(std::int64_t r) const { return mask_[r] != 0; }
  std::int64_t kept() const {
    std::int64_t kept = 0;
    for (std::int64_t r = 0; r < rows_; ++r) kept += keeps(r);
    return kept;
  }

  std::vector<Result> results() const {
    return {{index_.data(), std::size_t(rows_) * 8},
            {order_.data(), std::size_t(rows_) * 8},
            {coefficient_.data(), std::size_t(rows_) * 4},
            {kept_.data(), 8}};
  }

  double error() const {
    Errors errors;
    const auto index = index_.host(0, rows_), order = order_.host(0, rows_);
    const auto coefficient = coefficient_.host(0, rows_);
    const auto kept = this->kept();
    errors.compare(double(kept_.host(0)), double(kept), 1e-9);
    std::int64_t begin = 0, end = kept, with_kept = 0;
    std::vector<std::int64_t> of_sequence(static_cast<std::size_t>(sequences()));
    for (std::int64_t r = 0; r < rows_; ++r) {
      const auto i = std::size_t(r);
      errors.compare(double(index[i]), keeps(r) ? double(target(r)) : -1, 1e-9);
      errors.compare(double(order[std::size_t(keeps(r) ? begin++ : end++)]), double(r), 1e-9);
      if (length_ > 0 && keeps(r)) with_kept += of_sequence[std::size_t(r / length_)]++ == 0;
    }
    for (std::int64_t r = 0; r < rows_; ++r) {
      if (!keeps(r)) continue;
      const double by = length_ > 0 ? double(with_kept) * double(of_sequence[std::size_t(r / length_)]) : double(kept);
      errors.compare(double(coefficient[std::size_t(r)]), 1 / by, 1e-6 / by);
    }
    return errors.worst();
  }

 private:
  std::int64_t sequences() const { return length_ == 0 ? 0 : rows_ / length_; }

  const std::int64_t rows_, length_;
  Random random_{5};
  const Repeated<std::int64_t> target_;
  const Repeated<std::uint8_t> mask_;
  const Array<std::int64_t> index_, order_, kept_;
  const Array<float> coefficient_, loss_;
  const Array<PlanChunk> chunks_;
  const Array<double> sequence_weight_;
  const Array<std::int64_t> sequence_chunks_;
  RowPlanWork<float> work_{};
};

Case plan_case(std::int64_t rows, std::int64_t length = 0) {
  const auto name = "plan " + std::to_string(rows) + (length > 0 ? " sequences of " + std::to_string(length) : "");
  return {name, [=] {
            const auto small = kEmulated ? std::min<std::int64_t>(rows, 9000) / 512 * 512 : rows;
            const auto plan = std::make_shared<Plan>(small, length, 1000);
            return Job{double(small) * (8 + 1 + 8 + 8 + 4),
                       [plan](cudaStream_t stream) { plan_rows(plan->work(), stream); },
                       [plan] { return plan->error(); },
                       plan->results(),
                       {}};
          }};
}

// What the library does for a scalar loss: the plan, the rows, the sum of their losses.
template <class T>
Case step_case(Shape of, Mode mode) {
  const auto name =
      std::string("step ") + (mode == Mode::Forward ? "forward " : "f+b ") + dtype_name<T>() + " " + text(of);
  return {
      name, [=]() mutable {
        if (kEmulated) of.rows = std::min<std::int64_t>(of.rows, 600);
        const auto C = of.classes, N = of.rows;
        const auto plan = std::make_shared<Plan>(N, 0, C);
        Random random(7);
        const Repeated<T> logits(N * C, [&] { return element<T>(random.normal(2)); });
        const Array<T> gradient(mode == Mode::Forward ? 0 : N * C);
        const Array<float> sum(1);
        const Array<double> partials(plan_chunks(N));
        CrossEntropyCall<T, float> call{};
        auto& work = call.work;
        work.rows = make_rows<4>({N}, {{C}, {C}, {}, {}});
        work.classes = C;
        work.logits = logits.data();
        work.gradient = mode == Mode::Forward ? nullptr : gradient.data();
        work.logits_stride = work.gradient_stride = work.class_mask_stride = work.probabilities_stride = 1;
        work.index = plan->work().index;
        work.coefficient = plan->work().coefficient;
        work.loss = plan->work().loss;
        call.order = plan->work().order;
        call.kept = plan->work().kept;
        const auto regime = pick(call, mode);
        const auto parts = parts_of(call, regime);
        const auto run = [=](cudaStream_t stream) {
          plan_rows(plan->work(), stream);
          run_cross_entropy(call, mode, regime, machine.multiprocessors, stream);
          sum_losses(plan->loss().data(), N, partials.data(), sum.data(), stream);
          (void)logits, (void)gradient, (void)parts;
        };
        const auto error = [=] {
          double expected = 0;
          for (std::int64_t r = 0; r < N; ++r) {
            if (!plan->keeps(r)) continue;
            double total = 0;
            for (std::int64_t c = 0; c < C; ++c) total += std::exp(number(logits[r * C + c]));
            expected += std::log(total) - number(logits[r * C + plan->target(r)]);
          }
          expected /= double(plan->kept());
          Errors errors;
          errors.compare(double(sum.host(0)), expected, 1e-5 * expected);
          return errors.worst();
        };
        return Job{
            double(N * C) * sizeof(T) * (mode == Mode::Forward ? 1 : 2), run, error, {{sum.data(), sizeof(float)}}, {}};
      }};
}

template <class T>
Case scale_case(std::int64_t n, double by) {
  const auto name =
      std::string("scale_gradient ") + dtype_name<T>() + " " + std::to_string(n) + " by " + (by == 1 ? "1" : "-1");
  return {name, [=] {
            const auto size = bench::shrunk(n, 5000);
            Random random(9);
            const Repeated<T> before(size, [&] { return element<T>(random.normal(1)); });
            const Array<float> factor(std::vector<float>{float(by)});
            // Only the first of the calls is checked; the others turn the signs again and again.
            const auto run = [=](cudaStream_t stream) {
              scale_gradient(before.data(), size, factor.data(), machine.multiprocessors, stream);
            };
            const auto error = [=] {
              Errors errors;
              for (const auto i : sample(size, 40)) {
                errors.compare(number(before.host(i)), number(before[i]) * by, 1e-30);
              }
              return errors.worst();
            };
            return Job{by == 1 ? 4.0 : 2.0 * double(size) * sizeof(T),
                       run,
                       error,
                       {{before.data(), std::size_t(size) * sizeof(T), true}},
                       {}};
          }};
}

}  // namespace

std::vector<Case> cross_entropy_cases() {
  using bf16 = __nv_bfloat16;
  constexpr auto forward = Mode::Forward, both = Mode::ForwardGrad, backward = Mode::Backward;
  std::vector<Case> cases;
  const auto add = [&](Case one) { cases.push_back(std::move(one)); };
  for (const Shape of : {Shape{32768, 1024},
                         {32768, 4096},
                         {32768, 16384},
                         {16384, 32768},
                         {16384, 65536},
                         {16384, 131072},
                         {8192, 262144},
                         {262144, 256},
                         {1 << 20, 32},
                         {1 << 22, 2}}) {
    add(rows_case<bf16>(of, both));
  }
  for (const Shape of : {Shape{32768, 4096}, {16384, 32768}, {8192, 131072}}) add(rows_case<float>(of, both));
  add(rows_case<__half>({16384, 32768}, both));
  for (const Shape of : {Shape{65536, 1024},
                         {32768, 4096},
                         {32768, 16384},
                         {16384, 32768},
                         {16384, 131072},
                         {262144, 256},
                         {1 << 22, 2}}) {
    add(rows_case<bf16>(of, forward));
  }
  add(rows_case<float>({16384, 32768}, forward));
  for (const Shape of : {Shape{32768, 1024}, {32768, 4096}, {16384, 32768}, {16384, 131072}}) {
    add(rows_case<bf16>(of, backward));
  }
  add(rows_case<float>({16384, 32768}, backward));
  for (const double kept : {0.2, 0.5}) add(rows_case<bf16>({8192, 128256, 0, kept}, both));
  for (const Shape of : {Shape{8192, 50257}, {8192, 151643}}) add(rows_case<bf16>(of, both));
  for (const auto extra :
       {Extra::None, Extra::ClassMask, Extra::EachMask, Extra::Smoothing, Extra::Weight, Extra::ZLoss}) {
    add(rows_case<bf16>({8192, 32000}, both, extra));
  }
  for (const auto mode : {both, forward, backward}) add(rows_case<bf16>({2048, 32000}, mode, Extra::Probabilities));
  add(rows_case<float>({2048, 32000}, both, Extra::Probabilities));
  add(rows_case<float>({16 * 512 * 512, 21, 512 * 512}, both));
  add(rows_case<bf16>({16 * 256 * 256, 150, 256 * 256}, both));
  add(rows_case<float>({32 * 512, 1000, 512}, both));
  for (const auto mode : {both, forward}) {
    for (const Shape of : {Shape{1, 262144}, {7, 262144}, {64, 128256}}) add(rows_case<bf16>(of, mode));
  }
  for (const std::int64_t rows : {1024, 2048, 32768, 262144, 1 << 22}) add(plan_case(rows));
  add(plan_case(32768, 512));
  for (const Shape of : {Shape{8, 10}, {32, 100}, {256, 1000}, {1024, 1024}, {32768, 256}}) {
    add(step_case<float>(of, forward));
    add(step_case<float>(of, both));
  }
  add(scale_case<bf16>(1 << 28, 1));
  add(scale_case<bf16>(1 << 28, -1));
  return cases;
}

}  // namespace masked_loss::cuda::bench
