#pragma once

// Only for kernel files, as blocks.h: what row programs and the traversals that run them have in common.
//
// A row program says what is added up over the classes of a row, and what is then written for each of them. It is
// written once, for rows whose classes are the lanes of vectors (row_blocks.h) and for rows that are lanes themselves
// (row_tiles.h). What is known of a row lies in columns: arrays of one element there, of one a lane here. A program has
//
//   State<rows>, Terms<rows>           columns: what is added up, and what the second visit needs
//   start(rows, state)                 before the first visit
//   visit(block, state)                the first visit of some classes
//   merge(state, other)                adds what another part of the row amounts to
//   conclude(rows, state, terms)       writes the results of the rows
//   write(block, state, terms)         the second visit
//
// beside what it takes over from RowProgram. A block gives functions of a place in it: input(), second() and
// of_class(data) give vectors, mask() selects, keep() takes what is kept. They are small and copied into loops: what a
// loop reads through a reference could not stay in registers, as it might be what the loop writes. State::max and
// Terms::scale are those of exponentials, and State::chosen_input is the input of the class that a program chooses.
#include "cpu/blocks.h"

namespace masked_loss::cpu::CPU_CAPABILITY {
namespace {

// Rows of so many classes that are contiguous are lanes at most; compare RowEngine.
constexpr std::int64_t kSmallClasses = 128;

// What is kept of a row from its first visit to the second, where there is room.
enum class Keeps { Nothing, Exponentials, Inputs };

template <class T_, class A_>
struct RowProgram {
  using T = T_;  // the dtype of the elements
  using A = A_;  // the one they are computed in

  static constexpr Keeps kKeeps = Keeps::Nothing;
  static constexpr bool kWrites = true;         // whether there is a second visit
  static constexpr bool kMinusInfinity = true;  // whether the inputs of masked classes are -inf, or as they are
  static constexpr bool kHasSecond = false;     // whether there may be a second operand
  static constexpr bool kVisitsInput = true;    // whether the first visit reads the input; it reads the second operand
  static constexpr bool kChooses = false;       // whether a class of a row may be chosen
  static constexpr bool kRanges = false;        // whether what is masked at both ends of a row is only written
  static constexpr A kMasked = 0;               // what is written for masked classes

  bool visits() const { return true; }  // whether there is a first visit
  std::int64_t end(std::int64_t row) const { return std::numeric_limits<std::int64_t>::max(); }  // of its kept classes
  bool skipped(std::int64_t position) const { return false; }                                    // such a row is +0
  std::int64_t chosen(std::int64_t position) const { return -1; }                                // a class, or none
};

template <class T>
struct RowOperands {
  // The kth of `rows`, which is known to the compiler; data is null where a program has none.
  template <class E, int k>
  struct Operand {
    static constexpr int index = k;

    E* data;
    std::int64_t stride;  // between classes

    E* at(const std::array<std::int64_t, 4>& offsets) const { return at_or_null(data, offsets[k]); }
  };

  const Rows<4>& rows;
  std::int64_t classes;
  Operand<const T, 0> input;
  Operand<T, 1> output;  // may be the input
  Operand<const std::uint8_t, 2> mask;
  Operand<const T, 3> second;
  bool causal = false;
  const std::int64_t* listed = nullptr;  // the rows to visit; null: all of them
  std::int64_t count = rows.count;       // of these

  std::int64_t row(std::int64_t position) const { return listed == nullptr ? position : listed[position]; }

  // Whether what is written is more than a cache holds, and is not read again.
  bool past_cache() const {
    return count * classes * static_cast<std::int64_t>(sizeof(T)) >= kPastCache && output.data != input.data;
  }

  // Whether rows may differ in what is masked.
  bool has_own_masks() const {
    const auto* steps = rows.strides[mask.index];
    return causal || (mask.data != nullptr && std::any_of(steps, steps + rows.dims, [](auto s) { return s != 0; }));
  }

  // Whether the elements of a row are contiguous, or repeated where that does.
  bool contiguous() const {
    const auto repeats = [](const auto& operand) { return operand.data == nullptr || (operand.stride | 1) == 1; };
    return input.stride == 1 && (output.data == nullptr || output.stride == 1) && repeats(mask) && repeats(second);
  }
};

// Calls body(k) for constants k in [0, n). Arrays that are only indexed by constants stay in registers.
template <int n, class Body>
C10_ALWAYS_INLINE void for_constants(const Body& body) {
  [&]<int... k>(std::integer_sequence<int, k...>) C10_ALWAYS_INLINE_ATTRIBUTE {
    (body(std::integral_constant<int, k>()), ...);
  }(std::make_integer_sequence<int, n>());
}

// Adds a block to the softmax of its rows.
template <class Block, class State>
void add_softmax(const Block& block, State& state) {
  using V = Vectorized<typename Block::A>;
  block.template add<1, true>({state.sum}, [&](auto row) {
    return [x = block.input(), keep = block.keep(), max = row(state.max)](auto at) {
      const V e = exp_of_negative(x(at) - max);
      keep(at, e);
      return std::array<V, 1>{e};
    };
  });
}

}  // namespace
}  // namespace masked_loss::cpu::CPU_CAPABILITY
