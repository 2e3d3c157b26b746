#include <masked_loss/masked_loss.h>
#include <torch/csrc/autograd/autograd.h>

#include <limits>

#include "common/reductions.h"
#include "expect.h"

namespace masked_loss::test {
namespace {

using at::Tensor;

struct ReductionsTest : testing::Test {
  const Tensor mask = bools({1, 0, 1, 0, 0, 0, 1, 1, 1}).view({3, 3});
  const Tensor input = at::randn({3, 3}, at::kDouble);
  const Tensor given = input.masked_fill(mask.logical_not(), std::numeric_limits<double>::quiet_NaN());
  const Tensor kept = input.masked_select(mask);
};

TEST(MomentsOfParts, MergeAsTheWhole) {
  const Moments first{2, 3.0, 2.0}, second{3, 7.0, 8.0};  // of 2, 4 and of 5, 7, 9
  const auto whole = merge<2>(first, second);
  EXPECT_EQ(whole.count, 5);
  EXPECT_DOUBLE_EQ(whole.first, 27.0 / 5);
  EXPECT_DOUBLE_EQ(whole.second, 4 + 16 + 25 + 49 + 81 - 27.0 * 27 / 5);
  EXPECT_DOUBLE_EQ(merge<1>(Moments{2, 6.0, 0}, Moments{3, 21.0, 0}).first, 27);
  EXPECT_EQ(merge<2>(Moments(), second).first, 7);
  EXPECT_EQ(merge<2>(first, Moments()).second, 2);
}

TEST_F(ReductionsTest, AreTorchsOfWhatIsKept) {
  expect_close(masked_sum(given, mask), kept.sum());
  expect_close(masked_mean(given, mask), kept.mean());
  expect_close(masked_var(given, mask), kept.var());
  expect_close(masked_std(given, mask, {.correction = 0}), kept.std(/*unbiased=*/false));
  expect_close(masked_sum(given, mask, {.dim = {-1}, .keepdim = true}),
               input.masked_fill(mask.logical_not(), 0).sum(-1, /*keepdim=*/true));
  const auto white = masked_whiten(given, mask);
  expect_close(white.masked_select(mask), (kept - kept.mean()) / (kept.var() + 1e-8).sqrt());
  expect_bitwise(white.masked_select(mask.logical_not()), at::zeros(4, at::kDouble));
}

TEST_F(ReductionsTest, HaveTheDtypeThatIsAskedFor) {
  const auto half = given.to(at::kBFloat16);
  const auto kept_half = half.to(at::kFloat).masked_select(mask);
  expect_close(masked_sum(half, mask, {.dtype = at::kFloat}), kept_half.sum(), 1e-6);
  expect_close(masked_mean(half, mask, {.dtype = at::kFloat}), kept_half.mean(), 1e-6);
  expect_close(masked_std(half, mask, {.dtype = at::kFloat}), kept_half.std(), 1e-6);
  EXPECT_EQ(masked_whiten(half, mask, {.dim = {0}, .dtype = at::kDouble}).scalar_type(), at::kDouble);
  expect_close(masked_mean(mask, mask), at::ones({}));
}

TEST_F(ReductionsTest, NothingKeptIsZero) {
  const auto leaf = given.detach().requires_grad_();
  const auto nothing = at::zeros({3, 3}, at::kBool);
  for (const auto& value :
       {masked_sum(leaf, nothing), masked_mean(leaf, nothing), masked_var(leaf, nothing), masked_std(leaf, nothing)}) {
    expect_bitwise(value.detach(), at::zeros({}, at::kDouble));
    expect_bitwise(torch::autograd::grad({value}, {leaf})[0], at::zeros({3, 3}, at::kDouble));
  }
}

TEST_F(ReductionsTest, Errors) {
  expect_error<c10::TypeError>([&] { masked_mean(input, mask.to(at::kFloat)); },
                               "masked_mean: expected mask of dtype bool or an integer dtype, got Float");
  expect_error<c10::IndexError>([&] { masked_sum(input, {}, {.dim = {2}}); },
                                "masked_sum: expected dim in [-2, 1], got 2");
  expect_error<c10::Error>([&] { masked_sum(input, mask[0]); }, "masked_sum: expected mask");
}

}  // namespace
}  // namespace masked_loss::test
