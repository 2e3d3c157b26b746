#include <masked_loss/masked_loss.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>

#include "common/linear.h"
#include "expect.h"

namespace masked_loss::test {
namespace {

using at::Tensor;

// z[0], ... of classes of which `target` is one, as a kernel that sees them one at a time.
LinearRow<double> row_of(const std::vector<double>& z, std::size_t begin, std::size_t end, std::size_t target) {
  LinearRow<double> row;
  for (auto c = begin; c < end; ++c) {
    LinearRow<double> one;
    one.softmax = {z[c], 1};
    if (c == target) one.target_logit = z[c], one.target_allowed = true;
    one.smoothing = {z[c], 1, 1};
    row = merge(row, one);
  }
  return row;
}

TEST(LinearRow, MergesAsTheWhole) {
  const std::vector<double> z{-3, 700, 699, 650};
  const auto whole = row_of(z, 0, 4, 2), merged = merge(row_of(z, 0, 2, 2), row_of(z, 2, 4, 2));
  EXPECT_DOUBLE_EQ(log_sum_exp(whole.softmax), 700 + std::log1p(std::exp(-1) + std::exp(-50)));
  EXPECT_DOUBLE_EQ(log_sum_exp(merged.softmax), log_sum_exp(whole.softmax));
  EXPECT_DOUBLE_EQ(merged.weighted, whole.weighted);
  EXPECT_NEAR(merged.weighted, -std::exp(-1), 1e-12);
  EXPECT_EQ(merged.target_logit, 699);
  EXPECT_TRUE(merged.target_allowed);
  EXPECT_EQ(merged.smoothing.classes, 4);
  EXPECT_EQ(merge(LinearRow<double>(), LinearRow<double>()).weighted, 0);
}

struct LinearTest : testing::Test {
  const Tensor input = at::randn({3, 4, 5}, at::kDouble).requires_grad_();
  const Tensor head = at::randn({7, 5}, at::kDouble).requires_grad_();
  const Tensor bias = at::randn({7}, at::kDouble).requires_grad_();
  const Tensor target = at::randint(7, {3, 4}, at::kLong);
  const Tensor mask = at::rand({3, 4}).lt(0.7).index_fill(0, at::zeros({1}, at::kLong), true);
  const Tensor logits = at::linear(input, head, bias);

  void expect_same(const Tensor& ours, const Tensor& theirs) const {
    expect_close(ours, theirs);
    const auto upstream = at::randn_like(theirs);
    const auto gradients = torch::autograd::grad({ours}, {input, head, bias}, {upstream});
    const auto expected = torch::autograd::grad({theirs}, {input, head, bias}, {upstream});
    for (int i = 0; i < 3; ++i) expect_close(gradients[i], expected[i]);
  }
};

TEST_F(LinearTest, IsCrossEntropyOfWholeLogits) {
  for (const auto reduction : {Reduction::Mean, Reduction::Sum, Reduction::None, Reduction::SequenceMean}) {
    const auto ours = linear_cross_entropy(
        input, head, target, mask,
        {.reduction = reduction, .linear_bias = bias, .label_smoothing = 0.1, .z_loss = 0.01, .chunk_size = 2});
    expect_same(ours, cross_entropy(at::linear(input, head, bias), target, mask,
                                    {.reduction = reduction, .label_smoothing = 0.1, .z_loss = 0.01, .dim = -1}));
  }
}

TEST_F(LinearTest, GivesLogProbabilitiesAndEntropies) {
  const auto [log_prob, entropy] =
      linear_log_prob_and_entropy(input, head, target, mask, {.linear_bias = bias, .softcap = 3.0, .temperature = 0.5});
  const auto log_p = at::log_softmax(at::tanh(at::linear(input, head, bias) / 3.0) * 3.0 / 0.5, -1);
  const auto zero = at::zeros({}, at::kDouble);
  const auto expected = at::where(mask, log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1), zero);
  expect_close(log_prob, expected);
  expect_close(linear_log_prob(input, head, target, mask, {.linear_bias = bias, .softcap = 3.0, .temperature = 0.5}),
               log_prob);
  expect_same(log_prob + entropy, expected + at::where(mask, -(log_p.exp() * log_p).sum(-1), zero));
}

}  // namespace
}  // namespace masked_loss::test
