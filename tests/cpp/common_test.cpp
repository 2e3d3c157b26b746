#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "common/cross_entropy.h"
#include "common/row_plan.h"
#include "common/softmax.h"
#include "common/strides.h"

namespace masked_loss {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

Softmax<double> softmax_of(const std::vector<double>& logits) {
  Softmax<double> softmax;
  for (const double x : logits) softmax = merge(softmax, {x, 1.0});
  return softmax;
}

TEST(Softmax, MergesInAnyOrder) {
  const std::vector<double> logits{-3.0, 700.0, 0.5, -kInfinity, 701.0};
  double sum = 0;
  for (const double x : logits) sum += std::exp(x - 701.0);
  EXPECT_NEAR(log_sum_exp(softmax_of(logits)), 701.0 + std::log(sum), 1e-12);
  const auto left = softmax_of({logits[0], logits[1]}), right = softmax_of({logits[2], logits[3], logits[4]});
  EXPECT_NEAR(log_sum_exp(merge(left, right)), log_sum_exp(merge(right, left)), 1e-12);
}

TEST(Softmax, InfinitiesAndNaN) {
  // Nothing seen, or only -inf: no NaN that would spoil what comes later.
  EXPECT_EQ(log_sum_exp(Softmax<double>{}), -kInfinity);
  EXPECT_NEAR(log_sum_exp(merge(softmax_of({-kInfinity, -kInfinity}), softmax_of({2.0}))), 2.0, 1e-15);
  // As torch's log_softmax, +inf and NaN make the row NaN.
  EXPECT_TRUE(std::isnan(log_sum_exp(softmax_of({1.0, kInfinity}))));
  EXPECT_TRUE(std::isnan(log_sum_exp(softmax_of({kNaN, 1.0}))));
  EXPECT_TRUE(std::isnan(log_sum_exp(softmax_of({1.0, kNaN}))));
}

struct Example {
  std::vector<double> logits, weights;
  std::size_t target;
  double coefficient, label_smoothing, z_loss;
};

CrossEntropyRow<double> row_of(const Example& example) {
  ClassSums smoothing;
  for (std::size_t c = 0; c < example.logits.size(); ++c) {
    smoothing.logits += example.weights[c] * example.logits[c];
    smoothing.weight += example.weights[c];
    ++smoothing.classes;
  }
  return {example.coefficient, example.weights[example.target], example.label_smoothing, example.z_loss, smoothing};
}

double loss_of(const Example& example) {
  const auto softmax = softmax_of(example.logits);
  return cross_entropy_loss(row_of(example), softmax, std::log(softmax.sum), example.logits[example.target], true);
}

TEST(CrossEntropyFormula, IsTheDefinition) {
  const Example example{{0.3, -1.2, 2.0}, {0.5, 2.0, 1.5}, 1, -0.7, 0.2, 0.01};
  const double lse = log_sum_exp(softmax_of(example.logits));
  double smoothed = 0;
  for (int c = 0; c < 3; ++c) smoothed += example.weights[c] * (lse - example.logits[c]);
  const double expected = -0.7 * (0.8 * 2.0 * (lse + 1.2) + 0.2 / 3 * smoothed + 0.01 * 2.0 * lse * lse);
  EXPECT_NEAR(loss_of(example), expected, 1e-13);
}

TEST(CrossEntropyFormula, GradientIsTheDerivative) {
  std::mt19937 random(0);
  std::normal_distribution<double> normal;
  for (const double label_smoothing : {0.0, 0.1, 1.0}) {
    for (const double z_loss : {0.0, 0.3}) {
      Example example{{}, {}, 2, normal(random), label_smoothing, z_loss};
      for (int c = 0; c < 6; ++c) {
        example.logits.push_back(normal(random));
        example.weights.push_back(std::abs(normal(random)));
      }
      const auto softmax = softmax_of(example.logits);
      const auto row = row_of(example);
      const auto terms = cross_entropy_gradient(row, log_sum_exp(softmax), row.target_weight);
      for (std::size_t c = 0; c < example.logits.size(); ++c) {
        const double p = std::exp(example.logits[c] - softmax.max) / softmax.sum;
        const double gradient =
            terms.probability * p - terms.smoothing * example.weights[c] - (c == example.target ? terms.target : 0.0);
        auto above = example, below = example;
        above.logits[c] += 1e-6;
        below.logits[c] -= 1e-6;
        EXPECT_NEAR(gradient, (loss_of(above) - loss_of(below)) / 2e-6, 1e-8);
      }
    }
  }
}

TEST(CrossEntropyFormula, TargetThatIsNotAllowed) {
  const Example example{{0.0, 1.0}, {1.0, 1.0}, 0, 2.0, 0.0, 0.0};
  EXPECT_EQ(cross_entropy_loss(row_of(example), softmax_of({1.0}), 0.0, 0.0, false), kInfinity);
}

TEST(Quotient, IsDivision) {
  constexpr auto most = std::numeric_limits<std::int64_t>::max();
  for (const std::int64_t divisor :
       {std::int64_t{1}, std::int64_t{2}, std::int64_t{3}, std::int64_t{7}, std::int64_t{50257}, std::int64_t{1} << 31,
        (std::int64_t{1} << 31) + 1, (std::int64_t{1} << 62) + 1, most - 1, most}) {
    const Quotient by(divisor);
    for (const std::int64_t dividend :
         {std::int64_t{0}, std::int64_t{1}, divisor - 1, divisor, divisor < most ? divisor + 1 : divisor,
          divisor / 2 * 2, std::int64_t{123456789}, (std::int64_t{1} << 53) + 1, most - 1, most}) {
      EXPECT_EQ(by(dividend), dividend / divisor) << dividend << " / " << divisor;
    }
  }
}

TEST(Rows, WalkOperandsOfDifferentStrides) {
  const auto contiguous = at::empty({3, 4, 5});
  const auto transposed = at::empty({5, 4, 3}).permute({2, 1, 0});
  const auto broadcast = at::empty({3, 1, 5});
  const auto rows = make_rows<4>(
      {3, 4, 5}, {row_strides(contiguous), row_strides(transposed), row_strides(broadcast), at::DimVector()});
  ASSERT_EQ(rows.count, 60);
  std::int64_t row = 0;
  for (std::int64_t i = 0; i < 3; ++i) {
    for (std::int64_t j = 0; j < 4; ++j) {
      for (std::int64_t k = 0; k < 5; ++k, ++row) {
        const std::array<std::int64_t, 4> expected{20 * i + 5 * j + k, 12 * k + 3 * j + i, 5 * i + k, 0};
        EXPECT_EQ(rows.offsets(row), expected);
      }
    }
  }
}

TEST(Rows, MergeWhatIsOneRun) {
  const auto logits = at::empty({3, 4, 7});  // rows of 7 classes, one after the other
  const auto rows = make_rows<2>({3, 4}, {row_strides(logits, 2), row_strides(at::empty({3, 4}))});
  EXPECT_EQ(rows.dims, 1);
  EXPECT_EQ(rows.offsets(11), (std::array<std::int64_t, 2>{77, 11}));
  EXPECT_EQ(make_rows<1>({}, {at::DimVector()}).count, 1);
  EXPECT_EQ(make_rows<1>({2, 0}, {row_strides(at::empty({2, 0}))}).count, 0);
}

TEST(RowPlan, ResolvesOneRow) {
  const std::int32_t targets[] = {1, 9, 4, -1};
  const bool mask[] = {true, false};
  const float weights[] = {2.0f, 0.0f}, class_weights[] = {1.0f, 0.5f, 1.0f, 1.0f};
  const std::uint8_t none_allowed[] = {0, 0, 0, 0};
  RowRule<float> view{.target = targets,
                      .target_bytes = 4,
                      .mask = mask,
                      .mask_bytes = 1,
                      .sample_weight = weights,
                      .weight = class_weights,
                      .class_mask = nullptr,
                      .class_mask_stride = 1,
                      .class_mask_size = 4,
                      .classes = 4,
                      .ignored = {9},
                      .ignored_count = 1};
  const auto kept = resolve_row(view, 0, 0, 0, 0);
  EXPECT_EQ(kept.state, RowState::Kept);
  EXPECT_EQ(kept.index, 1);
  EXPECT_EQ(kept.weight, 2.0f);
  EXPECT_EQ(kept.counted, 1.0f);
  EXPECT_EQ(resolve_row(view, 0, 1, 0, 0).state, RowState::Masked);      // by the mask
  EXPECT_EQ(resolve_row(view, 1, 0, 0, 0).state, RowState::Masked);      // by ignore_index
  EXPECT_EQ(resolve_row(view, 0, 0, 1, 0).state, RowState::Masked);      // by a weight of 0
  EXPECT_EQ(resolve_row(view, 2, 0, 0, 0).state, RowState::OutOfRange);  // 4 of 4 classes
  EXPECT_EQ(resolve_row(view, 3, 0, 0, 0).state, RowState::OutOfRange);
  EXPECT_EQ(resolve_row(view, 3, 1, 0, 0).state, RowState::Masked);  // what is masked is not looked at
  view.class_mask = none_allowed;
  EXPECT_EQ(resolve_row(view, 0, 0, 0, 0).state, RowState::Masked);  // no class is left
}

}  // namespace
}  // namespace masked_loss
