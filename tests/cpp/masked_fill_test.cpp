#include <masked_loss/masked_loss.h>
#include <torch/csrc/autograd/autograd.h>

#include <limits>

#include "expect.h"

namespace masked_loss::test {
namespace {

using at::Tensor;

struct MaskedFill : testing::Test {
  const Tensor mask = bools({1, 0, 0, 1, 1, 0}).view({2, 3});
};

TEST_F(MaskedFill, IsTorchsForEveryDtype) {
  for (const auto type : {at::kBool, at::kByte, at::kChar, at::kShort, at::kInt, at::kLong, at::kHalf, at::kBFloat16,
                          at::kFloat, at::kDouble, at::kComplexFloat, at::kComplexDouble}) {
    const auto input = at::arange(6, at::kLong).view({2, 3}).to(type);
    const auto expected = input.masked_fill(mask, 1);
    expect_bitwise(masked_loss::masked_fill(input, mask, 1), expected);
    expect_bitwise(masked_loss::masked_fill(input, mask, at::scalar_tensor(1, input.options())), expected);
    auto filled = input.clone();
    masked_loss::masked_fill_(filled, mask, 1);
    expect_bitwise(filled, expected);
  }
}

TEST_F(MaskedFill, MasksOfIntegers) {
  const auto input = at::randn({2, 3});
  for (const auto type : {at::kByte, at::kChar, at::kShort, at::kInt, at::kLong}) {
    expect_bitwise(masked_loss::masked_fill(input, mask.to(type), -1), input.masked_fill(mask, -1));
    EXPECT_THROW(masked_loss::masked_fill(input, mask.to(type) * 4, -1), c10::ValueError);
  }
}

TEST_F(MaskedFill, TemporariesInPlace) {
  const auto input = at::zeros({2, 3});
  masked_loss::masked_fill_(input[0], mask[0], 1);
  masked_loss::masked_fill_(input.select(0, 1), mask[1], at::scalar_tensor(2));
  expect_bitwise(input, at::zeros({2, 3}).masked_fill(mask, 1) * at::tensor({1, 2}).view({2, 1}));
}

TEST_F(MaskedFill, Broadcasts) {
  const auto input = at::randn({3}, at::kDouble);
  expect_bitwise(masked_loss::masked_fill(input, mask, 2), input.masked_fill(mask, 2));  // the input grows
  expect_bitwise(masked_loss::masked_fill(at::zeros({2, 3}), mask[0], 2), at::zeros({2, 3}).masked_fill(mask[0], 2));
  auto narrow = input.clone();
  expect_error<c10::Error>([&] { masked_loss::masked_fill_(narrow, mask, 2); },
                           "masked_fill_: expected mask to broadcast to");
  expect_bitwise(narrow, input);
}

TEST_F(MaskedFill, StridedInPlace) {
  auto base = at::arange(12, at::kFloat).view({3, 4});
  const auto expected = base.clone();
  expected.t().slice(0, 0, 4, 2).masked_fill_(mask, -5);
  auto view = base.t().slice(0, 0, 4, 2);  // [2, 3], strides [2, 4]
  masked_loss::masked_fill_(view, mask, -5);
  expect_bitwise(base, expected);
}

TEST_F(MaskedFill, GradientsOfInputAndValue) {
  const auto input = at::randn({2, 3}, at::kDouble).requires_grad_();
  const auto value = at::scalar_tensor(0.5, at::kDouble).requires_grad_();
  const auto upstream = at::arange(1, 7, at::kDouble).view({2, 3});
  const auto gradients =
      torch::autograd::grad({masked_loss::masked_fill(input, mask, value)}, {input, value}, {upstream});
  expect_bitwise(gradients[0], upstream.masked_fill(mask, 0));
  expect_bitwise(gradients[1], at::scalar_tensor(1.0 + 4 + 5, at::kDouble));
}

TEST_F(MaskedFill, FilledIsNeverRead) {
  constexpr auto nan = std::numeric_limits<double>::quiet_NaN();
  const auto input = at::ones({2, 3}, at::kDouble).masked_fill(mask, nan).requires_grad_();
  const auto filled = masked_loss::masked_fill(input, mask, 0);
  expect_bitwise(filled.detach(), at::ones({2, 3}, at::kDouble).masked_fill(mask, 0));
  const auto upstream = at::ones({2, 3}, at::kDouble).masked_fill(mask, nan);
  expect_bitwise(torch::autograd::grad({filled}, {input}, {upstream})[0],
                 at::ones({2, 3}, at::kDouble).masked_fill(mask, 0));
}

TEST_F(MaskedFill, InPlaceInAGraph) {
  const auto leaf = at::randn({2, 3}, at::kDouble).requires_grad_();
  auto input = leaf * 2;
  masked_loss::masked_fill_(input, mask, 7);
  const auto gradient = torch::autograd::grad({input.sum()}, {leaf})[0];
  expect_bitwise(gradient, at::full({2, 3}, 2, at::kDouble).masked_fill(mask, 0));
}

TEST_F(MaskedFill, Errors) {
  const auto input = at::zeros({2, 3});
  auto shared = at::zeros({1}).expand({2, 3});
  expect_error<c10::Error>([&] { masked_loss::masked_fill(input, mask.to(at::kFloat), 1); },
                           "masked_fill: expected mask of dtype bool or an integer dtype, got Float");
  expect_error<c10::Error>([&] { masked_loss::masked_fill(input, at::zeros({4}, at::kBool), 1); },
                           "masked_fill: expected mask to");
  expect_error<c10::Error>([&] { masked_loss::masked_fill(input, mask, at::zeros({1})); },
                           "masked_fill: expected value to be a number or a 0-d tensor, got shape [1]");
  expect_error<c10::Error>([&] { masked_loss::masked_fill_(shared, mask, 1); },
                           "masked_fill_: expected input whose elements do not share memory");
}

}  // namespace
}  // namespace masked_loss::test
