#pragma once

#include <ATen/core/Tensor.h>
#include <masked_loss/export.h>

#include <cstdint>
#include <optional>

namespace masked_loss {

enum class PaddingSide { Right, Left };

// True at the positions inside each sequence. lengths [...] of any integer dtype; the result is bool [..., maxlen].
MASKED_LOSS_API at::Tensor sequence_mask(const at::Tensor& lengths, std::int64_t maxlen,
                                         PaddingSide padding_side = PaddingSide::Right);

// True where a query may attend to a key, that is, where the key is not after the query (aligned at the top left).
// The result is bool [query_len, key_len]; key_len is query_len by default.
MASKED_LOSS_API at::Tensor causal_mask(std::int64_t query_len, std::optional<std::int64_t> key_len = std::nullopt,
                                       std::optional<at::Device> device = std::nullopt);

// True where a token is none of `ids`. tokens of any integer dtype; the result is bool, with the same shape.
MASKED_LOSS_API at::Tensor mask_from_ids(const at::Tensor& tokens, at::IntArrayRef ids);

}  // namespace masked_loss
