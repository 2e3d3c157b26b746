// What the row kernels of the CPU can do that no op asks for yet: rows by a list, a gradient over its logits, and states
// beside a gradient; each for rows that are visited in blocks, in tiles, and in parts.
#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "cpu/cross_entropy_kernel.h"
#include "cpu/row_driver.h"

namespace masked_loss::cpu {
namespace {

// Logits [rows, classes], whose classes are contiguous or `rows` apart.
struct Problem {
  std::int64_t rows, classes;
  bool strided;
  std::vector<float> logits, gradient, loss, coefficient;
  std::vector<std::int64_t> index;
  std::vector<Softmax<float>> softmax;

  Problem(std::int64_t rows, std::int64_t classes, bool strided) : rows(rows), classes(classes), strided(strided) {
    for (std::int64_t i = 0; i < rows * classes; ++i) logits.push_back(std::sin(float(i * i % 1013)) * 3);
    gradient.resize(rows * classes, 7);
    loss.resize(rows, 7);
    softmax.resize(rows, {7, 7});
    for (std::int64_t r = 0; r < rows; ++r) {
      index.push_back(r % 5 == 2 ? -1 : r * 17 % classes);
      coefficient.push_back(0.5f + r % 3);
    }
  }

  std::int64_t at(std::int64_t r, std::int64_t c) const { return strided ? c * rows + r : r * classes + c; }

  CrossEntropyWork<float, float> work() {
    CrossEntropyWork<float, float> work{};
    work.rows.count = work.rows.sizes[0] = rows;
    work.rows.dims = 1;
    for (int k = 0; k < 2; ++k) work.rows.strides[k][0] = strided ? 1 : classes;
    work.classes = classes;
    work.logits = logits.data();
    work.gradient = gradient.data();
    work.logits_stride = work.gradient_stride = strided ? rows : 1;
    work.index = index.data();
    work.coefficient = coefficient.data();
    work.loss = loss.data();
    work.softmax = softmax.data();
    return work;
  }

  void run(const CrossEntropyWork<float, float>& work) {
    const auto& kernel = MASKED_LOSS_PICK(cross_entropy_kernels).of<float>().rows;
    RowDriver(kernel, work, CrossEntropyMode::ForwardGrad, work.count())([&] {
      return [&](std::int64_t, std::int64_t begin, std::int64_t, const auto& run) {
        auto planned = work;
        planned.index += begin, planned.coefficient += begin, planned.loss += begin, planned.softmax += begin;
        run(planned);
      };
    });
  }

  // Of row r where the plan has position p, in double.
  void expect_row(std::int64_t r, std::int64_t p, const Problem& before) const {
    if (index[p] < 0) {
      EXPECT_EQ(loss[p], 0);
      EXPECT_EQ(softmax[p].max, 0);
      EXPECT_EQ(softmax[p].sum, 1);
      for (std::int64_t c = 0; c < classes; ++c) ASSERT_EQ(gradient_at(r, c), 0);
      return;
    }
    double max = -1e30, sum = 0;
    for (std::int64_t c = 0; c < classes; ++c) max = std::max(max, double(before.logits[at(r, c)]));
    for (std::int64_t c = 0; c < classes; ++c) sum += std::exp(before.logits[at(r, c)] - max);
    EXPECT_EQ(softmax[p].max, float(max));
    EXPECT_NEAR(softmax[p].sum, sum, 1e-5 * sum);
    EXPECT_NEAR(loss[p], coefficient[p] * (max + std::log(sum) - before.logits[at(r, index[p])]), 1e-4);
    for (std::int64_t c = 0; c < classes; ++c) {
      const double probability = std::exp(before.logits[at(r, c)] - max) / sum;
      ASSERT_NEAR(gradient_at(r, c), coefficient[p] * (probability - (c == index[p])), 1e-5) << r << ", " << c;
    }
  }

  float gradient_at(std::int64_t r, std::int64_t c) const { return (in_place ? logits : gradient)[at(r, c)]; }

  bool in_place = false;
};

struct RowEngineTest : testing::TestWithParam<std::tuple<std::int64_t, std::int64_t, bool>> {
  Problem problem{std::get<0>(GetParam()), std::get<1>(GetParam()), std::get<2>(GetParam())};
  const Problem before = problem;
};

TEST_P(RowEngineTest, StatesBesideAGradient) {
  problem.run(problem.work());
  for (std::int64_t r = 0; r < problem.rows; ++r) problem.expect_row(r, r, before);
}

TEST_P(RowEngineTest, AGradientOverItsLogits) {
  auto work = problem.work();
  work.gradient = problem.logits.data();
  problem.in_place = true;
  problem.run(work);
  for (std::int64_t r = 0; r < problem.rows; ++r) problem.expect_row(r, r, before);
}

TEST_P(RowEngineTest, RowsByAList) {
  std::vector<std::int64_t> listed;
  for (std::int64_t r = 0; r < problem.rows; ++r) {
    if (r % 7 != 3 && r != 0) listed.push_back(r);
  }
  auto work = problem.work();
  work.listed = listed.data();
  work.listed_count = static_cast<std::int64_t>(listed.size());
  problem.run(work);
  for (std::size_t p = 0; p < listed.size(); ++p) problem.expect_row(listed[p], p, before);
  for (std::int64_t r = 0; r < problem.rows; ++r) {
    if (r % 7 != 3 && r != 0) continue;
    for (std::int64_t c = 0; c < problem.classes; ++c) ASSERT_EQ(problem.gradient_at(r, c), 7);  // not written
  }
}

INSTANTIATE_TEST_SUITE_P(Layouts, RowEngineTest,
                         testing::Values(std::tuple(60, 300, false),   // in one block each
                                         std::tuple(9, 5000, false),   // in three blocks
                                         std::tuple(300, 7, false),    // in tiles, transposed
                                         std::tuple(300, 40, true),    // in tiles, in place
                                         std::tuple(150, 3000, true),  // the same, exponentials made twice
                                         std::tuple(3, 40000, false)));  // in parts

}  // namespace
}  // namespace masked_loss::cpu
