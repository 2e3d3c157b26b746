#include <masked_loss/masked_loss.h>
#include <torch/csrc/autograd/autograd.h>

#include <array>
#include <cmath>
#include <limits>
#include <numbers>

#include "common/pointwise_ops.h"
#include "expect.h"

namespace masked_loss {
namespace {

using Math = ScalarMath<double>;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN(), kInfinity = std::numeric_limits<double>::infinity();

template <class Formula>
PointwiseTerms<double> terms(double x, double t, double other = 1, std::array<double, 2> numbers = {}) {
  return Formula::template at<Math>(x, t, other, numbers.data());
}

// The slopes against finite differences, away from kinks.
template <class Formula>
void expect_slopes(double x, double t, double other = 1, std::array<double, 2> numbers = {}) {
  constexpr double step = 1e-6;
  const auto at = [&](double dx, double dother) { return terms<Formula>(x + dx, t, other + dother, numbers).value; };
  const auto exact = terms<Formula>(x, t, other, numbers);
  EXPECT_NEAR(exact.input, (at(step, 0) - at(-step, 0)) / (2 * step), 1e-7) << "x " << x << ", t " << t;
  if (Formula::has_other_slope) {
    EXPECT_NEAR(exact.other, (at(0, step) - at(0, -step)) / (2 * step), 1e-7) << "x " << x << ", other " << other;
  }
}

TEST(PointwiseFormula, AreTheDefinitions) {
  EXPECT_DOUBLE_EQ(terms<formula::Mse>(3, 1).value, 4);
  EXPECT_DOUBLE_EQ(terms<formula::L1>(-3, 1).value, 4);
  EXPECT_DOUBLE_EQ(terms<formula::SmoothL1>(1.5, 1, 1, {2}).value, 0.5 * 0.25 / 2);
  EXPECT_DOUBLE_EQ(terms<formula::SmoothL1>(5, 1, 1, {2}).value, 3);
  EXPECT_DOUBLE_EQ(terms<formula::Huber>(1.5, 1, 1, {2}).value, 0.125);
  EXPECT_DOUBLE_EQ(terms<formula::Huber>(5, 1, 1, {2}).value, 6);
  const double p = 1 / (1 + std::exp(-0.7));
  const double cross_entropy = -(3 * 0.25 * std::log(p) + 0.75 * std::log(1 - p));
  EXPECT_NEAR(terms<formula::BinaryCrossEntropyWithLogits>(0.7, 0.25, 3).value, cross_entropy, 1e-15);
  EXPECT_NEAR(terms<formula::BinaryCrossEntropy>(p, 0.25).value, -(0.25 * std::log(p) + 0.75 * std::log(1 - p)), 1e-15);
  EXPECT_NEAR(terms<formula::KlDiv>(-1.5, 0.25).value, 0.25 * (std::log(0.25) + 1.5), 1e-15);
  EXPECT_EQ(terms<formula::KlDiv>(-1.5, 0).value, 0);
  EXPECT_NEAR(terms<formula::KlDivOfLogTarget>(-1.5, -0.5).value, std::exp(-0.5), 1e-15);
  EXPECT_NEAR(terms<formula::PoissonNllOfLogInput>(0.5, 3).value, std::exp(0.5) - 1.5, 1e-15);
  const double stirling = 3 * std::log(3.0) - 3 + 0.5 * std::log(6 * std::numbers::pi);
  EXPECT_NEAR(terms<formula::PoissonNll>(0.5, 3, 1, {1, 0.1}).value, 0.5 - 3 * std::log(0.6) + stirling, 1e-14);
  EXPECT_NEAR(terms<formula::GaussianNll>(2, 1, 0.5, {1, 1e-6}).value,
              0.5 * (std::log(0.5) + 2 + std::log(2 * std::numbers::pi)), 1e-15);
  EXPECT_NEAR(terms<formula::SigmoidFocal>(0.7, 1, 1, {0.25, 1.5}).value, -0.25 * std::pow(1 - p, 1.5) * std::log(p),
              1e-15);
}

TEST(PointwiseFormula, SlopesAreTheDerivatives) {
  for (const double x : {-3.3, -0.4, 0.2, 0.9, 2.7}) {
    for (const double t : {0.0, 0.35, 1.0}) {
      expect_slopes<formula::Mse>(x, t);
      expect_slopes<formula::L1>(x, t);
      expect_slopes<formula::SmoothL1>(x, t, 1, {0.5});
      expect_slopes<formula::Huber>(x, t, 1, {0.5});
      expect_slopes<formula::BinaryCrossEntropyWithLogits>(x, t, 2.5);
      expect_slopes<formula::BinaryCrossEntropy>(1 / (1 + std::exp(-x)), t);
      expect_slopes<formula::KlDiv>(x, t);
      expect_slopes<formula::KlDivOfLogTarget>(x, -t);
      expect_slopes<formula::PoissonNll>(std::abs(x), 4 * t, 1, {1, 0.01});
      expect_slopes<formula::PoissonNllOfLogInput>(x, 4 * t, 1, {1});
      expect_slopes<formula::GaussianNll>(x, t, 0.8, {1, 1e-6});
      for (const double alpha : {-1.0, 0.25}) {
        for (const double gamma : {0.0, 0.5, 1.5, 2.0}) expect_slopes<formula::SigmoidFocal>(x, t, 1, {alpha, gamma});
      }
    }
  }
}

TEST(PointwiseFormula, LargeLogitsAndEdges) {
  using Bce = formula::BinaryCrossEntropyWithLogits;
  EXPECT_EQ(terms<Bce>(1000, 0).value, 1000);
  EXPECT_EQ(terms<Bce>(1000, 0).input, 1);
  EXPECT_EQ(terms<Bce>(-1000, 0).value, 0);
  EXPECT_EQ(terms<Bce>(0, 0.5).input, 0);
  EXPECT_EQ(terms<formula::BinaryCrossEntropy>(0, 1).value, 100);  // a logarithm is at least -100
  EXPECT_EQ(terms<formula::L1>(2, 2).input, 0);
  EXPECT_EQ(terms<formula::L1>(kNaN, 0).input, 0);  // as torch's
  EXPECT_EQ(terms<formula::SmoothL1>(kNaN, 0, 1, {0}).input, 0);
  EXPECT_TRUE(std::isnan(terms<formula::SmoothL1>(kNaN, 0, 1, {1}).input));
  EXPECT_TRUE(std::isnan(terms<formula::Huber>(kNaN, 0, 1, {1}).input));
}

TEST(PointwiseFormula, FocalSlopesAreFiniteWhereLogitsAreSaturated) {
  for (const double gamma : {0.0, 0.5, 1.0, 1.5, 2.0, 3.0}) {
    for (const double x : {-1e308, -800.0, -40.0, 40.0, 800.0, 1e308}) {
      for (const double t : {0.0, 0.25, 1.0}) {
        const auto focal = terms<formula::SigmoidFocal>(x, t, 1, {0.25, gamma});
        EXPECT_TRUE(std::isfinite(focal.value) && std::isfinite(focal.input)) << gamma << " " << x << " " << t;
      }
    }
  }
}

TEST(PointwiseFormula, WhatDoesNotFitIsNaN) {
  for (const double x : {-0.1, -1e-300, 1 + 1e-15, 1.1, kInfinity, -kInfinity}) {
    EXPECT_TRUE(std::isnan(terms<formula::BinaryCrossEntropy>(x, 0).value));
    EXPECT_TRUE(std::isnan(terms<formula::BinaryCrossEntropy>(x, 0).input));
    EXPECT_TRUE(std::isnan(terms<formula::BinaryCrossEntropy>(0.5, x).value));
    EXPECT_TRUE(std::isnan(terms<formula::BinaryCrossEntropy>(0.5, x).input));
  }
  EXPECT_TRUE(std::isnan(terms<formula::GaussianNll>(0, 0, -1, {0, 1e-6}).value));
}

}  // namespace

namespace test {
namespace {

using at::Tensor;

struct Pointwise : testing::Test {
  const Tensor x = at::tensor({0.5, -1.0, kNaN, 2.0}, at::kDouble).view({2, 2});
  const Tensor t = at::tensor({1.0, 0.0, kNaN, 0.5}, at::kDouble).view({2, 2});
  const Tensor mask = bools({1, 1, 0, 1}).view({2, 2});

  static Tensor scalar(double value) { return at::scalar_tensor(value, at::kDouble); }
};

TEST_F(Pointwise, EachLossOnce) {
  const auto kept_x = x.masked_select(mask), kept_t = t.masked_select(mask), var = at::full({2, 2}, 0.5, at::kDouble);
  expect_close(masked_loss::mse_loss(x, t, mask), at::mse_loss(kept_x, kept_t));
  expect_close(masked_loss::l1_loss(x, t, mask), at::l1_loss(kept_x, kept_t));
  expect_close(masked_loss::smooth_l1_loss(x, t, mask, {.beta = 0.7}),
               at::smooth_l1_loss(kept_x, kept_t, at::Reduction::Mean, 0.7));
  expect_close(masked_loss::huber_loss(x, t, mask, {.delta = 0.7}),
               at::huber_loss(kept_x, kept_t, at::Reduction::Mean, 0.7));
  expect_close(masked_loss::binary_cross_entropy_with_logits(x, t, mask),
               at::binary_cross_entropy_with_logits(kept_x, kept_t));
  expect_close(masked_loss::binary_cross_entropy(x.sigmoid(), t, mask),
               at::binary_cross_entropy(kept_x.sigmoid(), kept_t));
  expect_close(masked_loss::kl_div(x, t, mask), at::kl_div(kept_x, kept_t));
  expect_close(masked_loss::poisson_nll_loss(x, t, mask), at::poisson_nll_loss(kept_x, kept_t, true, false, 1e-8, 1));
  expect_close(masked_loss::gaussian_nll_loss(x, t, var, mask),
               0.5 * (std::log(0.5) + (kept_x - kept_t).square() / 0.5).mean());
  const auto p = kept_x.sigmoid(), wrong = 1 - (kept_t * p + (1 - kept_t) * (1 - p));
  const auto cross_entropy = at::binary_cross_entropy_with_logits(kept_x, kept_t, {}, {}, at::Reduction::None);
  expect_close(masked_loss::sigmoid_focal_loss(x, t, mask),
               (cross_entropy * wrong.square() * (0.25 * kept_t + 0.75 * (1 - kept_t))).mean());
}

TEST_F(Pointwise, Options) {
  const auto weight = at::tensor({2.0, 1.0, kNaN, 0.5}, at::kDouble).view({2, 2});
  expect_close(masked_loss::mse_loss(x, t, mask, {.reduction = Reduction::Sum}), scalar(0.25 + 1 + 2.25));
  expect_close(masked_loss::mse_loss(x, t, mask, {.sample_weight = weight}), scalar((0.5 + 1 + 1.125) / 3.5));
  expect_close(masked_loss::mse_loss(x, t, mask, {.weight = weight}), scalar((0.5 + 1 + 1.125) / 3.5));
  expect_close(masked_loss::huber_loss(x, t, mask, {.delta = 9, .weight = weight}), scalar((0.25 + 0.5 + 0.5625) / 3));
  expect_close(masked_loss::mse_loss(x, t, mask, {.normalizer = scalar(7)}), scalar(3.5 / 7));
  expect_close(masked_loss::mse_loss(x, t, mask, {.reduction = Reduction::SequenceMean}), scalar((0.625 + 2.25) / 2));
  expect_close(masked_loss::kl_div(x, t, bools({0, 0, 0, 1}).view({2, 2}), {.reduction = Reduction::BatchMean}),
               scalar(0.5 * (std::log(0.5) - 2)));
  expect_bitwise(masked_loss::mse_loss(x, t, mask, {.reduction = Reduction::None}),
                 at::tensor({0.25, 1.0, 0.0, 2.25}, at::kDouble).view({2, 2}));
  const auto half = x.to(at::kBFloat16);
  EXPECT_EQ(masked_loss::mse_loss(half, t.to(at::kBFloat16), mask, {.dtype = at::kFloat}).scalar_type(), at::kFloat);
  EXPECT_EQ(masked_loss::gaussian_nll_loss(x, t, weight.square(), mask, {.dtype = at::kHalf}).scalar_type(), at::kHalf);
}

TEST_F(Pointwise, GradientsAndNothingKept) {
  const auto leaf = x.clone().requires_grad_();
  expect_bitwise(
      torch::autograd::grad({masked_loss::mse_loss(leaf, t, mask, {.reduction = Reduction::Sum})}, {leaf})[0],
      at::tensor({-1.0, -2.0, 0.0, 3.0}, at::kDouble).view({2, 2}));
  const auto loss = masked_loss::mse_loss(leaf, t, bools({0, 0, 0, 0}).view({2, 2}));
  expect_bitwise(loss.detach(), scalar(0));
  expect_bitwise(torch::autograd::grad({loss}, {leaf})[0], at::zeros({2, 2}, at::kDouble));
}

TEST_F(Pointwise, Errors) {
  expect_error<c10::TypeError>([&] { masked_loss::mse_loss(x, t, mask.to(at::kDouble)); }, "mse_loss: expected mask");
  expect_error<c10::ValueError>([&] { masked_loss::huber_loss(x, t, mask, {.delta = 0}); },
                                "huber_loss: expected delta above 0");
  expect_error<c10::ValueError>([&] { masked_loss::binary_cross_entropy(x, t, mask); },
                                "binary_cross_entropy: expected kept input in [0, 1], got ");
}

}  // namespace
}  // namespace test
}  // namespace masked_loss
