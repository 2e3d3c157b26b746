// The kernels of the row plan against a loop over csrc/common's resolve_row.
#include "cuda/row_plan_kernel.h"

#include "kernels.h"

namespace masked_loss::cuda::test {
namespace {

struct Case {
  std::int64_t rows;
  std::int64_t sequence_length = 0;  // 0: no mean over sequences
  Divisor divisor = Divisor::Weights;
  double normalizer = 3;
  int target_bytes = 8, mask_bytes = 1;
  bool out_of_range = false;
};

template <class A>
class Problem {
 public:
  explicit Problem(const Case& of)
      : of_(of),
        target_(of.rows * of.target_bytes),
        mask_(of.rows * of.mask_bytes),
        sample_weight_(of.rows),
        weight_(kClasses),
        upstream_(of.rows),
        index_(of.rows),
        order_(of.rows),
        kept_(1),
        coefficient_(of.rows),
        loss_(of.rows),
        softmax_(of.rows),
        normalizer_(1),
        chunks_(std::max<std::int64_t>(1, plan_chunks(of.rows))),
        sequence_weight_(sequences()),
        sequence_chunks_(std::max<std::int64_t>(1, plan_chunks(sequences()))) {
    std::mt19937 random(unsigned(of.rows));
    for (A& w : weight_) w = A(1 + random() % 4) / 2;
    normalizer_[0] = of.normalizer;
    for (std::int64_t r = 0; r < of.rows; ++r) {
      std::int64_t target = random() % kClasses;
      if (of.out_of_range && r % 97 == 13) target = kClasses + 5;
      std::memcpy(target_.data() + r * of.target_bytes, &target, of.target_bytes);
      mask_[(r + 1) * of.mask_bytes - 1] = mask_byte(random() % 3 != 0, random);  // the highest byte alone
      sample_weight_[r] = random() % 5 == 0 ? A(0) : A(1 + random() % 8) / 4;
      upstream_[r] = A(1 + random() % 3);
    }
  }

  void check() {
    RowPlanWork<A> work{};
    work.view = view();
    work.rows = make_rows<4>({of_.rows}, {{1}, {1}, {1}, {}});
    work.divisor = of_.divisor;
    work.normalizer = normalizer_.data();
    if (of_.sequence_length > 0) {
      work.sequences = sequences();
      work.sequence_length = of_.sequence_length;
      work.by_length = Quotient(of_.sequence_length);
      work.sequence_weight = sequence_weight_.data();
      work.sequence_chunks = sequence_chunks_.data();
    }
    work.upstream = upstream_.data();
    work.upstream_rows = make_rows<1>({of_.rows}, {{1}});
    work.chunks = chunks_.data();
    work.index = index_.data();
    work.coefficient = coefficient_.data();
    work.order = order_.data();
    work.kept = kept_.data();
    work.loss = loss_.data();
    work.softmax = softmax_.data();
    std::fill(loss_.begin(), loss_.end(), A(7));
    plan_rows(work, nullptr);
    compare();
    A sum = -1;
    sum_weights(work.chunks, plan_chunks(of_.rows), &sum, nullptr);
    EXPECT_NEAR(double(sum), total_, 1e-6 * (1 + total_));
  }

 private:
  static constexpr std::int64_t kClasses = 11;

  std::int64_t sequences() const { return of_.sequence_length == 0 ? 0 : of_.rows / of_.sequence_length; }

  RowRule<A> view() {
    RowRule<A> view{};
    view.target = target_.data();
    view.target_bytes = of_.target_bytes;
    view.mask = mask_.data();
    view.mask_bytes = of_.mask_bytes;
    view.sample_weight = sample_weight_.data();
    view.weight = weight_.data();
    view.classes = kClasses;
    view.ignored[0] = 2;
    view.ignored_count = 1;
    return view;
  }

  void compare() {
    std::vector<Row<A>> rows;
    std::vector<double> sequence_weight(sequences());
    std::vector<std::int64_t> sequence_kept(sequences());
    total_ = 0;
    std::int64_t kept = 0, first = of_.rows;
    for (std::int64_t r = 0; r < of_.rows; ++r) {
      rows.push_back(resolve_row(view(), r, r, r, 0));
      const auto& row = rows.back();
      if (row.state == RowState::Masked) continue;
      ++kept;
      if (row.state == RowState::OutOfRange) first = std::min(first, r);
      total_ += row.counted;
      if (sequences() > 0) {
        sequence_weight[r / of_.sequence_length] += row.counted;
        ++sequence_kept[r / of_.sequence_length];
      }
    }
    std::int64_t found = of_.rows;
    for (std::int64_t c = 0; c < plan_chunks(of_.rows); ++c) found = std::min(found, chunks_[c].first);
    EXPECT_EQ(found, first);
    double divisor = of_.divisor == Divisor::Normalizer ? of_.normalizer : total_;
    if (sequences() > 0 && of_.divisor != Divisor::Normalizer) {
      divisor = double(std::count_if(sequence_kept.begin(), sequence_kept.end(), [](auto n) { return n > 0; }));
    }
    ASSERT_EQ(kept_[0], kept);
    std::vector<bool> seen(of_.rows);
    for (std::int64_t i = 0; i < of_.rows; ++i) {
      const auto r = order_[i];
      ASSERT_TRUE(r >= 0 && r < of_.rows && !seen[r]) << "order " << i << " " << r;
      seen[r] = true;
      ASSERT_EQ(rows[r].state != RowState::Masked, i < kept) << "order " << i;
    }
    for (std::int64_t r = 0; r < of_.rows; ++r) {
      const auto& row = rows[r];
      double by = of_.divisor == Divisor::One && sequences() == 0 ? 1 : divisor;
      if (sequences() > 0) by *= sequence_weight[r / of_.sequence_length];
      if (row.state == RowState::Masked || by == 0) {
        ASSERT_EQ(index_[r], -1) << r;
        ASSERT_EQ(double(loss_[r]), 0) << r;
        ASSERT_EQ(double(softmax_[r].sum), 1) << r;
      } else if (row.state == RowState::OutOfRange) {
        ASSERT_EQ(index_[r], 0) << r;
        ASSERT_TRUE(std::isnan(coefficient_[r])) << r;
      } else {
        ASSERT_EQ(index_[r], row.index) << r;
        const double expected = double(row.weight) / by * double(upstream_[r]);
        ASSERT_NEAR(double(coefficient_[r]), expected, 1e-6 * expected) << r;
        ASSERT_EQ(double(loss_[r]), 7) << r;
      }
    }
  }

  const Case of_;
  Buffer<unsigned char> target_, mask_;
  Buffer<A> sample_weight_, weight_, upstream_;
  Buffer<std::int64_t> index_, order_, kept_;
  Buffer<A> coefficient_, loss_;
  Buffer<Softmax<A>> softmax_;
  Buffer<double> normalizer_;
  Buffer<PlanChunk> chunks_;
  Buffer<double> sequence_weight_;
  Buffer<std::int64_t> sequence_chunks_;
  double total_ = 0;
};

template <class A>
class RowPlanKernel : public ::testing::Test {
 protected:
  static void check(const Case& of) {
    SCOPED_TRACE("rows " + std::to_string(of.rows) + " of sequences of " + std::to_string(of.sequence_length));
    Problem<A> problem(of);
    with_schedules(kShort ? 0 : 2, [&] { problem.check(); });
  }
};

using Types = ::testing::Types<float, double>;
TYPED_TEST_SUITE(RowPlanKernel, Types);

TYPED_TEST(RowPlanKernel, OneBlock) {
  for (const std::int64_t rows : {0, 1, 31, 700, 2048}) this->check({.rows = rows});
  this->check({.rows = 300, .divisor = Divisor::One, .target_bytes = 4, .mask_bytes = 8});
  this->check({.rows = 300, .divisor = Divisor::Normalizer, .target_bytes = 1, .mask_bytes = 2});
  this->check({.rows = 300, .divisor = Divisor::Normalizer, .normalizer = 0});
  this->check({.rows = 300, .mask_bytes = 4, .out_of_range = true});
}

TYPED_TEST(RowPlanKernel, ManyBlocks) {
  for (const std::int64_t rows : {2049, 9000}) this->check({.rows = rows});
  this->check({.rows = 5000, .divisor = Divisor::One});
  this->check({.rows = 5000, .divisor = Divisor::Normalizer, .out_of_range = true});
}

TYPED_TEST(RowPlanKernel, Sequences) {
  for (const std::int64_t length : {1, 5, 40, 600, 1500}) this->check({.rows = 3000, .sequence_length = length});
  this->check({.rows = 600, .sequence_length = 20, .divisor = Divisor::Normalizer});
}

TYPED_TEST(RowPlanKernel, SumOfLosses) {
  for (const std::int64_t n : {0, 1, 1000, 16384, 16385, 70000}) {
    if (kShort && n > 20000) continue;
    Buffer<TypeParam> losses(n);
    Buffer<double> partials(std::max<std::int64_t>(1, plan_chunks(n)));
    double expected = 0;
    for (std::int64_t i = 0; i < n; ++i) expected += losses[i] = TypeParam(i % 9) / 8;
    with_schedules(1, [&] {
      TypeParam sum = -1;
      sum_losses(losses.data(), n, partials.data(), &sum, nullptr);
      EXPECT_EQ(double(sum), expected) << n;
    });
  }
}

}  // namespace
}  // namespace masked_loss::cuda::test
