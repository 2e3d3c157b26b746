#include <masked_loss/masked_loss.h>
#include <torch/csrc/autograd/autograd.h>

#include <limits>

#include "expect.h"

namespace masked_loss::test {
namespace {

using at::Tensor;

constexpr auto kNaN = std::numeric_limits<double>::quiet_NaN();

Tensor gradient_of(const Tensor& loss, const Tensor& input) {
  return torch::autograd::grad({loss}, {input}, {at::ones_like(loss)})[0];
}

// A batch of sequences with padding at their ends; the logits require grad.
struct CrossEntropyTest : testing::Test {
  const std::int64_t B = 3, T = 5, C = 7;
  Tensor input, target, mask, class_weight, sample_weight;

  void SetUp() override {
    at::manual_seed(0);
    const auto options = at::TensorOptions(at::kDouble);
    input = at::randn({B, C, T}, options).requires_grad_();
    target = at::randint(C, {B, T}, at::kLong);
    mask = sequence_mask(at::tensor({5, 2, 3}, at::kLong), T);
    class_weight = at::rand({C}, options) + 0.1;
    sample_weight = at::rand({B, T}, options) + 0.1;
  }

  // The rows that the mask keeps, as a batch without a mask. [kept, C]
  Tensor kept_rows() const { return input.transpose(1, 2).index({mask}); }
  Tensor kept_targets() const { return target.index({mask}); }
};

TEST_F(CrossEntropyTest, NoMaskIsTorchs) {
  const auto none = cross_entropy(input, target);
  const auto expected = at::cross_entropy_loss(input, target);
  expect_close(none, expected);
  expect_close(gradient_of(none, input), gradient_of(expected, input));
  expect_bitwise(cross_entropy(input, target, at::ones({B, T}, at::kBool)), none);

  const auto options = CrossEntropyOptions{
      .reduction = Reduction::Sum, .weight = class_weight, .ignore_index = {2}, .label_smoothing = 0.1};
  const auto loss = cross_entropy(input, target, {}, options);
  const auto torch = at::cross_entropy_loss(input, target, class_weight, at::Reduction::Sum, 2, 0.1);
  expect_close(loss, torch);
  expect_close(gradient_of(loss, input), gradient_of(torch, input));
}

TEST_F(CrossEntropyTest, MaskedEqualsAbsent) {
  for (const auto reduction : {Reduction::Mean, Reduction::Sum}) {
    for (const double label_smoothing : {0.0, 0.2}) {
      const auto loss = cross_entropy(
          input, target, mask, {.reduction = reduction, .weight = class_weight, .label_smoothing = label_smoothing});
      const auto expected = at::cross_entropy_loss(kept_rows(), kept_targets(), class_weight,
                                                   static_cast<std::int64_t>(reduction), -100, label_smoothing);
      expect_close(loss, expected);
      expect_close(gradient_of(loss, input), gradient_of(expected, input));
    }
  }
  const auto none = cross_entropy(input, target, mask, {.reduction = Reduction::None});
  const auto expected = at::cross_entropy_loss(kept_rows(), kept_targets(), {}, at::Reduction::None);
  ASSERT_EQ(none.sizes(), target.sizes());
  expect_close(none.index({mask}), expected);
  expect_bitwise(none.index({~mask}), at::zeros({B * T - kept_targets().numel()}, at::kDouble));
}

TEST_F(CrossEntropyTest, MaskedIsNeverRead) {
  for (const auto reduction : {Reduction::None, Reduction::Mean, Reduction::Sum, Reduction::SequenceMean}) {
    const CrossEntropyOptions options{.reduction = reduction, .sample_weight = sample_weight, .z_loss = 0.01};
    const auto clean = cross_entropy(input, target, mask, options);
    const auto clean_gradient = gradient_of(clean, input);
    const auto masked = (~mask).unsqueeze(1).expand_as(input);
    for (const double garbage : {kNaN, std::numeric_limits<double>::infinity(), -1e300}) {
      const auto dirty_input = input.detach().masked_fill(masked, garbage).requires_grad_();
      const auto dirty_target = target.masked_fill(~mask, std::numeric_limits<std::int64_t>::min());
      auto dirty_options = options;
      dirty_options.sample_weight = sample_weight.masked_fill(~mask, garbage);
      const auto loss = cross_entropy(dirty_input, dirty_target, mask, dirty_options);
      expect_bitwise(loss, clean);
      // What arrives from upstream at a masked output is not read either.
      const auto upstream =
          reduction == Reduction::None ? at::ones_like(loss).masked_fill(~mask, garbage) : at::ones_like(loss);
      const auto gradient = torch::autograd::grad({loss}, {dirty_input}, {upstream})[0];
      expect_bitwise(gradient, clean_gradient);
      expect_bitwise(gradient.masked_select(masked), at::zeros({masked.sum().item<std::int64_t>()}, at::kDouble));
    }
  }
}

TEST_F(CrossEntropyTest, NothingKeptIsZero) {
  const auto nothing = at::zeros({B, T}, at::kBool);
  for (const auto reduction : {Reduction::None, Reduction::Mean, Reduction::Sum, Reduction::SequenceMean}) {
    const auto loss = cross_entropy(input, target, nothing, {.reduction = reduction});
    EXPECT_TRUE(loss.requires_grad());
    expect_bitwise(loss.detach(), at::zeros_like(loss));
    expect_bitwise(gradient_of(loss, input), at::zeros({B, C, T}, at::kDouble));
  }
  const auto loss = cross_entropy(input, target, nothing, {.normalizer = at::zeros({}, at::kDouble)});
  expect_bitwise(loss.detach(), at::zeros({}, at::kDouble));
}

TEST_F(CrossEntropyTest, NaNAtAKeptPositionPropagates) {
  auto dirty = input.detach().clone();
  dirty.index_put_({0, 0, 0}, kNaN);
  EXPECT_TRUE(cross_entropy(dirty, target, mask).isnan().item<bool>());
}

TEST_F(CrossEntropyTest, WeightedMeans) {
  const auto rows = at::cross_entropy_loss(input, target, {}, at::Reduction::None);
  const auto weights = sample_weight.masked_fill(~mask, 0);
  const auto mean = cross_entropy(input, target, mask, {.sample_weight = sample_weight});
  expect_close(mean, (rows * weights).sum() / weights.sum());

  const auto by_sequence =
      cross_entropy(input, target, mask, {.reduction = Reduction::SequenceMean, .sample_weight = sample_weight});
  expect_close(by_sequence, ((rows * weights).sum(1) / weights.sum(1)).mean());

  const auto normalizer = at::scalar_tensor(40.0, at::kDouble);
  expect_close(cross_entropy(input, target, mask, {.normalizer = normalizer}), rows.masked_select(mask).sum() / 40);
}

TEST_F(CrossEntropyTest, SampleWeightIsDifferentiable) {
  const auto weights = sample_weight.clone().requires_grad_();
  const auto loss = cross_entropy(input, target, mask, {.reduction = Reduction::Sum, .sample_weight = weights});
  const auto rows = at::cross_entropy_loss(input, target, {}, at::Reduction::None).detach();
  expect_close(gradient_of(loss, weights), rows.masked_fill(~mask, 0));
}

TEST_F(CrossEntropyTest, ZLossAndSeveralIgnored) {
  const auto lse = input.logsumexp(1);
  const auto rows = at::cross_entropy_loss(input, target, {}, at::Reduction::None) + 0.3 * lse * lse;
  const auto kept = mask.logical_and(target.ne(1)).logical_and(target.ne(4));
  const auto loss = cross_entropy(input, target, mask, {.ignore_index = {1, 4}, .z_loss = 0.3});
  expect_close(loss, rows.masked_select(kept).mean());
  expect_close(gradient_of(loss, input), gradient_of(rows.masked_select(kept).mean(), input));
}

TEST_F(CrossEntropyTest, ClassMaskLeavesClassesOut) {
  const auto allowed = bools({1, 1, 0, 1, 1, 0, 1});
  const auto index = allowed.nonzero().flatten();                    // [5]
  const auto among = at::randint(index.numel(), {B, T}, at::kLong);  // positions in `index`
  const auto expected = at::cross_entropy_loss(input.index_select(1, index), among, {}, at::Reduction::Mean, -100, 0.1);
  const auto loss = cross_entropy(input, index.index({among}), {}, {.class_mask = allowed, .label_smoothing = 0.1});
  expect_close(loss, expected);
  const auto gradient = gradient_of(loss, input);
  expect_close(gradient, gradient_of(expected, input));
  expect_bitwise(gradient.select(1, 2), at::zeros({B, T}, at::kDouble));

  const auto on_masked_class = cross_entropy(input, at::full({B, T}, 2, at::kLong), {}, {.class_mask = allowed});
  EXPECT_EQ(on_masked_class.item<double>(), std::numeric_limits<double>::infinity());
}

TEST_F(CrossEntropyTest, AnyClassDimension) {
  const auto expected = cross_entropy(input, target, mask);
  const auto last = input.detach().transpose(1, 2).contiguous().requires_grad_();  // [B, T, C]
  const auto loss = cross_entropy(last, target, mask, {.dim = -1});
  expect_close(loss, expected);
  expect_close(gradient_of(loss, last), gradient_of(expected, input).transpose(1, 2));

  const auto one = input.detach().select(0, 0).select(1, 0);  // [C]
  expect_close(cross_entropy(one, target.select(0, 0).select(0, 0)),
               at::cross_entropy_loss(one, target.select(0, 0).select(0, 0)));
}

TEST_F(CrossEntropyTest, SecondDerivatives) {
  const auto loss = cross_entropy(input, target, mask, {.label_smoothing = 0.1});
  const auto expected = at::cross_entropy_loss(kept_rows(), kept_targets(), {}, at::Reduction::Mean, -100, 0.1);
  const auto second = [&](const Tensor& value) {
    const auto gradient = torch::autograd::grad({value}, {input}, {}, /*retain_graph=*/true, /*create_graph=*/true)[0];
    return gradient_of(gradient.pow(2).sum(), input);
  };
  expect_close(second(loss), second(expected));
}

TEST_F(CrossEntropyTest, HalfTypesAccumulateInFloat) {
  const auto expected = at::cross_entropy_loss(kept_rows(), kept_targets()).detach();
  for (const auto type : {at::kFloat, at::kBFloat16, at::kHalf}) {
    const auto loss = cross_entropy(input.detach().to(type), target, mask);
    EXPECT_EQ(loss.scalar_type(), type);
    // One rounding of the logits, one of the result: 2^-8 for bfloat16, 2^-11 for half.
    const double tolerance = type == at::kBFloat16 ? 1e-2 : type == at::kHalf ? 2e-3 : 1e-6;
    EXPECT_NEAR(loss.item<double>(), expected.item<double>(), tolerance * expected.item<double>());
  }
}

TEST_F(CrossEntropyTest, Normalizer) {
  expect_bitwise(loss_normalizer(target, mask), at::scalar_tensor(10.0, at::kFloat));
  const auto weights = class_weight.index({target}) * sample_weight;
  expect_close(loss_normalizer(target, mask, {.weight = class_weight, .sample_weight = sample_weight}),
               weights.masked_select(mask).sum());
  expect_bitwise(loss_normalizer(target, at::zeros({1, 1}, at::kBool)), at::scalar_tensor(0.0, at::kFloat));
}

TEST_F(CrossEntropyTest, CheckTargets) {
  const auto checked = check_targets(target, C, mask);
  expect_bitwise(checked, target);
  EXPECT_FALSE(checked.is_alias_of(target));
  const auto wrong = at::tensor({1, 9, -100, -7}, at::kLong);
  expect_error<c10::IndexError>([&] { check_targets(wrong, 3); },
                                "check_targets: expected kept targets in [0, 3), got 9 at position [1]");
  expect_bitwise(check_targets(wrong, 3, {}, {9, -100, -7}), wrong);
}

TEST_F(CrossEntropyTest, TheDtypeOfTheResult) {
  const auto half = input.to(at::kBFloat16);
  EXPECT_EQ(cross_entropy(half, target, mask).scalar_type(), at::kBFloat16);
  const auto loss = cross_entropy(half, target, mask, {.dtype = at::kFloat});
  EXPECT_EQ(loss.scalar_type(), at::kFloat);
  expect_bitwise(loss.to(at::kBFloat16), cross_entropy(half, target, mask));
}

TEST_F(CrossEntropyTest, Errors) {
  auto wrong = target.clone();
  wrong.index_put_({1, 1}, 7);
  expect_error<c10::IndexError>([&] { cross_entropy(input, wrong, mask); },
                                "cross_entropy: expected kept targets in [0, 7), got 7 at position [1, 1]");
  wrong.index_put_({1, 1}, -3);
  expect_error<c10::IndexError>([&] { cross_entropy(input, wrong, mask); }, "got -3 at position [1, 1]");
  expect_error<c10::Error>([&] { cross_entropy(input, target, mask.to(at::kFloat)); },
                           "cross_entropy: expected mask of dtype bool or an integer dtype, got Float");
  expect_error<c10::Error>([&] { cross_entropy(input, target, mask.select(1, 0)); }, "cross_entropy: expected mask");
  expect_error<c10::Error>([&] { cross_entropy(input, target.select(1, 0)); }, "cross_entropy: expected target");
  expect_error<c10::Error>([&] { cross_entropy(input, target, mask, {.label_smoothing = 1.5}); },
                           "cross_entropy: expected label_smoothing in [0, 1], got 1.5");
  expect_error<c10::Error>([&] { cross_entropy(input, target, mask, {.z_loss = -1}); },
                           "cross_entropy: expected z_loss of at least 0, got -1");
  expect_error<c10::Error>([&] { cross_entropy(input, target, mask, {.dtype = at::kLong}); },
                           "cross_entropy: expected dtype to be float32, float64, bfloat16 or float16, got Long");
  expect_error<c10::Error>([&] { cross_entropy(input, target, mask, {.dim = 3}); },
                           "cross_entropy: expected dim in [-3, 2], got 3");
  expect_error<c10::Error>([&] { cross_entropy(input, target, mask, {.reduction = Reduction::BatchMean}); },
                           "cross_entropy: expected reduction");
  expect_error<c10::Error>(
      [&] { cross_entropy(input, target, mask, {.normalizer = at::scalar_tensor(-1.0, at::kDouble)}); },
      "cross_entropy: expected normalizer of at least 0, got -1");
  expect_error<c10::Error>([&] { cross_entropy(input, target, mask, {.sample_weight = mask}); },
                           "cross_entropy: expected sample_weight of a floating dtype, got Bool");
}

}  // namespace
}  // namespace masked_loss::test
