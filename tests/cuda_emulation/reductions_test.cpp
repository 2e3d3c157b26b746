// The kernels of the reductions against loops in double precision.
#include "cuda/reductions_kernel.h"

#include "kernels.h"

namespace masked_loss::cuda::test {
namespace {

// The moments over some dimensions of a tensor whose elements lie in `strides`; the mask lies in its own, or is absent.
struct Case {
  std::vector<std::int64_t> kept, reduced, kept_strides, reduced_strides;
  std::vector<std::int64_t> mask_kept_strides, mask_reduced_strides;
  bool masked = true;
  std::size_t shift = 0;  // of what is read, from multiples of 16 bytes
};

std::int64_t product(const std::vector<std::int64_t>& sizes) {
  std::int64_t result = 1;
  for (const auto size : sizes) result *= size;
  return result;
}

// One more than the last place.
std::int64_t extent(const Rows<2>& kept, const Rows<2>& reduced, int operand) {
  std::int64_t last = 0;
  for (const auto* rows : {&kept, &reduced}) {
    if (rows->count == 0) return 0;
    for (int d = 0; d < rows->dims; ++d) last += (rows->sizes[d] - 1) * rows->strides[operand][d];
  }
  return last + 1;
}

template <class T>
class MomentsProblem {
 public:
  using A = std::conditional_t<std::is_same_v<T, double>, double, float>;

  explicit MomentsProblem(const Case& of, double mean = 2)
      : kept_(make_rows<2>(of.kept, {of.kept_strides, of.mask_kept_strides})),
        reduced_(make_rows<2>(of.reduced, {of.reduced_strides, of.mask_reduced_strides})),
        input_(extent(kept_, reduced_, 0), of.shift),
        mask_(of.masked ? extent(kept_, reduced_, 1) : 0, of.shift) {
    std::mt19937 random(5);
    std::normal_distribution<double> normal(mean, 1);
    for (T& x : input_) x = element<T>(normal(random));
    // Some packs are not kept at all.
    for (std::size_t i = 0; i < mask_.size(); ++i) mask_[i] = mask_byte(random() % 2 == 0 && i / 8 % 3 != 1, random);
    if (!of.masked) return;
    // What is nowhere kept may be anything.
    std::vector<bool> read(input_.size());
    each([&](std::int64_t, std::int64_t at, bool keep) { read[at] = read[at] || keep; });
    for (std::size_t i = 0; i < input_.size(); ++i) {
      if (!read[i]) input_[i] = element<T>(std::numeric_limits<double>::quiet_NaN());
    }
  }

  Buffer<T>& input() { return input_; }

  void check(double tolerance = 8 * kRounding<A>) {
    for (const int order : {0, 1, 2}) {
      const auto rows = std::size_t(kept_.count);
      std::vector<double> sums(rows), sizes(rows), means(rows), squares(rows);
      std::vector<std::int64_t> counts(rows);
      each([&](std::int64_t row, std::int64_t at, bool keep) {
        if (keep) ++counts[row], sums[row] += number(input_[at]), sizes[row] += std::abs(number(input_[at]));
      });
      for (std::size_t r = 0; r < rows; ++r) means[r] = counts[r] == 0 ? 0 : sums[r] / double(counts[r]);
      each([&](std::int64_t row, std::int64_t at, bool keep) {
        if (keep) squares[row] += (number(input_[at]) - means[row]) * (number(input_[at]) - means[row]);
      });
      Buffer<A> first(rows), second(rows), again(rows);
      Buffer<std::int64_t> count(rows);
      run(order, first, second, count);
      for (std::size_t r = 0; r < rows; ++r) {
        if (order > 0) {
          ASSERT_EQ(count[r], counts[r]) << "row " << r;
        }
        const double size = sizes[r] / (order == 0 ? 1 : std::max<double>(1, double(counts[r])));
        ASSERT_NEAR(first[r], order == 0 ? sums[r] : means[r], tolerance * size) << "row " << r;
        if (order == 2) {
          ASSERT_NEAR(second[r], squares[r], tolerance * squares[r]) << "row " << r;
        }
      }
      run(order, again, second, count);
      ASSERT_EQ(std::memcmp(first.data(), again.data(), rows * sizeof(A)), 0);
    }
  }

  void run(int order, Buffer<A>& first, Buffer<A>& second, Buffer<std::int64_t>& count) {
    const MomentsWork<T> work{kept_, reduced_, input_.data(), mask_.size() == 0 ? nullptr : mask_.data()};
    Buffer<char> memory(moments_bytes(work));
    find_moments(
        work, order, memory.data(),
        MomentsResult<A>{first.data(), order < 2 ? nullptr : second.data(), order < 1 ? nullptr : count.data()},
        nullptr);
  }

 private:
  template <class Body>
  void each(const Body& body) {
    for (std::int64_t row = 0; row < kept_.count; ++row) {
      const auto base = kept_.offsets(row);
      for (std::int64_t i = 0; i < reduced_.count; ++i) {
        const auto at = reduced_.offsets(i);
        body(row, base[0] + at[0], mask_.size() == 0 || mask_[base[1] + at[1]] != 0);
      }
    }
  }

  Rows<2> kept_, reduced_;
  Buffer<T> input_;
  Buffer<std::uint8_t> mask_;
};

template <class T>
class MomentsKernel : public ::testing::Test {
 protected:
  static void check(const Case& of, int random_schedules = 0) {
    SCOPED_TRACE(std::to_string(product(of.kept)) + " rows of " + std::to_string(product(of.reduced)) +
                 ", shifted by " + std::to_string(of.shift));
    MomentsProblem<T> problem(of);
    with_schedules(random_schedules, [&] { problem.check(); });
  }
};

using Types = ::testing::Types<float, double, __nv_bfloat16, __half>;
TYPED_TEST_SUITE(MomentsKernel, Types);

// Rows of [rows, length], with a line of the mask each.
Case lines(std::int64_t rows, std::int64_t length) { return {{rows}, {length}, {length}, {1}, {length}, {1}}; }
// Of [length, rows].
Case columns(std::int64_t rows, std::int64_t length) { return {{rows}, {length}, {1}, {rows}, {1}, {rows}}; }

// Less than a pack, one to 32 threads a row, a block a row, several; aligned and not.
TYPED_TEST(MomentsKernel, Lines) {
  for (const auto& [rows, length] :
       {std::pair<std::int64_t, std::int64_t>{5, 1}, {70, 3}, {33, 16}, {9, 200}, {3, 1001}, {2, 5003}, {1, 20000}}) {
    if (kShort && length > 5003) continue;
    auto of = lines(rows, length);
    this->check(of, 1);
    of.shift = 1;
    this->check(of);
    of.masked = false;
    this->check(of);
  }
  this->check({{}, {4099}, {}, {1}, {}, {1}}, 1);
}

// Lines of a row that lie apart, elements of a line that do, and masks that repeat along rows or lines.
TYPED_TEST(MomentsKernel, LinesApart) {
  for (const std::int64_t length : {3, 16, 37}) {
    Case of{{6}, {5, length}, {length}, {6 * length, 1}, {length}, {6 * length, 1}};  // [5, 6, length]
    this->check(of, 1);
    of.mask_reduced_strides = {6, 0}, of.mask_kept_strides = {1};
    this->check(of);
    of.mask_reduced_strides = {0, 1}, of.mask_kept_strides = {0}, of.shift = 1;
    this->check(of);
    this->check({{6}, {length, 5}, {5 * length * 2}, {10, 2}, {1}, {30, 6}});
  }
}

// One thread over a tile of columns, several, several tiles; rows that are aligned and not; few elements and parts.
TYPED_TEST(MomentsKernel, Columns) {
  for (const auto& [rows, length] :
       {std::pair<std::int64_t, std::int64_t>{2, 3}, {3, 2000}, {40, 7}, {40, 300}, {300, 50}, {131, 700}}) {
    if (kShort && rows * length > 6000) continue;
    auto of = columns(rows, length);
    this->check(of, 1);
    of.shift = 1;
    this->check(of);
    of.shift = 0, of.masked = false;
    this->check(of);
    of.masked = true, of.mask_kept_strides = {0}, of.mask_reduced_strides = {1};
    this->check(of);
    of.mask_kept_strides = {1}, of.mask_reduced_strides = {0};
    this->check(of);
  }
  if (kShort) return;
  this->check({{7, 24}, {50}, {50 * 24, 1}, {24}, {50 * 24, 1}, {24}}, 1);    // [7, 50, 24]
  this->check({{7, 5}, {3, 9}, {45, 1}, {7 * 45, 5}, {45, 1}, {7 * 45, 5}});  // [3, 7, 9, 5]
}

// So many rows that their parts are merged by a warp, and by a thread each.
TYPED_TEST(MomentsKernel, PartsOfManyRows) {
  if (kShort) GTEST_SKIP() << "takes ThreadSanitizer too long";
  this->check(columns(100, 600));
  this->check(columns(8200, 200));
}

TYPED_TEST(MomentsKernel, NothingToReduce) {
  auto of = lines(5, 0);
  this->check(of);
  this->check(lines(0, 5));
}

// Around a mean that is large beside the deviations, and after a first element far away.
TEST(MomentsKernel, VariancesAreStable) {
  if (kShort) GTEST_SKIP() << "about numbers alone";
  for (const auto& of : {lines(2, 12000), columns(20, 3000)}) {
    auto all = of;
    all.masked = false;
    MomentsProblem<float> problem(all, 4000);
    problem.check(2e-6);
    problem.input()[0] = -1e6f;
    problem.check(2e-6);
  }
}

TEST(MomentsKernel, SumsAreCompensated) {
  if (kShort) GTEST_SKIP() << "about numbers alone";
  for (const auto& of : {lines(2, 12000), columns(20, 3000)}) {
    auto all = of;
    all.masked = false;
    MomentsProblem<float> problem(all);
    std::fill(problem.input().begin(), problem.input().end(), 1.25f);
    problem.input()[0] = 3e8f;
    problem.check(5e-7);
    problem.input()[0] = std::numeric_limits<float>::infinity();
    const auto rows = std::size_t(of.kept[0]);
    Buffer<float> first(rows), second(rows);
    Buffer<std::int64_t> count(rows);
    problem.run(1, first, second, count);
    EXPECT_EQ(first[0], std::numeric_limits<float>::infinity());
    EXPECT_TRUE(std::isfinite(first[1]));
    problem.run(2, first, second, count);
    EXPECT_TRUE(std::isnan(second[0]));
    EXPECT_TRUE(std::isfinite(second[1]));
  }
}

// What a mask of whole lines, or of elements of all columns, drops is not there at all.
TYPED_TEST(MomentsKernel, MaskedLinesAreNotRead) {
  using A = typename MomentsProblem<TypeParam>::A;
  constexpr std::int64_t length = 64, columns = 96, there = 32;
  for (const bool by_columns : {false, true}) {
    Buffer<TypeParam> input(by_columns ? there * columns : there);
    for (TypeParam& x : input) x = element<TypeParam>(1);
    Buffer<std::uint8_t> mask(length);
    std::fill_n(mask.data(), by_columns ? there : 1, 1);
    const auto rows = by_columns ? columns : 1;
    const MomentsWork<TypeParam> work{
        by_columns ? make_rows<2>({columns}, {{1}, {0}}) : make_rows<2>({}, {{}, {}}),
        by_columns ? make_rows<2>({length}, {{columns}, {1}}) : make_rows<2>({2, there}, {{there, 1}, {1, 0}}),
        input.data(), mask.data()};
    Buffer<A> first(rows), second(rows);
    Buffer<std::int64_t> count(rows);
    Buffer<char> memory(moments_bytes(work));
    for (const int order : {1, 2}) {
      const MomentsResult<A> result{first.data(), order == 1 ? nullptr : second.data(), count.data()};
      find_moments(work, order, memory.data(), result, nullptr);
      for (std::int64_t r = 0; r < rows; ++r) {
        ASSERT_EQ(first[r], 1) << r;
        ASSERT_EQ(count[r], there) << r;
      }
    }
  }
}

template <class T>
class AffineKernel : public ::testing::Test {
 protected:
  using A = std::conditional_t<std::is_same_v<T, double>, double, float>;

  // Of [lines, length]: a number, one a line, one a column, or all of them.
  static Operand operand(Buffer<A>& values, std::int64_t lines, std::int64_t length) {
    const auto n = std::int64_t(values.size());
    if (n == 1) return {values.data(), {}, make_rows<1>({lines * length}, {{0}})};
    if (n == lines * length) return {values.data(), {}, make_rows<1>({n}, {{1}})};
    return {values.data(),
            {},
            make_rows<1>({lines, length},
                         {n == lines ? std::vector<std::int64_t>{1, 0} : std::vector<std::int64_t>{0, 1}})};
  }

  static void check(std::int64_t lines, std::int64_t length, std::int64_t scales, bool with_input, bool with_offset,
                    bool masked, std::size_t shift) {
    const auto n = lines * length;
    std::mt19937 random(9);
    std::normal_distribution<double> normal;
    Buffer<T> input(n, shift), result(n);
    Buffer<A> wide(n);
    Buffer<A> scale(scales, shift), mean(scales, shift), offset(scales, shift);
    Buffer<std::uint8_t> mask(masked ? n : 0, shift);
    for (T& x : input) x = element<T>(normal(random));
    for (auto* values : {&scale, &mean, &offset}) {
      for (A& x : *values) x = A(normal(random));
    }
    for (std::size_t i = 0; i < mask.size(); ++i) {
      mask[i] = mask_byte(random() % 2 != 0 && i / 8 % 3 != 0, random);
      if (mask[i] == 0) input[i] = element<T>(std::numeric_limits<double>::quiet_NaN());
    }
    AffineWork work{n, operand(scale, lines, length), {}, {}, {}, {}, result.data()};
    if (with_input) {
      work.input = {input.data(), {}, make_rows<1>({n}, {{1}})};
      work.mean = operand(mean, lines, length);
    }
    if (with_offset) work.offset = operand(offset, lines, length);
    if (masked) work.mask = {mask.data(), {}, make_rows<1>({n}, {{1}})};
    affine<T>(work, nullptr);
    work.result = wide.data();
    affine_wide<T>(work, nullptr);
    const auto of = [&](Buffer<A>& values, std::int64_t i) {
      return double(values[scales == 1 ? 0 : scales == n ? i : scales == lines ? i / length : i % length]);
    };
    for (std::int64_t i = 0; i < n; ++i) {
      double wanted = of(scale, i), size = std::abs(wanted);
      if (with_input) {
        size *= std::abs(number(input[i])) + std::abs(of(mean, i));
        wanted *= number(input[i]) - of(mean, i);
      }
      if (with_offset) wanted += of(offset, i), size += std::abs(of(offset, i));
      if (masked && mask[i] == 0) {
        ASSERT_EQ(number(result[i]), 0) << i;
        ASSERT_FALSE(std::signbit(number(result[i]))) << i;
        ASSERT_EQ(wide[i], 0) << i;
      } else {
        ASSERT_NEAR(wide[i], wanted, kRounding<A> * size) << i;
        ASSERT_NEAR(number(result[i]), wanted, kRounding<T> * size) << i;
      }
    }
  }
};

TYPED_TEST_SUITE(AffineKernel, Types);

TYPED_TEST(AffineKernel, EveryForm) {
  if (kShort) GTEST_SKIP() << "no thread waits for another one";
  for (const auto& [lines, length] : {std::pair<std::int64_t, std::int64_t>{1, 1}, {3, 5}, {40, 37}, {9, 512}}) {
    for (const auto scales : {std::int64_t(1), lines, length, lines * length}) {
      for (const auto& [with_input, with_offset] : {std::pair{false, false}, {true, false}, {true, true}}) {
        this->check(lines, length, scales, with_input, with_offset, true, 0);
      }
      this->check(lines, length, scales, true, true, false, 1);
    }
  }
}

}  // namespace
}  // namespace masked_loss::cuda::test
