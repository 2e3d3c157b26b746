#pragma once

#include <cstdint>

#include "host_device.h"

namespace masked_loss {

inline constexpr int kMaxIgnored = 16;

enum class RowState : std::uint8_t { Masked, Kept, OutOfRange };

template <class A>
struct Row {
  RowState state;
  std::int64_t index;  // the target
  A weight;            // sample weight
  A counted;           // what the row adds to the divisor of a mean
};

// Everything that decides whether a row counts, and for how much; the one home of what a mask means.
template <class A>
struct RowRule {
  const void* target;
  int target_bytes;  // 1 uint8, 4 int32, 8 int64
  const void* mask;  // null: every row is kept
  int mask_bytes;
  const A* sample_weight;          // null: 1; a weight of 0 masks
  const A* weight;                 // [C] or null
  const std::uint8_t* class_mask;  // or null; a byte each
  std::int64_t class_mask_stride;
  std::int64_t class_mask_size;  // classes, or 1 for all of them
  std::int64_t classes;
  std::int64_t ignored[kMaxIgnored];
  int ignored_count;
};

MASKED_LOSS_HD std::int64_t load_index(const void* data, int bytes, std::int64_t offset) {
  switch (bytes) {
    case 1: return static_cast<const std::uint8_t*>(data)[offset];
    case 4: return static_cast<const std::int32_t*>(data)[offset];
    default: return static_cast<const std::int64_t*>(data)[offset];
  }
}

// A mask may have any integer dtype: what counts is whether a bit is set.
MASKED_LOSS_HD bool load_mask(const void* data, int bytes, std::int64_t offset) {
  switch (bytes) {
    case 1: return static_cast<const std::uint8_t*>(data)[offset] != 0;
    case 2: return static_cast<const std::uint16_t*>(data)[offset] != 0;
    case 4: return static_cast<const std::uint32_t*>(data)[offset] != 0;
    default: return static_cast<const std::uint64_t*>(data)[offset] != 0;
  }
}

template <class A>
MASKED_LOSS_HD Row<A> resolve_row(const RowRule<A>& view, std::int64_t target_offset, std::int64_t mask_offset,
                                  std::int64_t weight_offset, std::int64_t class_mask_offset) {
  const Row<A> masked{RowState::Masked, -1, 0, 0};
  if (view.mask != nullptr && !load_mask(view.mask, view.mask_bytes, mask_offset)) return masked;
  const std::int64_t index = load_index(view.target, view.target_bytes, target_offset);
  for (int i = 0; i < view.ignored_count; ++i) {
    if (index == view.ignored[i]) return masked;
  }
  const A weight = view.sample_weight == nullptr ? A(1) : view.sample_weight[weight_offset];
  if (weight == 0) return masked;
  if (view.class_mask != nullptr) {
    std::int64_t c = 0;
    while (c < view.class_mask_size && !view.class_mask[class_mask_offset + c * view.class_mask_stride]) ++c;
    if (c == view.class_mask_size) return masked;
  }
  if (index < 0 || index >= view.classes) return {RowState::OutOfRange, index, weight, weight};
  return {RowState::Kept, index, weight, view.weight == nullptr ? weight : weight * view.weight[index]};
}

}  // namespace masked_loss
