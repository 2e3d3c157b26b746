// The kernels of the losses of elements against their formulas in double precision, and divisors against a loop.
#include "cuda/pointwise_kernel.h"

#include "kernels.h"

namespace masked_loss::cuda::test {
namespace {

// How an operand lies under a matrix of lines; Absent ones have no data.
enum class Layout { Absent, Dense, Apart, Transposed, OfLines, OfColumns, Number };

// A matrix's values, and where each of them lies.
template <class T>
class Matrix {
 public:
  Matrix(Layout layout, std::int64_t lines, std::int64_t length, std::size_t shift = 0)
      : layout_(layout), lines_(lines), length_(length), buffer_(size(layout, lines, length), shift) {}

  T& at(std::int64_t i) { return buffer_[offset(i)]; }
  Buffer<T>& values() { return buffer_; }
  bool given() const { return layout_ != Layout::Absent; }
  // Whether no two elements share a value.
  bool is_own() const { return layout_ == Layout::Dense || layout_ == Layout::Apart || layout_ == Layout::Transposed; }

  Operand operand() {
    Operand operand{};
    if (!given()) return operand;
    operand.data = buffer_.data();
    const auto n = lines_ * length_;
    switch (layout_) {
      case Layout::Dense: operand.at = make_rows<1>({n}, {{1}}); break;
      case Layout::Number: operand.at = n == 1 ? make_rows<1>({}, {{}}) : make_rows<1>({n}, {{0}}); break;
      case Layout::Apart: operand.at = make_rows<1>({lines_, length_}, {{length_ + 3, 1}}); break;
      case Layout::Transposed: operand.at = make_rows<1>({lines_, length_}, {{1, lines_}}); break;
      case Layout::OfLines: operand.at = make_rows<1>({lines_, length_}, {{1, 0}}); break;
      default: operand.at = make_rows<1>({lines_, length_}, {{0, 1}}); break;
    }
    return operand;
  }

 private:
  static std::size_t size(Layout layout, std::int64_t lines, std::int64_t length) {
    switch (layout) {
      case Layout::Absent: return 0;
      case Layout::Number: return 1;
      case Layout::Apart: return lines * (length + 3);
      case Layout::OfLines: return lines;
      case Layout::OfColumns: return length;
      default: return lines * length;
    }
  }
  std::int64_t offset(std::int64_t i) const {
    const auto line = i / length_, column = i % length_;
    switch (layout_) {
      case Layout::Number: return 0;
      case Layout::Apart: return line * (length_ + 3) + column;
      case Layout::Transposed: return column * lines_ + line;
      case Layout::OfLines: return line;
      case Layout::OfColumns: return column;
      default: return i;
    }
  }

  Layout layout_;
  std::int64_t lines_, length_;
  Buffer<T> buffer_;
};

struct Case {
  std::int64_t lines = 1, length = 1;
  Layout input = Layout::Dense, target = Layout::Dense, mask = Layout::Dense;
  Layout sample_weight = Layout::Absent, share = Layout::Absent, weight = Layout::Absent, coefficient = Layout::Absent;
  std::size_t shift = 0;  // of what is read, from multiples of 16 bytes
  double divisor = 1;
};

template <class Formula, class T>
class Problem {
 public:
  using A = std::conditional_t<std::is_same_v<T, double>, double, float>;

  explicit Problem(const Case& of)
      : of_(of),
        n_(of.lines * of.length),
        input_(make<T>(of.input)),
        target_(make<T>(of.target)),
        other_(make<T>(Formula::takes_other ? of.target : Layout::Absent)),
        mask_(make<unsigned char>(of.mask)),
        sample_weight_(make<A>(of.sample_weight)),
        share_(make<A>(of.share)),
        weight_(make<A>(of.weight)),
        coefficient_(make<A>(of.coefficient)),
        loss_(n_),
        gradient_(n_),
        other_gradient_(n_),
        partials_(kMaxChunks) {
    const FormulaValues<Formula> values;
    fill(input_, values.input_from, values.input_to);
    fill(target_, values.target_from, values.target_to);
    fill(other_, 0.1, 2);
    for (auto* factor : {&sample_weight_, &share_, &weight_, &coefficient_}) fill(*factor, 0.5, 2);
    // Some packs are not kept at all. What lies where nothing is kept may be anything.
    for (std::size_t i = 0; i < mask_.values().size(); ++i) {
      mask_.values()[i] = mask_byte(random_() % 2 != 0 && i / 8 % 3 != 0, random_);
    }
    for (auto* dropping : {&sample_weight_, &share_}) {
      for (A& w : dropping->values()) w = random_() % 5 == 0 ? A(0) : w;
    }
    for (std::int64_t i = 0; i < n_; ++i) {
      if (!keeps(i)) poison(input_, i), poison(target_, i), poison(other_, i), poison(coefficient_, i);
    }
    expect(values.numbers);
  }

  void check() {
    PointwiseWork<A> work{};
    work.count = n_;
    work.input = input_.operand();
    work.target = target_.operand();
    work.other = other_.operand();
    work.mask = mask_.operand();
    work.sample_weight = sample_weight_.operand();
    work.share = share_.operand();
    work.weight = weight_.operand();
    work.coefficient = coefficient_.operand();
    std::copy_n(FormulaValues<Formula>().numbers, kPointwiseNumbers, work.numbers);
    const PointwiseDivisor divisor{of_.divisor, 1 / of_.divisor};
    A sum = -7;
    const auto run = [&](A* sum) {
      const PointwiseTotal<A> total{sum, partials_.data(), of_.divisor == 1 ? nullptr : &divisor, false};
      run_pointwise<T>(formula_index<Formula>(), work, total, nullptr);
    };
    run(&sum);  // the sum alone
    ASSERT_NEAR(sum, expected_sum_, tolerance<A>(size_of_sum_));
    work.loss = loss_.data();
    work.gradient = gradient_.data();
    work.other_gradient = Formula::has_other_slope ? other_gradient_.data() : nullptr;
    run(nullptr);
    A again = -7;
    run(&again);
    ASSERT_EQ(std::memcmp(&sum, &again, sizeof(A)), 0);
    for (std::int64_t i = 0; i < n_; ++i) {
      const auto& wanted = expected_[i];
      check_number<A>(loss_[i], wanted.value, i);
      check_number<T>(gradient_[i], wanted.input, i);
      if (Formula::has_other_slope) check_number<T>(other_gradient_[i], wanted.other, i);
      if (::testing::Test::HasFailure()) return;
    }
  }

 private:
  template <class V>
  Matrix<V> make(Layout layout) {
    return {layout, of_.lines, of_.length, of_.shift};
  }
  template <class V>
  void fill(Matrix<V>& matrix, double from, double to) {
    std::uniform_real_distribution<double> uniform(from, to);
    for (V& x : matrix.values()) x = element<V>(uniform(random_));
  }
  template <class V>
  void poison(Matrix<V>& matrix, std::int64_t i) {
    if (matrix.is_own()) matrix.at(i) = element<V>(std::numeric_limits<double>::quiet_NaN());
  }
  bool keeps(std::int64_t i) {
    return of_.divisor != 0 && (!mask_.given() || mask_.at(i) != 0) &&
           (!sample_weight_.given() || sample_weight_.at(i) != 0) && (!share_.given() || share_.at(i) != 0);
  }
  void expect(const double* numbers) {
    for (std::int64_t i = 0; i < n_; ++i) {
      expected_.push_back({0, 0, 0});
      if (!keeps(i)) continue;
      auto& wanted = expected_.back();
      wanted = Formula::template at<ScalarMath<double>>(number(input_.at(i)), number(target_.at(i)),
                                                        other_.given() ? number(other_.at(i)) : Formula::safe_other,
                                                        numbers);
      double factor = 1;
      for (auto* matrix : {&sample_weight_, &share_, &weight_, &coefficient_}) {
        if (matrix->given()) factor *= matrix->at(i);
      }
      wanted = {wanted.value * factor, wanted.input * factor / of_.divisor, wanted.other * factor / of_.divisor};
      expected_sum_ += wanted.value / of_.divisor;
      size_of_sum_ += std::abs(wanted.value / of_.divisor);
    }
  }
  template <class V>
  static double tolerance(double size) {
    return 8 * kRounding<V> * (size + 0.1);
  }
  template <class V>
  void check_number(V actual, double expected, std::int64_t i) {
    ASSERT_NEAR(number(actual), expected, tolerance<V>(std::abs(expected))) << "element " << i;
    if (!keeps(i)) {
      ASSERT_FALSE(std::signbit(number(actual))) << "element " << i;
    }
  }

  const Case of_;
  const std::int64_t n_;
  std::mt19937 random_{7};
  Matrix<T> input_, target_, other_;
  Matrix<unsigned char> mask_;
  Matrix<A> sample_weight_, share_, weight_, coefficient_;
  Buffer<A> loss_;
  Buffer<T> gradient_, other_gradient_;
  Buffer<PointwiseSum> partials_;
  std::vector<PointwiseTerms<double>> expected_;
  double expected_sum_ = 0, size_of_sum_ = 0;
};

template <class T>
class PointwiseKernel : public ::testing::Test {
 protected:
  template <class Formula>
  static void check(const Case& of, int random_schedules = 0) {
    SCOPED_TRACE("formula " + std::to_string(formula_index<Formula>()) + ", " + std::to_string(of.lines) +
                 " lines of " + std::to_string(of.length) + ", shifted by " + std::to_string(of.shift));
    Problem<Formula, T> problem(of);
    with_schedules(random_schedules, [&] { problem.check(); });
  }
};

using Types = ::testing::Types<float, double, __nv_bfloat16, __half>;
TYPED_TEST_SUITE(PointwiseKernel, Types);

TYPED_TEST(PointwiseKernel, EveryFormula) {
  [&]<class... Formula>(std::tuple<Formula...>*) {
    (this->template check<Formula>({.length = 300, .sample_weight = Layout::Dense}), ...);
  }(static_cast<PointwiseFormulas*>(nullptr));
}

// Less than a pack, a tail, one block, several, each with more packs than threads; aligned and not.
TYPED_TEST(PointwiseKernel, Sizes) {
  for (const std::int64_t n : {1, 3, 16, 1001, 4096, 4099, 20000}) {
    if (kShort && n > 5000) continue;
    this->template check<formula::Mse>({.length = n}, 1);
    this->template check<formula::Huber>({.length = n, .shift = 1});
    this->template check<formula::Mse>({.length = n, .mask = Layout::Absent});
  }
}

// Lines of whole packs, lines that packs go beyond, and lines shorter than a pack.
TYPED_TEST(PointwiseKernel, Layouts) {
  constexpr Layout all[] = {Layout::Dense,   Layout::Apart,     Layout::Transposed,
                            Layout::OfLines, Layout::OfColumns, Layout::Number};
  for (const auto& [lines, length] : {std::pair<std::int64_t, std::int64_t>{40, 16}, {9, 37}, {70, 3}}) {
    for (const auto layout : all) {
      this->template check<formula::Mse>({.lines = lines, .length = length, .mask = layout});
      this->template check<formula::GaussianNll>({.lines = lines, .length = length, .target = layout});
      this->template check<formula::Mse>({.lines = lines, .length = length, .input = layout, .mask = Layout::OfLines});
      this->template check<formula::Mse>({.lines = lines, .length = length, .sample_weight = layout, .weight = layout});
    }
  }
}

TYPED_TEST(PointwiseKernel, Factors) {
  const Case of{.lines = 9,
                .length = 100,
                .sample_weight = Layout::OfColumns,
                .share = Layout::OfLines,
                .weight = Layout::Dense,
                .coefficient = Layout::Transposed};
  for (const double divisor : {1.0, 2.5, 0.0}) {
    auto with = of;
    with.divisor = divisor;
    this->template check<formula::L1>(with, 1);
    with.coefficient = Layout::Number;
    this->template check<formula::GaussianNll>(with);
  }
}

// What a mask of whole lines drops is not there at all.
TYPED_TEST(PointwiseKernel, MaskedLinesAreNotRead) {
  using A = typename Problem<formula::Mse, TypeParam>::A;
  constexpr std::int64_t lines = 6, length = 1000, n = lines * length, there = 2 * length;
  Buffer<TypeParam> input(there), target(there), gradient(n);
  Buffer<unsigned char> mask(lines);
  mask[0] = mask[1] = 1;
  for (TypeParam& x : input) x = element<TypeParam>(1);
  PointwiseWork<A> work{};
  work.count = n;
  for (auto [operand, data] : {std::pair(&work.input, input.data()), std::pair(&work.target, target.data())}) {
    operand->data = data;
    operand->at = make_rows<1>({n}, {{1}});
  }
  work.mask = {mask.data(), ElementType::Byte, make_rows<1>({lines, length}, {{1, 0}})};
  work.gradient = gradient.data();
  Buffer<PointwiseSum> partials(kMaxChunks);
  A sum = 0;
  run_pointwise<TypeParam>(formula_index<formula::Mse>(), work, {&sum, partials.data(), nullptr, false}, nullptr);
  EXPECT_EQ(sum, there);
  for (std::int64_t i = 0; i < n; ++i) ASSERT_EQ(number(gradient[i]), i < there ? 2 : 0) << i;
}

// Chunks of several tiles, as there are so many elements.
TEST(PointwiseKernel, ChunksGrow) {
  if (kShort) GTEST_SKIP() << "takes ThreadSanitizer too long";
  constexpr std::int64_t n = kMaxChunks * 2048 + 5;
  Buffer<float> input(n), target(1);
  for (std::int64_t i = 0; i < n; ++i) input[i] = float(i % 3);
  PointwiseWork<float> work{};
  work.count = n;
  work.input = {input.data(), ElementType::Float, make_rows<1>({n}, {{1}})};
  work.target = {target.data(), ElementType::Float, make_rows<1>({n}, {{0}})};
  Buffer<PointwiseSum> partials(kMaxChunks);
  float sum = 0;
  run_pointwise<float>(formula_index<formula::L1>(), work, {&sum, partials.data(), nullptr, false}, nullptr);
  double expected = 0;
  for (const float x : input) expected += x;
  EXPECT_EQ(sum, float(expected));
}

// Small losses are not lost beside a large one, and infinite ones stay infinite.
TEST(PointwiseKernel, SumsAreCompensated) {
  constexpr std::int64_t n = 40000;
  Buffer<float> input(n), target(1);
  for (const double first : {3e8, std::numeric_limits<double>::infinity()}) {
    std::fill(input.begin(), input.end(), 1.25f);
    input[0] = float(first);
    PointwiseWork<float> work{};
    work.count = n;
    work.input = {input.data(), ElementType::Float, make_rows<1>({n}, {{1}})};
    work.target = {target.data(), ElementType::Float, make_rows<1>({n}, {{0}})};
    Buffer<PointwiseSum> partials(kMaxChunks);
    float sum = 0;
    run_pointwise<float>(formula_index<formula::L1>(), work, {&sum, partials.data(), nullptr, false}, nullptr);
    const double expected = first + 1.25 * (n - 1);
    EXPECT_TRUE(sum == expected || std::abs(sum - expected) < 1e-7 * expected) << sum;
  }
}

// A mean whose divisor is counted beside the losses, in one block and in several.
TEST(PointwiseKernel, AMeanOfWhatIsKept) {
  for (const std::int64_t n : {100, 40001}) {
    for (const int every : {1, 3, 0}) {  // of which one is kept
      Buffer<float> input(n), target(1);
      Buffer<unsigned char> mask(n);
      double expected = 0, kept = 0;
      for (std::int64_t i = 0; i < n; ++i) {
        mask[i] = every != 0 && i % every == 0 ? 2 : 0;
        input[i] = mask[i] ? float(i % 7) : std::numeric_limits<float>::quiet_NaN();
        if (mask[i]) expected += i % 7, ++kept;
      }
      PointwiseWork<float> work{};
      work.count = n;
      work.input = {input.data(), ElementType::Float, make_rows<1>({n}, {{1}})};
      work.target = {target.data(), ElementType::Float, make_rows<1>({n}, {{0}})};
      work.mask = {mask.data(), ElementType::Byte, make_rows<1>({n}, {{1}})};
      Buffer<PointwiseSum> partials(kMaxChunks);
      float mean = -7;
      run_pointwise<float>(formula_index<formula::L1>(), work, {&mean, partials.data(), nullptr, true}, nullptr);
      EXPECT_EQ(mean, kept == 0 ? 0 : float(expected / kept)) << n << ' ' << every;
    }
  }
}

struct DivisorCase {
  std::int64_t sequences = 1, length = 1;
  bool by_sequence = false, shares = false;
  Layout mask = Layout::Dense, sample_weight = Layout::Absent, weight = Layout::Absent;
  double normalizer = -1;  // below 0: none
  std::size_t shift = 0;
};

template <class A>
class PointwiseDivisorKernel : public ::testing::Test {
 protected:
  static void check(const DivisorCase& of) {
    SCOPED_TRACE(std::to_string(of.sequences) + " sequences of " + std::to_string(of.length));
    std::mt19937 random(3);
    const auto n = of.sequences * of.length;
    Matrix<unsigned char> mask(of.mask, of.sequences, of.length, of.shift);
    Matrix<A> sample_weight(of.sample_weight, of.sequences, of.length, of.shift),
        weight(of.weight, of.sequences, of.length, of.shift);
    for (auto& m : mask.values()) m = mask_byte(random() % 3 != 0, random);
    for (A& w : sample_weight.values()) w = A(random() % 5) / 4;
    for (A& w : weight.values()) w = A(random() % 7) / 8;
    for (std::int64_t i = of.length; of.mask == Layout::Dense && of.sequences > 1 && i < 2 * of.length; ++i) {
      mask.at(i) = 0;  // an empty sequence
    }
    std::vector<PointwiseSum> sums(of.sequences);
    constexpr double times = 3;
    double total = 0, with_kept = 0;
    for (std::int64_t i = 0; i < n; ++i) {
      if (mask.given() && mask.at(i) == 0) continue;
      double w = times;
      if (sample_weight.given()) w *= sample_weight.at(i);
      if (w == 0) continue;
      if (weight.given()) w *= weight.at(i);
      auto& sum = sums[i / of.length];
      sum = {sum.weight + w, sum.kept + 1};
    }
    for (const auto& sum : sums) total += sum.weight, with_kept += sum.kept > 0;

    PointwiseWork<A> work{};
    work.count = n;
    work.mask = mask.operand();
    work.sample_weight = sample_weight.operand();
    work.weight = weight.operand();
    Buffer<A> shares(of.shares ? of.sequences : 0);
    Buffer<PointwiseSum> parts(kMaxParts);
    PointwiseDivisor divisor{};
    with_schedules(kShort ? 0 : 1, [&] {
      find_divisor<A>(work,
                      {of.sequences, of.length, of.by_sequence, times, of.normalizer < 0 ? nullptr : &of.normalizer,
                       of.shares ? shares.data() : nullptr, parts.data(), &divisor},
                      nullptr);
      const double expected = of.normalizer >= 0 ? of.normalizer : of.by_sequence ? with_kept : total;
      EXPECT_NEAR(divisor.value, expected, 1e-6 * expected);
      EXPECT_EQ(divisor.reciprocal, 1 / divisor.value);
      for (std::size_t s = 0; s < shares.size(); ++s) {
        const double share = sums[s].weight == 0 ? 0 : 1 / sums[s].weight;
        ASSERT_NEAR(shares[s], share, 1e-6 * share) << s;
      }
    });
  }
};

using Accumulations = ::testing::Types<float, double>;
TYPED_TEST_SUITE(PointwiseDivisorKernel, Accumulations);

TYPED_TEST(PointwiseDivisorKernel, Weights) {
  for (const std::int64_t length : {1, 15, 300, 5000, 40000}) {
    if (kShort && length > 5000) continue;
    this->check({.length = length});
    this->check({.length = length, .sample_weight = Layout::Dense, .shift = 1});
    this->check({.length = length, .mask = Layout::Absent, .weight = Layout::Dense});
  }
}

// A thread, a warp and a block each, and several blocks each.
TYPED_TEST(PointwiseDivisorKernel, Sequences) {
  for (const auto& [sequences, length] : {std::pair<std::int64_t, std::int64_t>{1, 40},
                                          {3000, 1},
                                          {40, 7},
                                          {30, 100},
                                          {11, 513},
                                          {5, 3000},
                                          {3, 40000}}) {
    if (kShort && sequences * length > 20000) continue;
    this->check({.sequences = sequences, .length = length, .by_sequence = true});
    this->check({.sequences = sequences,
                 .length = length,
                 .by_sequence = true,
                 .shares = true,
                 .sample_weight = Layout::OfColumns});
    this->check({.sequences = sequences,
                 .length = length,
                 .by_sequence = true,
                 .shares = true,
                 .weight = Layout::Dense,
                 .normalizer = 2.5});
  }
  if (!kShort) this->check({.sequences = 300000, .length = 2, .by_sequence = true, .shares = true});
}

TYPED_TEST(PointwiseDivisorKernel, Normalizer) {
  this->check({.normalizer = 7});
  PointwiseDivisor divisor{};
  for (const double normalizer : {0.0, -1.0}) {
    find_divisor<TypeParam>({}, {0, 0, false, 1, &normalizer, nullptr, nullptr, &divisor}, nullptr);
    if (normalizer < 0) {
      EXPECT_TRUE(std::isnan(divisor.value));
    } else {
      EXPECT_EQ(divisor.value, 0);
    }
  }
}

}  // namespace
}  // namespace masked_loss::cuda::test
