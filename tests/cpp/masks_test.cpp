#include <masked_loss/masked_loss.h>

#include <limits>

#include "expect.h"

namespace masked_loss::test {
namespace {

TEST(SequenceMask, PadsOnEitherSide) {
  const auto lengths = at::tensor({2, 0, 3}, at::kLong);
  const auto right = bools({1, 1, 0, 0, 0, 0, 1, 1, 1}).view({3, 3});
  expect_bitwise(sequence_mask(lengths, 3), right);
  expect_bitwise(sequence_mask(lengths, 3, PaddingSide::Left), right.flip(1));
}

TEST(SequenceMask, AnyIntegerDtypeAndShape) {
  for (const auto type : {at::kByte, at::kChar, at::kShort, at::kInt, at::kLong}) {
    const auto mask = sequence_mask(at::tensor({1, 2}, type).view({1, 2}), 2);
    expect_bitwise(mask, bools({1, 0, 1, 1}).view({1, 2, 2}));
  }
  expect_bitwise(sequence_mask(at::scalar_tensor(1, at::kLong), 2), bools({1, 0}));
  EXPECT_EQ(sequence_mask(at::empty({0}, at::kLong), 4).sizes(), at::IntArrayRef({0, 4}));
}

TEST(SequenceMask, LengthsOutsideTheRangeAreClamped) {
  constexpr auto least = std::numeric_limits<std::int64_t>::min(), most = std::numeric_limits<std::int64_t>::max();
  const auto lengths = at::tensor({least, std::int64_t{-1}, std::int64_t{9}, most}, at::kLong);
  const auto expected = bools({0, 0, 0, 0, 1, 1, 1, 1}).view({4, 2});
  expect_bitwise(sequence_mask(lengths, 2), expected);
  expect_bitwise(sequence_mask(lengths, 2, PaddingSide::Left), expected);
}

TEST(CausalMask, AlignsAtTheTopLeft) {
  expect_bitwise(causal_mask(3), at::ones({3, 3}, at::kBool).tril());
  expect_bitwise(causal_mask(2, 4), at::ones({2, 4}, at::kBool).tril());
  expect_bitwise(causal_mask(4, 2), at::ones({4, 2}, at::kBool).tril());
  EXPECT_EQ(causal_mask(0, 3).sizes(), at::IntArrayRef({0, 3}));
}

TEST(MaskFromIds, KeepsWhatIsNoneOfThem) {
  const auto tokens = at::tensor({5, 0, 1, 7}, at::kLong).view({2, 2});
  expect_bitwise(mask_from_ids(tokens, {0, 1}), bools({1, 0, 0, 1}).view({2, 2}));
  expect_bitwise(mask_from_ids(tokens.to(at::kByte), 7), bools({1, 1, 1, 0}).view({2, 2}));
  // 256 is no uint8: it must not wrap around to 0.
  expect_bitwise(mask_from_ids(tokens.to(at::kByte), 256), at::ones({2, 2}, at::kBool));
}

TEST(Masks, Errors) {
  expect_error<c10::Error>([] { sequence_mask(at::ones({2}), 3); },
                           "sequence_mask: expected lengths of an integer dtype, got Float");
  expect_error<c10::Error>([] { sequence_mask(at::ones({2}, at::kLong), -1); },
                           "sequence_mask: expected maxlen of at least 0, got -1");
  expect_error<c10::Error>([] { causal_mask(-2); }, "causal_mask: expected query_len of at least 0, got -2");
  expect_error<c10::Error>([] { mask_from_ids(at::ones({2}), 0); },
                           "mask_from_ids: expected tokens of an integer dtype, got Float");
}

}  // namespace
}  // namespace masked_loss::test
