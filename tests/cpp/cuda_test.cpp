// Functions of each way of calling kernels, on a GPU, where there is one: the same results as on the CPU.
#include <ATen/Context.h>
#include <masked_loss/masked_loss.h>

#include "expect.h"

namespace masked_loss {
namespace {

using test::expect_bitwise;
using test::expect_close;

class Cuda : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!at::hasCUDA() || at::getNumGPUs() == 0) GTEST_SKIP() << "there is no GPU";
  }
};

TEST_F(Cuda, CrossEntropy) {
  for (const std::int64_t classes : {7, 1000, 40000}) {
    const auto input = at::randn({9, classes}, at::kDouble), target = at::randint(classes, {9}, at::kLong);
    const auto mask = test::bools({1, 0, 1, 1, 0, 1, 1, 1, 0});
    const auto x = input.clone().requires_grad_(), y = input.to(at::kCUDA).requires_grad_();
    const auto expected = cross_entropy(x, target, mask);
    const auto actual = cross_entropy(y, target.to(at::kCUDA), mask.to(at::kCUDA));
    expected.backward();
    actual.backward();
    expect_close(actual.detach().cpu(), expected.detach());
    expect_close(y.grad().cpu(), x.grad());
  }
}

TEST_F(Cuda, MaskedFill) {
  const auto input = at::randn({50, 70}), mask = at::rand({50, 70}) < 0.5;
  expect_bitwise(masked_loss::masked_fill(input.to(at::kCUDA), mask.to(at::kCUDA), 2).cpu(),
                 input.masked_fill(mask, 2));
}

}  // namespace
}  // namespace masked_loss
