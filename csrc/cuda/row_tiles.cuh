// Rows whose classes lie anywhere in memory, or are too few for packs: a block takes rows that are neighbours, by so
// many lanes each. A thread holds some classes of one row, or of as many rows as a pack has elements; what lanes add up
// to is put together in shared memory, where the rows are spread over all threads. Of rows with more classes the last
// ones are held, and others are read twice, the second time from a cache.
#pragma once

#include "cuda/row_packs.cuh"

namespace masked_loss::cuda {

template <class Program, int kWidth>
class RowTile {
 public:
  using T = typename Program::T;
  using A = typename Program::A;
  using State = typename Program::State;
  using Terms = typename Program::Terms;

  __device__ __forceinline__ RowTile(const Program& program, int lanes, bool classes_first)
      : program_(program), strides_(program.strides()), lanes_(lanes), threads_(blockDim.x / lanes) {
    const int thread = threadIdx.x;
    lane_ = classes_first ? thread % lanes : thread / threads_;
    row_ = (classes_first ? thread / lanes : thread % threads_) * kWidth;
    states_ = static_cast<State*>(dynamic_shared());
    terms_ = reinterpret_cast<Terms*>(states_ + lanes * rows());
  }

  // Of a block.
  __device__ __forceinline__ int rows() const { return threads_ * kWidth; }
  static std::size_t shared_bytes(const RowShape& shape) {
    return std::size_t(shape.threads) / shape.lanes * kWidth * (sizeof(State) * shape.lanes + sizeof(Terms));
  }

  // All threads of a block come here with the first of its rows.
  __device__ __forceinline__ void operator()(std::int64_t first) {
    const auto row = first + row_, count = program_.count();
    unsigned kept = 0;  // a bit a row
#pragma unroll
    for (int w = 0; w < kWidth; ++w) {
      if (row + w < count && program_.keeps(program_.known(row + w))) kept |= 1u << w;
    }
    RowLine<T> line{};
    std::int64_t end = 0;
    if (row < count) {
      line = program_.line(row);
      end = kept != 0 ? program_.kept_end(row) : 0;
    }
    const std::int64_t tile = std::int64_t(kUnits) * lanes_, last = (max(end, std::int64_t(1)) - 1) / tile;
    const bool visits = Program::kVisits && program_.visits();
    if (visits) {
      State states[kWidth];
      for (std::int64_t t = 0; t <= last; ++t) {
        load(line, end, t * tile);
#pragma unroll
        for (int w = 0; w < kWidth; ++w) program_.visit(states[w], held_.view(w));
        held_.hold();
      }
#pragma unroll
      for (int w = 0; w < kWidth; ++w) states_[lane_ * rows() + row_ + w] = states[w];
    }
    __syncthreads();
    conclude(first, visits);
    __syncthreads();
    if constexpr (Program::kWrites) {
      if (row >= count) return;
      for (std::int64_t t = last; t >= 0; --t) {
        if (t < last || !visits) load(line, end, t * tile);
        store(line, kept);
      }
      store_masked(line, (last + 1) * tile, kept);
    }
  }

 private:
  static constexpr int kUnits = tile_units(Program::kPacks, sizeof(T));
  static constexpr unsigned every = (1u << kWidth) - 1;
  using U = Unit<T, kWidth>;

  // How many classes there are up to `end` from the first one on that a thread has.
  __device__ __forceinline__ static int left(std::int64_t first, std::int64_t end) {
    return static_cast<int>(max(std::int64_t(0), min(end - first, std::int64_t(1) << 30)));
  }

  __device__ __forceinline__ void load(const RowLine<T>& line, std::int64_t end, std::int64_t first) {
    first += lane_;
    held_.first = static_cast<decltype(held_.first)>(first);
    held_.step = lanes_;
    const int count = left(first, end);
    const T *input = line.input + first * strides_.input, *second = line.second;
    if constexpr (Program::kSecond) second += second == nullptr ? 0 : first * strides_.second;
    const auto inside = [&](int u) { return u * lanes_ < count; };
    const auto load_needed = [&](const auto& needs) {
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        if constexpr (!Program::kMasks) held_.input[u] = U::all(Program::nothing());
        if (needs(u)) held_.input[u] = U::load(input + u * (lanes_ * strides_.input));
        if constexpr (Program::kSecond) {
          const bool needed = Program::kFillsSecond ? needs(u) : second != nullptr && inside(u);
          if (!Program::kFillsSecond) held_.second[u] = U::all(0);
          if (needed) held_.second[u] = U::load(second + u * (lanes_ * strides_.second));
        }
      }
    };
    if constexpr (!Program::kMasks) {
      load_needed(inside);
    } else {
      const bool waits = program_.waits();
      if (!waits) load_needed(inside);
      if (line.mask == nullptr) {
#pragma unroll
        for (int u = 0; u < kUnits; ++u) held_.set_kept(u, inside(u) ? every : 0);
      } else {
        const auto* mask = line.mask + first * strides_.mask;
        const bool shared = kWidth > 1 && program_.mask_of_rows() == 0;
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
          unsigned bits = 0;
          if (inside(u)) {
            const auto* of = mask + u * (lanes_ * strides_.mask);
            if constexpr (kWidth > 1) {
              bits = shared ? (*of != 0 ? every : 0) : load_mask_bits<kWidth>(of);
            } else {
              bits = *of != 0;
            }
          }
          held_.set_kept(u, bits);
        }
      }
      if (waits) load_needed([&](int u) { return held_.kept(u) != 0; });
    }
    held_.fill();
    held_.find_greatest();
  }

  // The rows of the block, each by as many lanes of a warp as there are for it.
  __device__ __forceinline__ void conclude(std::int64_t first, bool visits) {
    const int each = max(1, min(32, static_cast<int>(blockDim.x) / rows())), lanes_each = lanes_ / each;
    for (int i = threadIdx.x; i < rows() * each; i += blockDim.x) {
      const int row = i / each, part = i % each;
      const auto known = first + row < program_.count() ? program_.known(first + row) : typename Program::Known{};
      const bool kept = first + row < program_.count() && program_.keeps(known);
      typename Program::Row of{};
      if (kept && part == 0) of = program_.begin(first + row, known, true);
      State state;
      if (visits) {
        const State* states = states_ + row + part * lanes_each * rows();
        for (int l = 0; l < lanes_each; ++l) state = program_.merge(state, states[l * rows()]);
        state = program_.reduce(state, each);
      }
      if (kept && part == 0) terms_[row] = program_.conclude(of, state, true);
    }
  }

  // Rows in pairs where an instruction rounds two of them.
  __device__ __forceinline__ void store(const RowLine<T>& line, unsigned kept) {
    constexpr int together = U::together;
#pragma unroll
    for (int w = 0; w < kWidth; w += together) {
      Terms terms[together];
#pragma unroll
      for (int v = 0; v < together; ++v) terms[v] = terms_[row_ + w + v];
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        A values[together];
#pragma unroll
        for (int v = 0; v < together; ++v) {
          A x[1] = {held_.input[u].get(w + v)}, second[1];
          if constexpr (Program::kSecond) second[0] = held_.second[u].get(w + v);
          program_.write(x, second, held_.unit_class(u), terms[v]);
          x[0] = held_.kept(u) >> (w + v) & 1 ? x[0] : program_.masked();
          values[v] = kept >> (w + v) & 1 ? x[0] : A(0);
        }
        held_.input[u].set(w, values);
      }
    }
    T* output = line.output + std::int64_t(held_.first) * strides_.output;
    const int count = left(held_.first, program_.classes());
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      if (u * lanes_ < count) held_.input[u].store(output + u * (lanes_ * strides_.output));
    }
  }

  __device__ __forceinline__ void store_masked(const RowLine<T>& line, std::int64_t first, unsigned kept) const {
    auto masked = U::all(program_.masked());
    masked.choose(kept, A(0));
    for (auto c = first + lane_; c < program_.classes(); c += lanes_) {
      masked.store(line.output + c * strides_.output);
    }
  }

  const Program& program_;
  const RowStrides strides_;
  const int lanes_, threads_;  // threads side by side, of one lane
  int lane_, row_;             // the first row of a thread, among the block's
  State* states_;              // [lanes, rows]
  Terms* terms_;               // [rows]
  // Of more classes than an int counts one row is taken at a time.
  Held<Program, kUnits, kWidth, true, std::conditional_t<kWidth == 1, std::int64_t, int>> held_;
};

template <class Program, int kWidth>
__global__ void __launch_bounds__(kWidth == 1 ? Program::kResident : 512, 1)
    row_tiles(Program program, int lanes, bool classes_first) {
  RowTile<Program, kWidth> tile(program, lanes, classes_first);
  const std::int64_t rows = tile.rows();
  for (auto first = blockIdx.x * rows; first < program.count(); first += gridDim.x * rows) tile(first);
}

// Of the host.
template <class Program>
void launch_tiles(const Program& program, const RowRegime& regime, int multiprocessors, cudaStream_t stream) {
  const auto run = [&](auto width) {
    using Tile = RowTile<Program, width()>;
    const auto [lanes, threads] = regime.shape;
    const auto blocks = divide_up(program.count(), threads / lanes * width());
    launch(row_tiles<Program, width()>,
           {row_grid(blocks, multiprocessors, threads), unsigned(threads), Tile::shared_bytes(regime.shape)}, stream,
           program, lanes, regime.classes_first);
  };
  if constexpr (Program::kTiles) {
    if (regime.width > 1) return run(std::integral_constant<int, Pack<typename Program::T>::size>());
  }
  run(std::integral_constant<int, 1>());
}

}  // namespace masked_loss::cuda
