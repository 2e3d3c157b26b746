// How the rows of a call are spread over threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "common/rows.h"

namespace masked_loss::cuda {

inline constexpr int kRowThreads = 256;  // of a block, at most

// Threads a row, and of a block.
struct RowShape {
  int lanes, threads;
};

// Packs: the first whose lanes hold a row, else the last. A few lanes with many packs each have more bytes under way
// than a warp with one, and less to exchange; what is beside a pack's 16 bytes makes a whole sector of memory.
inline constexpr RowShape kPackShapes[] = {{2, 128},  {4, 128}, {8, 128},   {16, 128},
                                           {32, 128}, {64, 64}, {128, 128}, {256, 256}};
// Tiles: likewise. The other threads of a block take neighbouring rows.
inline constexpr RowShape kTileShapes[] = {{1, 128},  {2, 256},  {4, 256},   {8, 256},  {16, 256},
                                           {32, 256}, {64, 256}, {128, 256}, {256, 256}};
inline constexpr int kNeighbours = 8;  // threads side by side, for neighbouring rows, at least

inline constexpr std::int64_t kPackedBytes = 512;      // of rows that are no whole packs, from which on they are packs
inline constexpr std::int64_t kPartedBytes = 1 << 14;  // of a row, from which on it is worth several blocks
inline constexpr std::int64_t kPartBytes = 1 << 12;    // of a part, at least

struct RowRegime {
  enum Kind {
    Packs,  // classes side by side: `lanes` threads hold a row, or the last part of it, in packs
    Tiles,  // any strides: `lanes` threads a row, others for neighbouring rows; classes one by one
    Ring,   // long rows through shared memory, by clusters of so many `slices`
  } kind;
  RowShape shape;
  int slices = 1;              // Packs: blocks a row, whose parts are put together by a second kernel
  int width = 1;               // Tiles: neighbouring rows a thread, a pack of them or one
  bool classes_first = false;  // Tiles: neighbouring threads take neighbouring classes, not rows
};

// What a choice depends on.
struct RowFacts {
  std::int64_t rows, classes;
  int element_bytes;
  bool classes_beside;  // classes are contiguous in all operands
  bool whole_packs;     // and rows are packs at multiples of 16 bytes
  bool rows_beside;     // rows are contiguous in all operands, and a class's are packs at multiples of 16 bytes
  int ring_blocks = 0;  // that a ring would have a row take; 0: there is none
};

// What a program is compiled for.
struct RowLimits {
  int most;    // packs of each operand that a thread holds
  bool tiles;  // whether its tiles may have packs of rows

  // Of one element a pack, too.
  constexpr int packs(int element_bytes) const { return element_bytes > 4 ? most / 2 : most; }
};

// Classes that a thread of a tile holds, whether of one row or several: of eight rows, registers are for their states,
// too.
constexpr int tile_units(int packs, int element_bytes) { return element_bytes == 2 ? packs * 3 / 4 : packs; }

namespace regime {

template <int n>
constexpr RowShape first_of(const RowShape (&shapes)[n], std::int64_t lanes) {
  for (const auto& shape : shapes) {
    if (shape.lanes >= lanes) return shape;
  }
  return shapes[n - 1];
}

constexpr std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace regime

inline RowRegime pick_row_regime(const RowFacts& of, const RowLimits& limits, int multiprocessors) {
  const auto bytes = of.classes * of.element_bytes;
  const int held = limits.packs(of.element_bytes);
  const bool narrow = of.element_bytes <= 4 && of.classes < (std::int64_t{1} << 31);
  const bool packs = narrow && of.classes_beside && (of.whole_packs ? bytes > 0 : bytes > kPackedBytes);
  if (!packs) {
    const int pack = 16 / of.element_bytes;
    const int width = limits.tiles && of.rows_beside && narrow ? pack : 1;
    // So many lanes that a row is held, or that there is something to do for every multiprocessor, while neighbouring
    // threads still read whole sectors.
    const auto most = of.classes_beside ? kRowThreads : kRowThreads / kNeighbours;
    const auto lanes = std::min<std::int64_t>(most, regime::divide_up(of.classes, tile_units(held, of.element_bytes)));
    return {.kind = RowRegime::Tiles,
            .shape = regime::first_of(kTileShapes, lanes),
            .width = width,
            .classes_first = of.classes_beside};
  }
  // Few rows: so many slices that every multiprocessor has some, of a size that is worth a block.
  const auto wanted =
      bytes < kPartedBytes
          ? 1
          : std::min(regime::divide_up(2 * multiprocessors, std::max<std::int64_t>(1, of.rows)), bytes / kPartBytes);
  const bool enough = 2 * of.rows * of.ring_blocks >= multiprocessors;
  if (of.ring_blocks > 0 && (enough || wanted <= 1)) {
    return {.kind = RowRegime::Ring, .shape = {}, .slices = of.ring_blocks};
  }
  const auto lanes = regime::divide_up(regime::divide_up(bytes, std::max<std::int64_t>(1, wanted)), 16 * held);
  const bool small = of.whole_packs && wanted <= 1;
  // Elements beside whole packs are for the lanes of a warp; a row in parts has whole blocks.
  return {.kind = RowRegime::Packs,
          .shape = regime::first_of(kPackShapes, std::max<std::int64_t>(small         ? 1
                                                                        : wanted <= 1 ? 32
                                                                                      : 64,
                                                                        lanes)),
          .slices = static_cast<int>(std::max<std::int64_t>(1, wanted))};
}

// What the same call may be given instead of what was picked, for whoever tries them all.
inline std::vector<RowRegime> other_regimes(const RowRegime& picked) {
  std::vector<RowRegime> all;
  if (picked.kind == RowRegime::Tiles) {
    for (const auto& shape : kTileShapes) all.push_back({picked.kind, shape, 1, picked.width, picked.classes_first});
    return all;
  }
  if (picked.kind == RowRegime::Ring) all.push_back(picked);
  for (const auto& shape : kPackShapes) {
    all.push_back({RowRegime::Packs, shape});
    if (picked.kind == RowRegime::Packs && picked.slices > 1) {
      all.push_back({RowRegime::Packs, shape, picked.slices});
      all.push_back({RowRegime::Packs, shape, (picked.slices + 1) / 2});
    }
  }
  return all;
}

inline std::string to_string(const RowRegime& of) {
  constexpr const char* kinds[] = {"packs", "tiles", "ring"};
  return std::string(kinds[of.kind]) + " of " + std::to_string(of.shape.lanes) + " lanes, " +
         std::to_string(of.slices) + " slices";
}

// An operand that a thread reads or writes, among those of `rows`.
struct RowOperand {
  const void* data;  // or null: there is none
  int index;
  std::int64_t stride;  // between classes
};

template <int n>
RowFacts row_facts(const Rows<4>& rows, std::int64_t classes, int element_bytes, const RowOperand (&operands)[n],
                   const RowOperand& mask, bool causal) {
  RowFacts facts{rows.count, classes, element_bytes, true, true, !causal && rows.dims > 0};
  const std::int64_t pack = 16 / element_bytes;
  const int last = rows.dims - 1;
  facts.whole_packs = classes % pack == 0;
  facts.rows_beside = facts.rows_beside && rows.sizes[last] % pack == 0;
  for (const auto& [data, index, stride] : operands) {
    if (data == nullptr) continue;
    const bool aligned = reinterpret_cast<std::uintptr_t>(data) % 16 == 0;
    facts.classes_beside &= stride == 1;
    facts.whole_packs &= aligned;
    facts.rows_beside = facts.rows_beside && aligned && stride % pack == 0 && rows.strides[index][last] == 1;
    for (int d = 0; d < rows.dims; ++d) {
      const bool whole = rows.strides[index][d] % pack == 0;
      facts.whole_packs &= whole;
      facts.rows_beside &= whole || d == last;
    }
  }
  if (mask.data != nullptr) {
    facts.classes_beside &= (mask.stride | 1) == 1;
    facts.rows_beside = facts.rows_beside && (rows.strides[mask.index][last] | 1) == 1;
  }
  facts.whole_packs &= facts.classes_beside;
  return facts;
}

}  // namespace masked_loss::cuda
