#pragma once

// Only for kernel files, as row_program.h.
#include "cpu/row_program.h"

namespace masked_loss::cpu::CPU_CAPABILITY {
namespace {

constexpr std::int64_t kBlock = 2048;       // classes of a row that are visited together
constexpr std::int64_t kPart = 8;           // blocks that a thread visits where several share a row
constexpr std::int64_t kLongRow = 1 << 18;  // classes; what is kept of a longer one would not stay in the L2 cache

struct Range {
  std::int64_t begin, end;

  bool empty() const { return begin >= end; }

  Range within(Range other) const { return {std::max(begin, other.begin), std::min(end, other.end)}; }

  // To the first and the last true byte.
  void trim(const std::uint8_t* keep) {
    const auto word = [&](std::int64_t i) {
      std::uint64_t bytes;
      std::memcpy(&bytes, keep + i, 8);
      return bytes;
    };
    while (end - begin >= 8 && word(end - 8) == 0) end -= 8;
    while (end > begin && !keep[end - 1]) --end;
    while (end - begin >= 8 && word(begin) == 0) begin += 8;
    while (begin < end && !keep[begin]) ++begin;
  }
};

// A vector of a row's classes, beginning with the ith of a block: a whole one, or the first lanes of it.
template <class A, bool whole>
struct VectorAt {
  std::int64_t i, lanes = Vectorized<A>::size();

  Vectorized<A> load(const A* from) const {
    return whole ? Vectorized<A>::loadu(from + i) : Vectorized<A>::loadu(from + i, lanes);
  }
};

// One row whose classes are contiguous, in blocks of them.
template <class Program>
class RowBlocks {
 public:
  using T = typename Program::T;
  using A = typename Program::A;
  using V = Vectorized<A>;
  using State = typename Program::template State<1>;
  using Terms = typename Program::template Terms<1>;

  // What is kept of a row goes to `kept`, or, where that is null, to the output if it can. Null too where several
  // threads share a row: then kept inputs are read again.
  RowBlocks(const Program& program, const RowOperands<T>& operands, A* kept)
      : program_(program), operands_(operands), past_cache_(operands.past_cache()), scratch_(kept) {}

  // Goes to a row.
  void operator()(std::int64_t position) {
    position_ = position;
    chosen_ = program_.chosen(position);
    skipped_ = program_.skipped(position);
    if (skipped_ && !Program::kWrites) return;
    const auto row = operands_.row(position);
    const auto offsets = operands_.rows.offsets(row);
    input_ = operands_.input.at(offsets);
    output_ = operands_.output.at(offsets);
    mask_ = operands_.mask.at(offsets);
    second_ = operands_.second.at(offsets);
    kept_ = scratch_;
    if constexpr (std::is_same_v<T, A> && Program::kKeeps == Keeps::Exponentials) {
      if (kept_ == nullptr) kept_ = output_;
    }
    range_ = {0, operands_.classes};
    if constexpr (Program::kRanges) range_.end = std::min(range_.end, program_.end(row));
    ends_ = range_.end < operands_.classes;
    if (mask_ == nullptr) return;
    if (operands_.mask.stride == 0) {
      if (!*mask_) range_.end = 0;
      mask_ = nullptr;
    } else if constexpr (Program::kRanges) {
      range_.trim(mask_);
    }
  }

  static std::int64_t blocks(const RowOperands<T>& operands) { return (operands.classes + kBlock - 1) / kBlock; }

  // Whether what is kept of a row goes to memory of its own: a long one would not stay in the L2 cache there.
  static bool keeps_row(const RowOperands<T>& operands) {
    if (Program::kKeeps == Keeps::Nothing) return false;
    if (!std::is_same_v<T, A>) return true;
    return Program::kKeeps == Keeps::Inputs ? Program::kMinusInfinity && operands.mask.data != nullptr
                                            : operands.past_cache() && operands.classes <= kLongRow;
  }

  // Blocks [begin, end) of the row. `references` has one element a block: what the exponentials that are kept of it are
  // relative to.
  void visit(std::int64_t begin, std::int64_t end, State& state, A* references) const {
    program_.start(*this, state);
    if (skipped_ || !program_.visits()) return;
    alignas(64) A stage[kBlock], second_stage[kBlock];
    for_blocks(range_.within({begin * kBlock, end * kBlock}), [&](std::int64_t i, std::int64_t n, std::int64_t b) {
      Block block(*this, i, n);
      if constexpr (Program::kVisitsInput) {
        block.input_ = load(i, n, at_or_null(kept_, i), stage);
        block.ahead_ = ahead(input_, i, n);
      }
      if constexpr (Program::kHasSecond) load_second(block, i, n, second_stage, true);
      if constexpr (requires { state.chosen_input; }) {
        if (chosen_ >= i && chosen_ < i + n && block.input_ != nullptr)
          state.chosen_input[0] = block.input_[chosen_ - i];
      }
      if constexpr (Program::kKeeps == Keeps::Exponentials) block.kept_ = at_or_null(kept_, i);
      program_.visit(block, state);
      if constexpr (Program::kKeeps == Keeps::Exponentials) references[b] = state.max[0];
    });
  }

  void conclude(State& state, Terms& terms) const { program_.conclude(*this, state, terms); }

  void write(std::int64_t begin, std::int64_t end, const State& state, const Terms& terms, const A* references) const {
    if constexpr (Program::kWrites) {
      const Range part{begin * kBlock, std::min(operands_.classes, end * kBlock)};
      past_cache_ ? write_as<true>(part, state, terms, references) : write_as<false>(part, state, terms, references);
    }
  }

  // Of the rows, which is one, to programs.
  std::int64_t position() const { return position_; }
  std::int64_t count() const { return 1; }
  std::int64_t width() const { return 1; }
  bool any_kept() const { return !skipped_; }
  bool kept(std::int64_t) const { return !skipped_; }
  bool allowed(std::int64_t, std::int64_t c) const { return mask_ == nullptr || mask_[c]; }
  void log(const A* from, A* to) const { *to = std::log(*from); }

  // Of what is kept: whether there is NaN among the inputs.
  bool has_nan(std::int64_t) const {
    for (auto c = range_.begin; c < range_.end; ++c) {
      if (allowed(0, c) && std::isnan(static_cast<A>(input_[c]))) return true;
    }
    return false;
  }

 private:
  static constexpr std::int64_t kBytes = sizeof(T), kLine = 64 / kBytes;

  struct Row {
    V operator()(const A* column) const { return V(*column); }
  };

  struct Load {
    const A* from;

    template <class At>
    V operator()(At at) const {
      return at.load(from);
    }
  };

  struct Select {
    const std::uint8_t* mask;

    explicit operator bool() const { return mask != nullptr; }

    template <class At>
    V operator()(At at, V kept, V masked) const {
      return mask == nullptr ? kept : select(mask + at.i, kept, masked, at.lanes);
    }
  };

  struct Store {
    A* to;

    template <class At>
    void operator()(At at, V v) const {
      if (to != nullptr) v.store(to + at.i, at.lanes);
    }
  };

  // Classes of the row, to programs.
  struct Block {
    using A = RowBlocks::A;
    static constexpr int kRows = 1;

    const A *input_ = nullptr, *second_ = nullptr;
    const std::uint8_t* mask_;
    std::int64_t first_, n_;
    A* kept_ = nullptr;
    Ahead ahead_, second_ahead_;

    Block(const RowBlocks& row, std::int64_t i, std::int64_t n) : mask_(at_or_null(row.mask_, i)), first_(i), n_(n) {}

    std::int64_t width() const { return 1; }
    Load input() const { return {input_}; }
    Load second() const { return {second_}; }
    Load of_class(const A* data) const { return {data + first_}; }  // of what each class has one of
    Select mask() const { return {mask_}; }
    Store keep() const { return {kept_}; }

    // Raises the maximum so far to that of the block, and makes the sum of exponentials relative to it.
    void raise(A* max, A* sum) const {
      const A before = *max;
      *max = std::max(max_of(input_, n_), before);
      if (*max != before && *sum != 0) *sum *= std::exp(before - *max);
    }

    // Adds term(row)(at), for each class, to the sums. What is read next is fetched meanwhile where `fetches`.
    template <int count, bool fetches = false, int m, class Term>
    void add(A* const (&sums)[m], const Term& of_row) const {
      const auto term = of_row(Row());
      const auto ahead = ahead_, second_ahead = second_ahead_;
      const auto n = n_;
      constexpr std::int64_t size = V::size();
      V even[count], odd[count];
      for_constants<count>([&](auto k) { even[k] = odd[k] = V(0); });
      std::int64_t i = 0;
      for (; i + 2 * size <= n; i += 2 * size) {
        if constexpr (fetches) {
          if constexpr (Program::kVisitsInput) ahead.fetch(i * kBytes, 2 * size * kBytes);
          if constexpr (Program::kHasSecond) second_ahead.fetch(i * kBytes, 2 * size * kBytes);
        }
        const auto terms0 = term(VectorAt<A, true>{i}), terms1 = term(VectorAt<A, true>{i + size});
        for_constants<count>([&](auto k) { even[k] = even[k] + terms0[k], odd[k] = odd[k] + terms1[k]; });
      }
      for (; i < n; i += size) {
        const VectorAt<A, false> at{i, std::min(size, n - i)};
        const auto terms = term(at);
        for_constants<count>([&](auto k) { even[k] = even[k] + first_lanes(terms[k], at.lanes, V(0)); });
      }
      for_constants<count>([&](auto k) { *sums[k] += sum_lanes(even[k] + odd[k]); });
    }
  };

  // The same in the second visit. `kept`: its exponentials are those of the first one.
  template <bool kept, bool past_cache>
  struct WriteBlock : Block {
    const RowBlocks& row_;
    std::int64_t masked_after_;  // how many classes are masked between the block and the end of a cache line
    A scale_ = 1;

    WriteBlock(const RowBlocks& row, std::int64_t i, std::int64_t n, std::int64_t masked_after)
        : Block(row, i, n), row_(row), masked_after_(masked_after) {}

    const A* scale() const { return &scale_; }

    auto exponential(V max) const {
      return [from = kept ? this->kept_ : this->input_, max](auto at) {
        return kept ? at.load(from) : exp_of_negative(at.load(from) - max);
      };
    }

    // Of the class that is chosen; write() subtracts it by itself here.
    auto where_chosen(V) const {
      return [](auto) { return V(0); };
    }

    // Writes value(row)(at) for each class, less `of_chosen`, a column, for the one that is chosen.
    template <class Value>
    void write(const Value& of_row, const A* of_chosen = nullptr) const {
      const auto first = this->first_;
      auto n = this->n_;
      T* out = row_.output_ + first;
      const auto value = of_row(Row());
      const auto ahead = this->ahead_;
      const auto at = [&](std::int64_t i, std::int64_t lanes) C10_ALWAYS_INLINE_ATTRIBUTE {
        if constexpr (!kept && !Program::kVisitsInput) ahead.fetch_at(i * kBytes, V::size() * kBytes);
        return lanes == V::size() ? value(VectorAt<A, true>{i}) : value(VectorAt<A, false>{i, lanes});
      };
      // Put right before it is stored: a cache line that has gone past the cache would be read again.
      const auto from_stage = [&](T* to, const A* stage, std::int64_t count) {
        store_vectors<past_cache, A>(to, count, [&](std::int64_t i, std::int64_t) { return V::loadu(stage + i); });
      };
      if constexpr (Program::kChooses) {
        const auto chosen = row_.chosen_ - first;
        if (of_chosen != nullptr && chosen >= 0 && chosen < n && this->allowed(chosen)) {
          alignas(64) A stage[kBlock + V::size()];
          store_vectors<false, A>(stage, n, at);
          stage[chosen] -= *of_chosen;
          return from_stage(out, stage, n);
        }
      }
      if constexpr (Program::kRanges && past_cache) {
        if (masked_after_ > 0) {
          alignas(64) A stage[kLine + V::size()];
          const auto last = (first + n) % kLine;
          n -= last;
          store_vectors<false, A>(stage, last, [&](std::int64_t i, std::int64_t lanes) { return at(n + i, lanes); });
          std::fill_n(stage + last, masked_after_, Program::kMasked);
          from_stage(out + n, stage, last + masked_after_);
        }
      }
      if constexpr (kept && past_cache) {
        if (static_cast<const void*>(this->kept_) == out) return store_vectors<false, A>(out, n, at);
      }
      store_vectors<past_cache, A>(out, n, at);
    }

    bool allowed(std::int64_t i) const { return this->mask_ == nullptr || this->mask_[i]; }
  };

  // Calls body(begin, count, number) for the part of each block.
  template <class Body>
  static void for_blocks(Range range, const Body& body) {
    for (auto i = range.begin; i < range.end;) {
      const auto b = i / kBlock, end = std::min(range.end, (b + 1) * kBlock);
      body(i, end - i, b);
      i = end;
    }
  }

  // What is read after a block: the rest of the row, or the next one.
  Ahead ahead(const T* line, std::int64_t i, std::int64_t n) const {
    return {line + (i + n < range_.end ? i + n : operands_.classes + range_.begin), n * kBytes};
  }

  const A* load(std::int64_t i, std::int64_t n, A* kept, A* stage) const {
    return load_block(input_ + i, Program::kMinusInfinity ? at_or_null(mask_, i) : nullptr, n,
                      kept == nullptr ? stage : kept);
  }

  void load_second(Block& block, std::int64_t i, std::int64_t n, A* stage, bool first_time) const {
    if (second_ == nullptr) return;
    block.second_ = stage;
    if (operands_.second.stride == 0) {
      std::fill(stage, stage + n, static_cast<A>(*second_));
    } else {
      block.second_ = load_block(second_ + i, nullptr, n, stage);
      if (first_time) block.second_ahead_ = ahead(second_, i, n);
    }
  }

  template <bool past_cache>
  void write_as(Range part, const State& state, const Terms& terms, const A* references) const {
    auto range = range_.within(part);
    if (skipped_ || range.empty()) return fill_masked<past_cache>(part, skipped_ ? A(0) : Program::kMasked);
    // Whole cache lines, so that each is written by one way.
    auto end = range.end;
    if (Program::kRanges && past_cache && static_cast<const void*>(kept_) != output_) {
      end = std::min(part.end, (end + kLine - 1) / kLine * kLine);
      if (mask_ != nullptr) range.begin = range.begin / kLine * kLine;
      if (mask_ != nullptr && !ends_) range.end = end;
    }
    fill_masked<past_cache>({part.begin, range.begin}, Program::kMasked);
    if constexpr (Program::kKeeps == Keeps::Exponentials) {
      kept_ != nullptr ? write_blocks<true, past_cache>(range, end, state, terms, references)
                       : write_blocks<false, past_cache>(range, end, state, terms, references);
    } else {
      write_blocks<false, past_cache>(range, end, state, terms, references);
    }
    fill_masked<past_cache>({end, part.end}, Program::kMasked);
  }

  template <bool kept, bool past_cache>
  void write_blocks(Range range, std::int64_t end, const State& state, const Terms& terms, const A* references) const {
    alignas(64) A stage[kBlock], second_stage[kBlock];
    for_blocks(range, [&](std::int64_t i, std::int64_t n, std::int64_t b) {
      WriteBlock<kept, past_cache> block(*this, i, n, i + n == range.end ? end - range.end : 0);
      if constexpr (requires { terms.scale; }) block.scale_ = terms.scale[0];
      if constexpr (kept) {
        block.kept_ = kept_ + i;
        if (references[b] != state.max[0]) block.scale_ *= std::exp(references[b] - state.max[0]);
      } else {
        const bool in_place = std::is_same_v<T, A> && (!Program::kMinusInfinity || mask_ == nullptr);
        const bool keeps = Program::kKeeps == Keeps::Inputs && Program::kVisitsInput && !in_place && kept_ != nullptr;
        block.input_ = keeps ? kept_ + i : load(i, n, nullptr, stage);
        if constexpr (!Program::kVisitsInput) block.ahead_ = ahead(input_, i, n);
      }
      if constexpr (Program::kHasSecond) load_second(block, i, n, second_stage, false);
      program_.write(block, state, terms);
    });
  }

  template <bool past_cache>
  void fill_masked(Range range, A value) const {
    if (!range.empty()) fill<past_cache>(output_ + range.begin, range.end - range.begin, T(value));
  }

  const Program& program_;
  const RowOperands<T>& operands_;
  const bool past_cache_;
  A* const scratch_;
  std::int64_t position_ = 0, chosen_ = -1;
  bool skipped_ = false, ends_ = false;  // the latter: whether classes are masked that the mask does not know of
  A* kept_ = nullptr;
  const T *input_ = nullptr, *second_ = nullptr;
  T* output_ = nullptr;
  const std::uint8_t* mask_ = nullptr;  // null: the whole range is kept
  Range range_{};
};

}  // namespace
}  // namespace masked_loss::cpu::CPU_CAPABILITY
