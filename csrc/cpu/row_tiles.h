#pragma once

// Only for kernel files, as row_program.h.
#include "cpu/row_program.h"

namespace masked_loss::cpu::CPU_CAPABILITY {
namespace {

constexpr std::int64_t kLanes = 512;  // rows of a tile at most

// How rows that are lanes are visited: a tile is [classes, lanes], and its classes come in blocks.
template <class Program>
struct TileShape {
  bool transposes;
  std::int64_t lanes, block;
  bool keeps = false;  // whether what the program keeps of a tile stays in a cache

  template <class T>
  explicit TileShape(const RowOperands<T>& operands) {
    const auto contiguous = [](const auto& operand) { return operand.data != nullptr && operand.stride == 1; };
    transposes = contiguous(operands.input) || contiguous(operands.output) || contiguous(operands.second);
    const auto classes = std::max<std::int64_t>(1, operands.classes);
    // Few classes that are contiguous are transposed within the L1 cache. Of others the lanes are, and long pieces of
    // memory are read faster.
    lanes = !transposes                    ? kLanes
            : classes <= kSmallClasses / 2 ? kSmallTile / (kSmallClasses / 2)
                                           : kSmallTile / kSmallClasses;
    block = classes <= (transposes ? kSmallClasses : 2 * kTileBlock) ? classes : kTileBlock;
    if constexpr (Program::kKeeps != Keeps::Nothing) {
      const bool both = Program::kKeeps == Keeps::Inputs && operands.second.data != nullptr;
      const auto most = kTile / (classes * (both ? 2 : 1));
      keeps = most >= lanes / 2;
      if (keeps && most < lanes) lanes /= 2;
    }
    // Fewer where there would not be tiles for many threads.
    while (lanes > kFewLanes && lanes * kTiles > operands.count) lanes /= 2;
  }

 private:
  static constexpr std::int64_t kTile = 1 << 19, kSmallTile = 1 << 13;  // elements that stay in the L3 and L1 cache
  static constexpr std::int64_t kTileBlock = 16;                        // classes
  static constexpr std::int64_t kFewLanes = 32, kTiles = 16;
};

// The memory that tiles are computed in; null with what is not used.
template <class T, class A>
struct TileScratch {
  A* results;             // [classes, lanes] of a block; apart from what is kept, which would be written once more
  A *inputs, *second;     // [classes, lanes], of a block or of all that is kept
  A* transposed;          // [lanes, classes] of a block
  A* references;          // [blocks, lanes]: what the exponentials that are kept are relative to
  std::uint8_t* mask;     // [classes, lanes] of a block
  std::int64_t size = 0;  // bytes

  template <class Program>
  TileScratch(const RowOperands<T>& operands, const TileShape<Program>& shape, char* data) {
    const auto take = [&]<class P>(P*& pointer, bool used, std::int64_t classes) {
      const auto elements = used ? classes * shape.lanes : 0;
      pointer = reinterpret_cast<P*>(data + size);
      size += (elements * static_cast<std::int64_t>(sizeof(P)) + 63) / 64 * 64;
    };
    const bool keeps_inputs = shape.keeps && Program::kKeeps == Keeps::Inputs;
    take(inputs, true, shape.keeps ? operands.classes : shape.block);
    take(results, shape.keeps && shape.block < operands.classes, shape.block);
    if (!shape.keeps || shape.block >= operands.classes) results = inputs;
    take(second, Program::kHasSecond && operands.second.data != nullptr, keeps_inputs ? operands.classes : shape.block);
    take(transposed, shape.transposes, shape.block);
    take(references, shape.keeps && shape.block < operands.classes, operands.classes / shape.block + 1);
    take(mask, operands.mask.data != nullptr || operands.causal, shape.block);
  }
};

template <class Program>
class RowTiles {
 public:
  using T = typename Program::T;
  using A = typename Program::A;
  using V = Vectorized<A>;

  RowTiles(const Program& program, const RowOperands<T>& operands, char* scratch)
      : program_(program),
        operands_(operands),
        shape_(operands),
        scratch_(operands, shape_, scratch),
        lanes_(shape_.lanes),
        own_masks_(operands.has_own_masks()),
        has_mask_(operands.mask.data != nullptr || operands.causal),
        past_cache_(operands.past_cache()) {
    const auto dims = operands.rows.dims;
    inner_ = dims == 0 ? 1 : operands.rows.sizes[dims - 1];
    for (int k = 0; k < 4; ++k) stride_[k] = dims == 0 ? 0 : operands.rows.strides[k][dims - 1];
  }

  static std::int64_t lanes(const RowOperands<T>& operands) { return TileShape<Program>(operands).lanes; }

  static std::int64_t scratch_size(const RowOperands<T>& operands) {
    return TileScratch<T, A>(operands, TileShape<Program>(operands), nullptr).size;
  }

  void operator()(std::int64_t begin, std::int64_t end) {
    for (auto p = begin; p < end; p += lanes_) run(p, std::min(lanes_, end - p));
  }

  // Of the rows of a tile, to programs. Columns have width() elements, of which those from count() on are no row.
  std::int64_t position() const { return position_; }
  std::int64_t count() const { return count_; }
  std::int64_t width() const { return width_; }
  bool any_kept() const { return any_kept_; }
  bool kept(std::int64_t w) const { return kept_[w]; }

  bool allowed(std::int64_t w, std::int64_t c) const {
    if (operands_.causal && c >= program_.end(row(w))) return false;
    const auto& mask = operands_.mask;
    if (mask.data == nullptr) return true;
    return (own_masks_ ? mask.at(operands_.rows.offsets(row(w))) : mask.data)[c * mask.stride];
  }

  void log(const A* from, A* to) const {
    for_lanes([&](std::int64_t w) { V::loadu(from + w).log().store(to + w); });
  }

  // Of what is kept: whether there is NaN among the inputs.
  bool has_nan(std::int64_t w) const {
    const T* input = operands_.input.at(operands_.rows.offsets(row(w)));
    for (std::int64_t c = 0; c < operands_.classes; ++c) {
      if (std::isnan(static_cast<A>(input[c * operands_.input.stride])) && allowed(w, c)) return true;
    }
    return false;
  }

 private:
  static constexpr std::int64_t kGroup = 4;  // classes that a pass takes together
  static constexpr int kPadded = kLanes + V::size();
  using State = typename Program::template State<kPadded>;
  using Terms = typename Program::template Terms<kPadded>;

  // Lanes whose rows are one step apart.
  struct Part {
    std::int64_t lane, count;
    std::array<std::int64_t, 4> offsets;
  };

  // [classes, lanes]
  template <class E>
  struct Lines {
    const E* data = nullptr;
    std::int64_t stride = 0;

    const E* at(std::int64_t i, std::int64_t w) const { return data + i * stride + w; }
  };

  struct Row {
    std::int64_t w;

    V operator()(const A* column) const { return V::loadu(column + w); }
  };

  struct At {
    std::int64_t i, w;
  };

  struct Select {
    Lines<std::uint8_t> mask;

    explicit operator bool() const { return mask.data != nullptr; }

    V operator()(At at, V kept, V masked) const { return *this ? select(mask.at(at.i, at.w), kept, masked) : kept; }
  };

  static auto load(const Lines<A>& from) {
    return [from](At at) { return V::loadu(from.at(at.i, at.w)); };
  }

  // Classes of the rows, to programs; compare RowBlocks.
  struct Block {
    using A = RowTiles::A;
    static constexpr int kRows = kPadded;

    Lines<A> inputs_, second_;
    Lines<std::uint8_t> mask_;
    std::int64_t first_, n_, width_, lanes_;
    A* kept_ = nullptr;
    Lines<T> next_inputs_, next_second_;  // what is read after the block

    Block(RowTiles& tile, std::int64_t c, std::int64_t n)
        : mask_(tile.load_mask(c, n)), first_(c), n_(n), width_(tile.width_), lanes_(tile.lanes_) {}

    std::int64_t width() const { return width_; }
    auto input() const { return load(inputs_); }
    auto second() const { return load(second_); }
    auto of_class(const A* data) const {
      return [data = data + first_](At at) { return V(data[at.i]); };
    }
    Select mask() const { return {mask_}; }
    auto keep() const {
      return [to = kept_, lanes = lanes_](At at, V v) {
        if (to != nullptr) v.store(to + at.i * lanes + at.w);
      };
    }

    void raise(A* max, A* sum) const {
      alignas(64) A before[kPadded];
      const bool first = first_ == 0;
      if (!first) std::copy_n(max, width_, before);
      for_groups([max, inputs = inputs_](std::int64_t w, std::int64_t begin, std::int64_t end) {
        V largest = V::loadu(max + w);
        for (auto i = begin; i < end; ++i) largest = larger(V::loadu(inputs.at(i, w)), largest);
        largest.store(max + w);
      });
      for (std::int64_t w = 0; !first && w < width_; w += V::size()) {
        (V::loadu(sum + w) * exp_of_negative(V::loadu(before + w) - V::loadu(max + w))).store(sum + w);
      }
    }

    template <int count, bool fetches = false, int n, class Term>
    void add(A* const (&sums)[n], const Term& of_row) const {
      for_groups([&, next_inputs = next_inputs_, next_second = next_second_](std::int64_t w, std::int64_t begin,
                                                                             std::int64_t end) {
        const auto term = of_row(Row{w});
        V lanes[count];
        for_constants<count>([&](auto k) { lanes[k] = V::loadu(sums[k] + w); });
        for (auto i = begin; i < end; ++i) {
          if constexpr (fetches) {
            if constexpr (Program::kVisitsInput) __builtin_prefetch(next_inputs.at(i, w), 0, 2);
            if (Program::kHasSecond && next_second.data != nullptr) __builtin_prefetch(next_second.at(i, w), 0, 2);
          }
          const auto terms = term(At{i, w});
          for_constants<count>([&](auto k) { lanes[k] = lanes[k] + terms[k]; });
        }
        for_constants<count>([&](auto k) { lanes[k].store(sums[k] + w); });
      });
    }

   private:
    // Class by class, as they lie in memory, but a few together: what is kept for a lane is then loaded less often.
    template <class Body>
    void for_groups(const Body& body) const {
      for (std::int64_t i = 0; i < n_; i += kGroup) {
        if (i + kGroup <= n_) {
          for (std::int64_t w = 0; w < width_; w += V::size()) body(w, i, i + kGroup);
        } else {
          for (std::int64_t w = 0; w < width_; w += V::size()) body(w, i, n_);
        }
      }
    }
  };

  // The same in the second visit. `kept`: its exponentials are those of the first one.
  template <bool kept>
  struct WriteBlock : Block {
    const A *scale_ = nullptr, *chosen_ = nullptr;  // columns; the latter is the class that is chosen, in the block
    const bool* kept_rows_ = nullptr;               // null: all
    A* out_ = nullptr;

    using Block::Block;

    const A* scale() const { return scale_; }

    auto exponential(V max) const {
      return [from = this->inputs_, max](At at) {
        const V x = V::loadu(from.at(at.i, at.w));
        return kept ? x : exp_of_negative(x - max);
      };
    }

    auto where_chosen(V v) const {
      return [chosen = chosen_, v](At at) { return where_equal(V::loadu(chosen + at.w), V(static_cast<A>(at.i)), v); };
    }

    template <class Value>
    void write(const Value& of_row, const A* = nullptr) const {
      for (std::int64_t i = 0; i < this->n_; ++i) {
        for (std::int64_t w = 0; w < this->width_; w += V::size()) {
          V v = of_row(Row{w})(At{i, w});
          if (kept_rows_ != nullptr) v = select(kept_rows_ + w, v, V(0));
          v.store(out_ + i * this->lanes_ + w);
        }
      }
    }
  };

  template <class Body>
  void for_blocks(const Body& body) {
    for (std::int64_t c = 0; c < operands_.classes; c += shape_.block) {
      body(c, std::min(shape_.block, operands_.classes - c));
    }
  }

  template <class Body>
  void for_lanes(const Body& body) const {
    for (std::int64_t w = 0; w < width_; w += V::size()) body(w);
  }

  void run(std::int64_t position, std::int64_t count) {
    position_ = position, count_ = count;
    width_ = (count + V::size() - 1) / V::size() * V::size();
    split();
    read_program();
    program_.start(*this, state_);
    if (any_kept_ && program_.visits()) for_blocks([&](auto c, auto n) { visit(c, n); });
    if constexpr (requires { state_.chosen_input; }) {
      if (any_chosen_ && Program::kVisitsInput) take_chosen_inputs();
    }
    program_.conclude(*this, state_, terms_);
    if constexpr (Program::kWrites) {
      constexpr bool keeps_exponentials = Program::kKeeps == Keeps::Exponentials;
      if (!any_kept_) {
        for_blocks([&](auto c, auto n) { write_zeros(c, n); });
      } else if (keeps_exponentials && shape_.keeps) {
        for_blocks([&](auto c, auto n) { write<keeps_exponentials>(c, n); });
      } else {
        for_blocks([&](auto c, auto n) { write<false>(c, n); });
      }
    }
  }

  void split() {
    parts_ = 0;
    for (std::int64_t lane = 0; lane < count_; lane += part_[parts_++].count) {
      const auto first = row(lane);
      auto together = std::min(count_ - lane, inner_ - first % inner_);
      if (operands_.listed != nullptr) {
        std::int64_t w = 1;
        while (w < together && row(lane + w) == first + w) ++w;
        together = w;
      }
      part_[parts_] = {lane, together, operands_.rows.offsets(first)};
    }
    one_part_ = parts_ == 1 && count_ == width_;
  }

  std::int64_t row(std::int64_t w) const { return operands_.row(position_ + w); }

  void read_program() {
    std::int64_t kept = 0, chosen = 0, skipped[kPadded];  // apart from bool, stores of which might change anything
    for (std::int64_t w = 0; w < count_; ++w) {
      skipped[w] = program_.skipped(position_ + w);
      chosen_[w] = program_.chosen(position_ + w);
      kept += 1 - skipped[w], chosen += chosen_[w] >= 0;
    }
    for (std::int64_t w = 0; w < count_; ++w) kept_[w] = skipped[w] == 0;
    std::fill(kept_ + count_, kept_ + width_, false);
    std::fill(chosen_ + count_, chosen_ + width_, -1);
    any_kept_ = kept > 0, all_kept_ = kept == count_, any_chosen_ = chosen > 0;
  }

  void take_chosen_inputs() {
    for (int p = 0; p < parts_; ++p) {
      const auto& part = part_[p];
      const T* x = operands_.input.at(part.offsets);
      for (std::int64_t i = 0, w = part.lane; i < part.count; ++i, ++w) {
        const auto chosen = std::max<std::int64_t>(chosen_[w], 0);  // of a row that has none it is not used
        state_.chosen_input[w] =
            static_cast<A>(x[i * stride_[operands_.input.index] + chosen * operands_.input.stride]);
      }
    }
  }

  // Classes [c, c + n) of an operand as A: in place where that can be, or in `tile`. Nothing is made of what skipped
  // lanes hold.
  template <class Operand>
  Lines<A> load(const Operand& operand, std::int64_t c, std::int64_t n, A* tile, bool in_place) {
    const auto lane_stride = stride_[operand.index];
    if constexpr (std::is_same_v<T, A>) {
      if (in_place && one_part_ && lane_stride == 1) {
        return {operand.at(part_[0].offsets) + c * operand.stride, operand.stride};
      }
    }
    for (int p = 0; p < parts_; ++p) {
      const auto& part = part_[p];
      const T* x = operand.at(part.offsets) + c * operand.stride;
      A* lane = tile + part.lane;
      if (lane_stride == 1 || part.count == 1) {
        for (std::int64_t i = 0; i < n; ++i) convert(x + i * operand.stride, lane + i * lanes_, part.count);
      } else if (operand.stride == 1) {
        load_transposed(x, lane_stride, part.count, n, lane);
      } else {
        for (std::int64_t i = 0; i < n; ++i) {
          for (std::int64_t w = 0; w < part.count; ++w) {
            lane[i * lanes_ + w] = static_cast<A>(x[i * operand.stride + w * lane_stride]);
          }
        }
      }
    }
    for (std::int64_t i = 0; count_ < width_ && i < n; ++i) {
      std::fill(tile + i * lanes_ + count_, tile + i * lanes_ + width_, A(0));
    }
    return {tile, lanes_};
  }

  static void convert(const T* from, A* to, std::int64_t n) {
    for_vectors<A>(from, n, [&](V v, std::int64_t i, std::int64_t lanes) { v.store(to + i, lanes); });
  }

  // Calls body(offset, offset of a dense copy, elements) for rows of n elements: for all of them at once where they are
  // contiguous.
  template <class Body>
  static void for_rows(std::int64_t count, std::int64_t n, std::int64_t stride, const Body& body) {
    if (stride == n) return body(0, 0, count * n);
    for (std::int64_t w = 0; w < count; ++w) body(w * stride, w * n, n);
  }

  void load_transposed(const T* x, std::int64_t lane_stride, std::int64_t count, std::int64_t n, A* lane) {
    if constexpr (std::is_same_v<T, A>) {
      transpose(x, lane_stride, lane, lanes_, count, n);
    } else {
      for_rows(count, n, lane_stride,
               [&](auto from, auto to, auto elements) { convert(x + from, scratch_.transposed + to, elements); });
      transpose(scratch_.transposed, n, lane, lanes_, count, n);
    }
  }

  // The mask's bytes of classes [c, c + n).
  Lines<std::uint8_t> load_mask(std::int64_t c, std::int64_t n) {
    if (!has_mask_) return {};
    const auto& mask = operands_.mask;
    const auto lane_stride = stride_[mask.index];
    if (one_part_ && lane_stride == 1 && mask.data != nullptr && !operands_.causal) {
      return {mask.at(part_[0].offsets) + c * mask.stride, mask.stride};
    }
    const std::array<std::int64_t, 3> place{own_masks_ ? position_ : 0, c, count_};
    if (std::exchange(mask_place_, place) == place) return {scratch_.mask, lanes_};
    for (int p = 0; p < parts_; ++p) {
      const auto& part = part_[p];
      const std::uint8_t* bytes = mask.at(part.offsets);
      for (std::int64_t w = 0; w < part.count; ++w) {
        std::uint8_t* lane = scratch_.mask + part.lane + w;
        const auto end = program_.end(row(part.lane + w)) - c;
        for (std::int64_t i = 0; i < n; ++i) {
          lane[i * lanes_] = i < end && (bytes == nullptr || bytes[(c + i) * mask.stride + w * lane_stride] != 0);
        }
      }
    }
    return {scratch_.mask, lanes_};
  }

  // Of the inputs, -inf where they are masked.
  Lines<A> load_inputs(std::int64_t c, std::int64_t n, const Lines<std::uint8_t>& mask) {
    const bool selects = has_mask_ && Program::kMinusInfinity;
    const bool copies = selects || (shape_.keeps && Program::kKeeps == Keeps::Inputs);
    A* tile = scratch_.inputs + (shape_.keeps ? c * lanes_ : 0);
    const auto lines = load(operands_.input, c, n, tile, /*in_place=*/!copies);
    const V masked(-std::numeric_limits<A>::infinity());
    for (std::int64_t i = 0; selects && i < n; ++i) {
      if (!own_masks_ && *mask.at(i, 0)) continue;
      for_lanes([&](std::int64_t w) {
        A* x = tile + i * lanes_ + w;
        select(mask.at(i, w), V::loadu(x), masked).store(x);
      });
    }
    return lines;
  }

  Lines<A> load_second(std::int64_t c, std::int64_t n) {
    const bool keeps = shape_.keeps && Program::kKeeps == Keeps::Inputs;
    return load(operands_.second, c, n, scratch_.second + (keeps ? c * lanes_ : 0), /*in_place=*/!keeps);
  }

  // What of an operand is read after classes [c, c + n), [n, lanes] as well.
  template <class Operand>
  Lines<T> next(const Operand& operand, std::int64_t c, std::int64_t n) const {
    const bool transposed = operand.stride == 1;
    if (c + n < operands_.classes) return {operand.at(part_[0].offsets) + (c + n) * operand.stride, operand.stride};
    const auto after = position_ + count_ < operands_.count ? operands_.row(position_ + count_) : row(0);
    return {operand.at(operands_.rows.offsets(after)), transposed ? lanes_ : operand.stride};
  }

  void visit(std::int64_t c, std::int64_t n) {
    Block block(*this, c, n);
    if constexpr (Program::kVisitsInput) {
      block.inputs_ = load_inputs(c, n, block.mask_);
      block.next_inputs_ = next(operands_.input, c, n);
    }
    if (Program::kHasSecond && operands_.second.data != nullptr) {
      block.second_ = seconds_ = load_second(c, n);
      block.next_second_ = next(operands_.second, c, n);
    }
    const bool keeps = shape_.keeps && Program::kKeeps == Keeps::Exponentials;
    if (keeps) block.kept_ = scratch_.inputs + c * lanes_;
    program_.visit(block, state_);
    if constexpr (Program::kKeeps == Keeps::Exponentials) {
      if (keeps && n < operands_.classes) std::copy_n(state_.max, width_, references(c));
    }
  }

  A* references(std::int64_t c) const { return scratch_.references + c / shape_.block * lanes_; }

  template <bool kept>
  void write(std::int64_t c, std::int64_t n) {
    constexpr bool keeps_inputs = Program::kKeeps == Keeps::Inputs;
    const bool single = n == operands_.classes;
    A* kept_inputs = scratch_.inputs + (shape_.keeps ? c * lanes_ : 0);
    WriteBlock<kept> block(*this, c, n);
    const bool has_inputs = kept || (keeps_inputs && Program::kVisitsInput && shape_.keeps);
    block.inputs_ = has_inputs ? Lines<A>{kept_inputs, lanes_} : load_inputs(c, n, block.mask_);
    if (Program::kHasSecond && operands_.second.data != nullptr) {
      block.second_ = keeps_inputs && shape_.keeps  ? Lines<A>{scratch_.second + c * lanes_, lanes_}
                      : single && program_.visits() ? seconds_
                                                    : load_second(c, n);
    }
    alignas(64) A scale[kPadded], chosen[kPadded];
    for (std::int64_t w = 0; w < width_; ++w) chosen[w] = static_cast<A>(chosen_[w] - c);
    block.chosen_ = chosen;
    if constexpr (requires { terms_.scale; }) {
      block.scale_ = terms_.scale;
      if (kept && !single) {
        const A* before = references(c);
        for_lanes([&](std::int64_t w) {
          const V shift = exp_of_negative(V::loadu(before + w) - V::loadu(state_.max + w));
          (V::loadu(terms_.scale + w) * shift).store(scale + w);
        });
        block.scale_ = scale;
      }
    }
    block.kept_rows_ = all_kept_ ? nullptr : kept_;
    block.out_ = scratch_.results;
    program_.write(block, state_, terms_);
    store_block(c, n, scratch_.results);
  }

  void write_zeros(std::int64_t c, std::int64_t n) {
    std::fill(scratch_.inputs, scratch_.inputs + n * lanes_, A(0));
    store_block(c, n, scratch_.inputs);
  }

  void store_block(std::int64_t c, std::int64_t n, const A* tile) {
    const auto& output = operands_.output;
    const auto lane_stride = stride_[output.index];
    for (int p = 0; p < parts_; ++p) {
      const auto& part = part_[p];
      T* out = output.at(part.offsets) + c * output.stride;
      const A* lane = tile + part.lane;
      if (lane_stride == 1 || part.count == 1) {
        for (std::int64_t i = 0; i < n; ++i) store_from(lane + i * lanes_, out + i * output.stride, part.count);
      } else if (output.stride == 1) {
        transpose(lane, lanes_, scratch_.transposed, n, n, part.count);
        for_rows(part.count, n, lane_stride, [&](auto to, auto from, auto elements) {
          store_from(scratch_.transposed + from, out + to, elements);
        });
      } else {
        for (std::int64_t i = 0; i < n; ++i) {
          for (std::int64_t w = 0; w < part.count; ++w) {
            out[i * output.stride + w * lane_stride] = static_cast<T>(lane[i * lanes_ + w]);
          }
        }
      }
    }
  }

  void store_from(const A* from, T* out, std::int64_t n) const {
    const auto value = [from](std::int64_t i, std::int64_t lanes) {
      return lanes == V::size() ? V::loadu(from + i) : V::loadu(from + i, lanes);
    };
    past_cache_ ? store_vectors<true, A>(out, n, value) : store_vectors<false, A>(out, n, value);
  }

  const Program& program_;
  const RowOperands<T>& operands_;
  const TileShape<Program> shape_;
  const TileScratch<T, A> scratch_;
  const std::int64_t lanes_;
  const bool own_masks_, has_mask_, past_cache_;
  std::array<std::int64_t, 4> stride_;                 // between lanes of a part
  std::int64_t inner_;                                 // rows that are one step apart
  std::int64_t position_ = 0, count_ = 0, width_ = 0;  // rows of this tile, and the same in whole vectors
  int parts_ = 0;
  Part part_[kLanes];
  bool one_part_ = false, any_kept_ = false, all_kept_ = false, any_chosen_ = false;
  Lines<A> seconds_;                                   // of the block that was visited last
  std::array<std::int64_t, 3> mask_place_{-1, -1, 0};  // what the mask in the scratch memory is of
  std::int64_t chosen_[kPadded];
  bool kept_[kPadded];
  alignas(64) State state_;
  alignas(64) Terms terms_;
};

}  // namespace
}  // namespace masked_loss::cpu::CPU_CAPABILITY
