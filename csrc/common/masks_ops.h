#pragma once

#include <string_view>

#include "ops.h"

namespace masked_loss {

struct SequenceMask : Op<Tensor(const Tensor&, c10::SymInt, std::string_view)> {
  static constexpr auto name = "sequence_mask";
};
struct CausalMask : Op<Tensor(c10::SymInt, std::optional<c10::SymInt>, std::optional<at::Device>)> {
  static constexpr auto name = "causal_mask";
};
struct MaskFromIds : Op<Tensor(const Tensor&, at::IntArrayRef)> {
  static constexpr auto name = "mask_from_ids";
};

}  // namespace masked_loss
