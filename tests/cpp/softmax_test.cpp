#include <masked_loss/masked_loss.h>
#include <torch/csrc/autograd/autograd.h>

#include <limits>

#include "common/softmax.h"
#include "expect.h"

namespace masked_loss::test {
namespace {

using at::Tensor;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

struct SoftmaxTest : testing::Test {
  const Tensor mask = bools({1, 0, 1, 0, 0, 0, 1, 1, 1}).view({3, 3});
  const Tensor input = at::randn({3, 3}, at::kDouble);
  const Tensor given = input.masked_fill(mask.logical_not(), kNaN);
};

TEST(SoftmaxState, MergesAsTheWhole) {
  const std::array<double, 4> x{-3, 700, 699, -kInfinity};
  Softmax<double> whole, first, second;
  for (int i = 0; i < 4; ++i) {
    const Softmax<double> one{x[i], 1};
    whole = merge(whole, one);
    (i < 2 ? first : second) = merge(i < 2 ? first : second, one);
  }
  EXPECT_DOUBLE_EQ(log_sum_exp(whole), 700 + std::log1p(std::exp(-1)));
  EXPECT_DOUBLE_EQ(log_sum_exp(merge(first, second)), log_sum_exp(whole));
  EXPECT_EQ(log_sum_exp(Softmax<double>()), -kInfinity);
}

TEST_F(SoftmaxTest, IsTorchsWithoutAMask) {
  expect_close(masked_loss::softmax(input), at::softmax(input, -1));
  expect_close(masked_loss::softmax(input, {}, {.dim = 0}), at::softmax(input, 0));
  expect_close(masked_loss::log_softmax(input, {}, {.dim = 0}), at::log_softmax(input, 0));
  expect_close(masked_loss::logsumexp(input, {}, {.dim = {0, 1}, .keepdim = true}),
               at::logsumexp(input, at::IntArrayRef({0, 1}), /*keepdim=*/true));
  expect_close(masked_loss::softmax(at::arange(3), {}, {.dtype = at::kDouble}),
               at::softmax(at::arange(3), 0, at::kDouble));
}

TEST_F(SoftmaxTest, LeavesOutWhatIsMasked) {
  const auto filled = input.masked_fill(mask.logical_not(), -kInfinity);
  const auto some = mask.any(-1, /*keepdim=*/true);
  expect_close(masked_loss::softmax(given, mask), at::softmax(filled, -1).masked_fill(some.logical_not(), 0));
  expect_close(masked_loss::log_softmax(given, mask),
               at::log_softmax(filled, -1).masked_fill(some.logical_not(), -kInfinity));
  expect_close(masked_loss::logsumexp(given, mask), at::logsumexp(filled, -1));
  const auto gradient = [&](const Tensor& x, const auto& function) {
    const auto leaf = x.detach().requires_grad_();
    return torch::autograd::grad({function(leaf)}, {leaf}, {at::arange(9, at::kDouble).view({3, 3})})[0];
  };
  const auto ours = gradient(given, [&](const Tensor& x) { return masked_loss::softmax(x, mask); });
  const auto theirs = gradient(filled, [&](const Tensor& x) { return at::softmax(x, -1); });
  expect_close(ours, theirs.masked_fill(some.logical_not(), 0));
  expect_bitwise(ours.masked_select(mask.logical_not()), at::zeros(4, at::kDouble));
}

TEST_F(SoftmaxTest, CausalIsTheMaskThatSaysSo) {
  const auto wide = at::randn({2, 3, 5}, at::kDouble);
  const auto seen = causal_mask(3, 5);
  expect_bitwise(masked_loss::softmax(wide, {}, {.causal = true}), masked_loss::softmax(wide, seen));
  expect_bitwise(masked_loss::log_softmax(wide, {}, {.causal = true}), masked_loss::log_softmax(wide, seen));
  expect_bitwise(masked_loss::logsumexp(wide, {}, {.causal = true}), masked_loss::logsumexp(wide, seen));
}

TEST_F(SoftmaxTest, Errors) {
  expect_error<c10::TypeError>([&] { masked_loss::softmax(input, mask.to(at::kFloat)); },
                               "softmax: expected mask of dtype bool or an integer dtype, got Float");
  expect_error<c10::ValueError>([&] { masked_loss::log_softmax(input, {}, {.dim = 0, .causal = true}); },
                                "log_softmax: expected dim to be the last one with causal, got [0]");
  expect_error<c10::IndexError>([&] { masked_loss::logsumexp(input, {}, {.dim = {2}}); },
                                "logsumexp: expected dim in [-2, 1], got 2");
}

}  // namespace
}  // namespace masked_loss::test
