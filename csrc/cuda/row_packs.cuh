// Rows of contiguous classes, in packs in the registers of some lanes of a warp, of several rows then, or of a block.
// Of a row of more packs the last ones are held, and others are read twice, the second time from a cache. Few long rows
// are parted among blocks: one kernel visits the parts, another one puts together what they add up to, and writes.
#pragma once

#include "cuda/row_program.cuh"

namespace masked_loss::cuda {

// Elements side by side that a group of threads takes: 16-byte packs from where `aligned` is, and up to two times 7
// single elements before and after them.
template <class T>
struct RowPacks {
  int size, head, packs;

  RowPacks() = default;
  __device__ __forceinline__ RowPacks(const T* aligned, int of)
      : size(of), head(min(of, elements_to_alignment(aligned))), packs((of - head) / Pack<T>::size) {}

  // The single element that a thread takes, or -1.
  __device__ __forceinline__ int single(int lane) const {
    const int tail = head + packs * Pack<T>::size;
    if (lane < head) return lane;
    return lane >= 16 && lane - 16 < size - tail ? tail + lane - 16 : -1;
  }
  __device__ __forceinline__ int element(int pack) const { return head + pack * Pack<T>::size; }
};

enum class RowPhase { Whole, Visit, Conclude };

template <class State>
struct RowSplit {
  RowPhase phase;
  int lanes;      // a row, or a part of it
  int slices;     // blocks a row
  int parts;      // of a row, which have been visited
  State* states;  // [positions, parts]
};

template <class Program>
class PackGroup {
 public:
  using T = typename Program::T;
  using A = typename Program::A;
  using U = Unit<T, Pack<T>::size>;
  using State = typename Program::State;
  using Known = typename Program::Known;

  __device__ __forceinline__ PackGroup(const Program& program, const RowSplit<State>& split)
      : program_(program), split_(split), lane_(threadIdx.x & (split.lanes - 1)) {}

  // All threads of a warp come here, or of a block where rows have one, with the row of their group, if any.
  __device__ __forceinline__ void operator()(std::int64_t position, std::int64_t row, const Known& known, bool there,
                                             int slice) {
    const bool kept = there && program_.keeps(known);
    const Span span(program_, there, row, slice, split_.slices);
    if (!kept && Program::kWrites && split_.phase != RowPhase::Visit) store_masked(span, 0, A(0), lane_);
    typename Program::Row of{};
    const auto local = program_.chosen(known) - span.first;
    const bool gives = kept && lane_ == 0 && local >= 0 && local < span.size;
    const int single = kept ? span.single(lane_) : -1;
    if (kept && split_.phase != RowPhase::Visit) of = program_.begin(row, known, gives);
    State state;
    const int last = span.last_tile(lanes_of_tile());
    if constexpr (Program::kVisits) {
      if (split_.phase == RowPhase::Conclude) {
        for (int p = lane_; kept && p < split_.parts; p += split_.lanes) {
          state = program_.merge(state, split_.states[position * split_.parts + p]);
        }
      } else if (kept && program_.visits()) {
        for (int t = 0; t <= last; ++t) {
          load(span, t);
          program_.visit(state, held_.view(0));
          held_.hold();
        }
        if (single >= 0) {
          auto alone = load_single(span, single);
          program_.visit(state, alone.view(0));
        }
      }
      if (program_.visits()) state = reduce(state);
      if (split_.phase == RowPhase::Visit) {
        if (kept && lane_ == 0) split_.states[position * split_.parts + slice] = state;
        return;
      }
    }
    if (!kept) return;
    const auto terms = program_.conclude(of, state, gives);
    if constexpr (Program::kWrites) {
      const bool held = Program::kVisits && program_.visits() && split_.phase == RowPhase::Whole;
      for (int t = last; t >= 0; --t) {
        if (t < last || !held) load(span, t);
        store(span, t, terms);
      }
      store_masked(span, last + 1, program_.masked(), -1);
      if (single >= 0) store_single(span, single, terms);
    }
  }

 private:
  static constexpr int kPacks = Program::kPacks, n = Pack<T>::size;

  // The part of a row that this group takes.
  struct Span : RowPacks<T> {
    RowLine<T> line;
    int first, end;  // its first class; nothing is kept from `end` on, which counts from there
    bool aligned, second_aligned, mask_aligned;  // where packs are

    __device__ __forceinline__ Span(const Program& program, bool there, std::int64_t row, int slice, int slices) {
      const auto classes = static_cast<int>(program.classes());
      const int width = (classes + slices * n - 1) / (slices * n) * n;
      first = min(slice * width, classes);
      int size = min(width, classes - first);
      if (there) {
        line = program.line(row);
        end = static_cast<int>(min(std::int64_t(size), program.kept_end(row) - first));
        if (Program::kMasks && line.mask != nullptr && program.strides().mask == 0) {
          if (*line.mask == 0) end = 0;
          line.mask = nullptr;
        } else if (Program::kMasks && line.mask != nullptr) {
          line.mask += first;
        }
        end = max(end, 0);
        line.input += first;
        if (Program::kSecond && line.second != nullptr) line.second += first;
        if (Program::kWrites) line.output += first;
      } else {
        line = {};
        size = end = 0;
      }
      static_cast<RowPacks<T>&>(*this) = {Program::kWrites ? line.output : line.input, size};
      aligned = is_aligned(line.input + this->head);
      second_aligned = Program::kSecond && is_aligned(line.second + this->head);
      mask_aligned = Program::kMasks && (reinterpret_cast<std::uintptr_t>(line.mask) + this->head) % n == 0;
    }

    // The last one with something kept, or the first.
    __device__ __forceinline__ int last_tile(int packs_of_tile) const {
      const int kept = Program::kMasks ? min(this->packs, (end - this->head + n - 1) / n) : this->packs;
      return (max(1, kept) - 1) / packs_of_tile;
    }
  };

  __device__ __forceinline__ int lanes_of_tile() const { return kPacks * split_.lanes; }
  __device__ __forceinline__ int first_pack(int t) const { return t * lanes_of_tile() + lane_; }

  // `fills`: what is not needed gets a value here, and not where masked elements do.
  template <bool fills, int kUnits, class Needs>
  __device__ __forceinline__ void load_units(U (&units)[kUnits], const T* from, int step, bool aligned, A nothing,
                                             const Needs& needs) {
    const auto load = [&](const auto& load_one) {
#pragma unroll
      for (int k = 0; k < kUnits; ++k) {
        if constexpr (fills) units[k] = U::all(nothing);
        if (needs(k)) units[k] = load_one(from + k * step);
      }
    };
    if (aligned) {
      load([](const T* address) { return U::load(address); });
    } else {
      load([](const T* address) { return U::load_apart(address); });
    }
  }

  __device__ __forceinline__ void load(const Span& span, int t) {
    const int first = first_pack(t), element = span.element(first), step = split_.lanes * n;
    held_.first = span.first + element;
    held_.step = step;
    const int end = Program::kMasks ? min(span.end, span.element(span.packs)) : 0;
    const auto inside = [&](int k) {
      if constexpr (Program::kMasks && Program::kFillsSecond) return element + k * step < end;
      return first + k * split_.lanes < span.packs;
    };
    const auto load_needed = [&](const auto& needs) {
      load_units<!Program::kMasks>(held_.input, span.line.input + element, step, span.aligned, Program::nothing(),
                                   needs);
      if constexpr (Program::kSecond) {
        if (!Program::kFillsSecond && span.line.second == nullptr) return;
        const auto needs_second = [&](int k) { return Program::kFillsSecond ? needs(k) : inside(k); };
        load_units<!Program::kFillsSecond>(held_.second, span.line.second + element, step, span.second_aligned, A(0),
                                           needs_second);
      }
    };
    if constexpr (!Program::kMasks) {
      load_needed(inside);
    } else {
      const bool waits = program_.waits();
      if (!waits) load_needed(inside);
      const auto* mask = span.line.mask;
      const auto range = [&](int k) { return (1u << max(0, min(n, end - element - k * step))) - 1; };
      if (mask == nullptr) {
#pragma unroll
        for (int k = 0; k < kPacks; ++k) held_.set_kept(k, range(k));
      } else if (span.mask_aligned) {
        constexpr int together = kPacks % 4 == 0 ? 4 : kPacks;
#pragma unroll
        for (int first_word = 0; first_word < kPacks; first_word += together) {
          MaskWord<n> words[together];
#pragma unroll
          for (int w = 0; w < together; ++w) {
            const int k = first_word + w;
            words[w] = {};
            if (range(k) != 0) words[w] = *reinterpret_cast<const MaskWord<n>*>(mask + element + k * step);
          }
#pragma unroll
          for (int w = 0; w < together; ++w) {
            held_.set_kept(first_word + w, mask_bits(words[w]) & range(first_word + w));
          }
        }
      } else {
        unsigned long long all = 0;
#pragma unroll 1  // rare: what is short here is in few registers
        for (int k = 0; k < kPacks; ++k) {
          unsigned bits = 0;
#pragma unroll
          for (int j = 0; j < n; ++j) {
            if (range(k) >> j & 1) bits |= unsigned(mask[element + k * step + j] != 0) << j;
          }
          all |= static_cast<unsigned long long>(bits) << (k * n);
        }
        held_.set_all_kept(all);
      }
      if (waits) load_needed([&](int k) { return held_.kept(k) != 0; });
    }
    held_.fill();
    held_.find_greatest();
  }

  template <class Terms>
  __device__ __forceinline__ void store(const Span& span, int t, const Terms& terms) const {
    const int first = first_pack(t);
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int p = first + k * split_.lanes;
      if (p >= span.packs) continue;
      A x[n], second[n];
#pragma unroll
      for (int j = 0; j < n; ++j) {
        x[j] = held_.input[k].get(j);
        if constexpr (Program::kSecond) second[j] = held_.second[k].get(j);
      }
      program_.write(x, second, held_.unit_class(k), terms);
      U unit;
#pragma unroll
      for (int j = 0; j < n; j += U::together) {
        A rounded[U::together];
#pragma unroll
        for (int i = 0; i < U::together; ++i) rounded[i] = x[j + i];
        unit.set(j, rounded);
      }
      if constexpr (Program::kMasks) {
        if (const unsigned bits = held_.kept(k); bits != held_.every) unit.choose(bits, program_.masked());
      }
      unit.store(span.line.output + span.element(p));
    }
  }

  // From a tile on, and the single element of a lane, if any.
  __device__ __forceinline__ void store_masked(const Span& span, int first_tile, A value, int lane) const {
    const auto masked = U::all(value);
    for (int p = first_pack(first_tile); p < span.packs; p += split_.lanes) {
      masked.store(span.line.output + span.element(p));
    }
    if (lane < 0) return;
    if (const int i = span.single(lane); i >= 0) span.line.output[i] = narrow<T>(value);
  }

  // Of one element, which is read again where it is written: few rows have any.
  using Alone = Held<Program, 1, 1, false, int>;
  __device__ __forceinline__ Alone load_single(const Span& span, int i) const {
    Alone alone;
    alone.first = span.first + i;
    alone.step = 0;
    const bool keeps = !Program::kMasks || (i < span.end && (span.line.mask == nullptr || span.line.mask[i] != 0));
    alone.set_kept(0, keeps);
    alone.input[0] = alone.input[0].all(0);
    if (keeps) alone.input[0] = alone.input[0].load(span.line.input + i);
    if constexpr (Program::kSecond) {
      alone.second[0] = alone.second[0].all(0);
      if (Program::kFillsSecond ? keeps : span.line.second != nullptr) {
        alone.second[0] = alone.second[0].load(span.line.second + i);
      }
    }
    alone.fill();
    alone.find_greatest();
    return alone;
  }

  template <class Terms>
  __device__ __forceinline__ void store_single(const Span& span, int i, const Terms& terms) const {
    const auto alone = load_single(span, i);
    A x[1] = {alone.input[0].get(0)}, second[1];
    if constexpr (Program::kSecond) second[0] = alone.second[0].get(0);
    program_.write(x, second, alone.first, terms);
    span.line.output[i] = narrow<T>(alone.kept(0) ? x[0] : program_.masked());
  }

  // Over the lanes of the group, all of which get it.
  __device__ __forceinline__ State reduce(State state) {
    if (split_.lanes <= 32) return program_.reduce(state, split_.lanes);
    auto& all = shared<State[2][kRowThreads / 32], struct PackStates>();
    auto& states = all[parity_];
    parity_ = 1 - parity_;  // others may still read those of the row before
    state = program_.reduce(state, 32);
    if (threadIdx.x % 32 == 0) states[threadIdx.x / 32] = state;
    __syncthreads();
    const int warps = split_.lanes / 32;
    return program_.reduce(states[threadIdx.x & (warps - 1)], warps);
  }

  const Program& program_;
  const RowSplit<State>& split_;
  const int lane_;
  int parity_ = 0;
  Held<Program, kPacks, n, false, int> held_;
};

// The row of a position two steps ahead, and what is known of the row of one a step ahead, are under way while a row is
// visited.
template <class Program>
__global__ void __launch_bounds__(Program::kResident, 1)
    row_packs(Program program, RowSplit<typename Program::State> split) {
  PackGroup<Program> group(program, split);
  const int rows = blockDim.x / split.lanes, slice = blockIdx.x % split.slices;
  const std::int64_t step = std::int64_t(gridDim.x / split.slices) * rows, end = program.end();
  auto first = std::int64_t(blockIdx.x / split.slices) * rows;
  auto position = first + threadIdx.x / split.lanes;
  const auto row_of = [&](std::int64_t at) { return at < end ? program.row(at) : std::int64_t(-1); };
  const auto known_of = [&](std::int64_t row) { return row < 0 ? typename Program::Known{} : program.known(row); };
  auto row = row_of(position), next = row_of(position + step);
  auto known = known_of(row);
  for (; first < end; first += step, position += step) {
    const auto known_next = known_of(next);
    const auto after = row_of(position + 2 * step);
    group(position, row, known, row >= 0, slice);
    row = next;
    known = known_next;
    next = after;
  }
}

// Blocks that take one row after the other, each by so many `slices`.
inline unsigned row_grid(std::int64_t blocks_needed, int multiprocessors, int threads, int slices = 1) {
  // Some waves of blocks: rows cost alike, but blocks of other work may be in the way of some.
  const std::int64_t most = std::max<std::int64_t>(slices, std::int64_t(multiprocessors) * 8 * 1024 / threads);
  return static_cast<unsigned>(std::max<std::int64_t>(1, std::min(blocks_needed, most / slices * slices)));
}

// Of the host. `states` has room for what all parts of all rows add up to, where rows have parts.
template <class Program>
void launch_packs(const Program& program, const RowRegime& regime, typename Program::State* states, int multiprocessors,
                  cudaStream_t stream) {
  const auto [lanes, threads] = regime.shape;
  const auto run = [&](RowPhase phase, int slices) {
    const auto blocks = divide_up(program.count(), threads / lanes) * slices;
    launch(row_packs<Program>, {row_grid(blocks, multiprocessors, threads, slices), unsigned(threads)}, stream, program,
           RowSplit<typename Program::State>{phase, lanes, slices, regime.slices, states});
  };
  if (regime.slices == 1) return run(RowPhase::Whole, 1);
  if (!Program::kVisits || !program.visits()) return run(RowPhase::Whole, regime.slices);
  run(RowPhase::Visit, regime.slices);
  run(RowPhase::Conclude, Program::kWrites ? regime.slices : 1);
}

}  // namespace masked_loss::cuda
