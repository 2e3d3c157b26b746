#include "cuda/reductions_kernel.h"

#include <algorithm>

#include "cuda/elements.cuh"

namespace masked_loss::cuda {
namespace {

constexpr int kThreads = 256;
constexpr std::int64_t kBlocks = 1 << 11;  // as many as fill a device, into which few rows are split

template <class A>
using Part = MomentsOf<Sum<A>>;

template <int order>
struct MergeParts {
  template <class A>
  __device__ __forceinline__ Part<A> operator()(const Part<A>& a, const Part<A>& b) const {
    return merge<order>(a, b);
  }
};
template <int order>
struct MergeWarp {
  template <class A>
  __device__ __forceinline__ Part<A> operator()(const Part<A>& value) const {
    return reduce_lanes(value, 32, MergeParts<order>{});
  }
};

// A few numbers around a center that lies near them, so that the sums keep the digits of their deviations.
template <int order, class A>
struct Few {
  A center = 0, sum = 0, squares = 0;
  int count = 0;

  __device__ __forceinline__ void add(A x, bool counts) {
    const A d = counts ? x - center : A(0);  // chosen, not multiplied: what is not kept may be anything
    sum += d;
    if constexpr (order == 2) squares += d * d;
    count += counts;
  }
  __device__ __forceinline__ A mean() const { return count == 0 ? A(0) : sum / A(count); }
  __device__ __forceinline__ Part<A> part() const {
    if (count == 0) return {};
    if constexpr (order == 1) return {count, {sum, 0}, {}};
    const A off = mean(), second = squares - sum * off;
    return {count, Sum<A>{center, 0} + off, {second < 0 ? A(0) : second, 0}};  // not max, which loses NaN
  }
};

template <class A>
struct Destination {
  Part<A>* parts;  // of part p and row r at p * rows + r; or null: the results themselves
  MomentsResult<A> result;
  std::int64_t rows;

  __device__ __forceinline__ void give(std::int64_t part, std::int64_t row, const Part<A>& value) const {
    if (parts != nullptr) {
      parts[part * rows + row] = value;
      return;
    }
    const A first = value.first.rounded();
    const bool is_mean = result.count != nullptr && result.second == nullptr && value.count > 0;
    result.first[row] = is_mean ? first / A(value.count) : first;
    if (result.second != nullptr) result.second[row] = value.second.rounded();
    if (result.count != nullptr) result.count[row] = value.count;
  }
};

// A bit for each of the elements among `valid` that the mask keeps.
template <int n>
__device__ __forceinline__ unsigned kept_among(unsigned valid, const unsigned char* mask, std::int64_t stride) {
  constexpr unsigned all = (1u << n) - 1;
  if (mask == nullptr || valid == 0) return valid;
  if (stride == 0) return *mask != 0 ? valid : 0;
  if (stride == 1 && valid == all) return load_mask_bits<n>(mask);
  unsigned kept = 0;
#pragma unroll
  for (int j = 0; j < n; ++j) {
    if (valid >> j & 1) kept |= unsigned(mask[j * stride] != 0) << j;
  }
  return kept;
}

// The elements among `valid`, by one load where they are a pack. Loads do not wait for a mask.
template <class T, int n>
__device__ __forceinline__ Group<T, n> load_valid(unsigned valid, const T* from, std::int64_t stride, bool is_pack) {
  if (is_pack) return load_line<false, T, n>(from);
  T values[n];
#pragma unroll
  for (int j = 0; j < n; ++j) values[j] = valid >> j & 1 ? from[j * stride] : T{};
  return Group<T, n>(values);
}

// Packs that a thread has under way, with their masks. Of several lines registers hold fewer.
template <bool one_line>
constexpr int kPacks = one_line ? 4 : 2;

// Blocks of a multiprocessor: what the compiler chooses by itself may spill.
template <class T>
constexpr int kResident = sizeof(T) == 8 ? 2 : 3;

// Rows whose elements are reduced one after the other: packs of `lines`, the last of the reduced dimensions.
struct Lines {
  std::int64_t length, packs;  // of a line; packs begin at multiples of 16 bytes
  std::int64_t items;          // packs of a row
  Quotient by_packs;
  int lanes;  // threads a row
  std::int64_t parts, part_items;
};

// Of rows that are one line there is nothing to look for.
template <int order, bool one_line, class T>
__device__ __forceinline__ Part<Accumulation<T>> reduce_line(const MomentsWork<T>& work, const Lines& lines,
                                                             std::int64_t row, std::int64_t begin, std::int64_t end,
                                                             int lane) {
  using A = Accumulation<T>;
  constexpr int n = Pack<T>::size, packs = kPacks<one_line>;
  constexpr unsigned all = (1u << n) - 1;
  const int last = work.reduced.dims - 1;
  const auto stride = last < 0 ? 1 : work.reduced.strides[0][last];
  const auto mask_stride = last < 0 ? 1 : work.reduced.strides[1][last];
  const auto base = work.kept.offsets(row);
  const auto* mask = work.mask == nullptr ? nullptr : work.mask + base[1];
  const T* input = work.input + base[0];
  const auto shift_of = [&](const T* line) { return stride == 1 ? (n - elements_to_alignment(line)) % n : 0; };
  const int row_shift = shift_of(input);
  Part<A> total;
#pragma unroll 1
  for (auto first = begin + lane; first < end; first += lines.lanes * packs) {
    const T* from[packs];
    unsigned valid[packs], kept[packs];
    Group<T, n> groups[packs];
#pragma unroll
    for (int k = 0; k < packs; ++k) {
      const auto item = first + k * lines.lanes;
      valid[k] = kept[k] = 0;
      if (item >= end) continue;
      auto i = item * n - row_shift;
      const auto* mask_from = mask;
      if constexpr (!one_line) {
        const auto line = lines.by_packs(item);
        const auto offsets = work.reduced.offsets(line, last);
        if (mask != nullptr) mask_from += offsets[1];
        from[k] = input + offsets[0];
        i = (item - line * lines.packs) * n - shift_of(from[k]);
        from[k] += i * stride;
      }
      valid[k] = all;
      if (i < 0) valid[k] &= all << -i;
      if (i + n > lines.length) valid[k] &= i < lines.length ? all >> (i + n - lines.length) : 0;
      kept[k] = kept_among<n>(valid[k], mask == nullptr ? nullptr : mask_from + i * mask_stride, mask_stride);
    }
#pragma unroll
    for (int k = 0; k < packs; ++k) {
      // A mask that is repeated has come from a cache, and says the same of many packs.
      if (valid[k] == 0 || (mask_stride == 0 && kept[k] == 0)) continue;
      if constexpr (one_line) from[k] = input + ((first + k * lines.lanes) * n - row_shift) * stride;
      groups[k] = load_valid<T, n>(valid[k], from[k], stride, stride == 1 && valid[k] == all);
    }
    Few<order, A> few;
    if constexpr (order == 2) {
      few.center = total.first.rounded();
      if (total.count == 0) {
        Few<1, A> first_ones;
#pragma unroll
        for (int k = 0; k < packs; ++k) {
          T values[n];
          groups[k].get(values);
#pragma unroll
          for (int j = 0; j < n; ++j) first_ones.add(widen(values[j]), kept[k] >> j & 1);
        }
        few.center = first_ones.mean();
      }
    }
#pragma unroll
    for (int k = 0; k < packs; ++k) {
      if (kept[k] == 0) continue;
      T values[n];
      groups[k].get(values);
#pragma unroll
      for (int j = 0; j < n; ++j) few.add(widen(values[j]), kept[k] >> j & 1);
    }
    total = merge<order>(total, few.part());
  }
  return total;
}

template <int order, class T, bool one_line>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    moments_of_lines(MomentsWork<T> work, Lines lines, Destination<Accumulation<T>> to) {
  const int lane = threadIdx.x % lines.lanes, group = threadIdx.x / lines.lanes;
  const auto row = std::int64_t(blockIdx.x) * (kThreads / lines.lanes) + group;
  const auto begin = blockIdx.y * lines.part_items, end = min(begin + lines.part_items, lines.items);
  Part<Accumulation<T>> total;
  if (row < work.kept.count) total = reduce_line<order, one_line>(work, lines, row, begin, end, lane);
  total = lines.lanes == kThreads ? reduce_block(total, MergeWarp<order>{})
                                  : reduce_lanes(total, lines.lanes, MergeParts<order>{});
  if (lane == 0 && row < work.kept.count) to.give(blockIdx.y, row, total);
}

// Columns that a thread reduces at once, and how many of their elements it has under way.
template <class T>
constexpr int kColumns = sizeof(T) == 8 ? 2 : 4;
template <class T, int order>
constexpr int kRows = sizeof(T) == 2 && order == 1   ? 8
                      : sizeof(T) == 8 && order == 2 ? 2
                                                     : 4;
constexpr int kTiles = 8;  // of so many rows, that are added up as they are

// Contiguous rows, as runs of columns: neighbouring threads reduce neighbouring columns.
struct Columns {
  std::int64_t length, tiles;  // of a run
  std::int64_t items;          // tiles in all
  Quotient by_tiles;
  int across, groups;  // threads over a tile, and elements of a column at once
  bool wide;           // a thread's columns are contiguous, where one load reads them; else `across` apart
  std::int64_t parts, part_elements;
};

template <int order, class T>
__global__ void __launch_bounds__(kThreads)
    moments_of_columns(MomentsWork<T> work, Columns columns, Destination<Accumulation<T>> to) {
  using A = Accumulation<T>;
  constexpr int n = kColumns<T>, rows = kRows<T, order>;
  const int x = threadIdx.x % columns.across, group = threadIdx.x / columns.across % columns.groups;
  const int threads = columns.across * columns.groups;
  const auto item = std::int64_t(blockIdx.x) * (kThreads / threads) + threadIdx.x / threads;
  const auto run = columns.by_tiles(item), tile = item - run * columns.tiles;
  const int step = columns.wide ? 1 : columns.across;
  const auto column = tile * columns.across * n + (columns.wide ? x * n : x);
  unsigned valid = 0;
#pragma unroll
  for (int j = 0; j < n; ++j) {
    valid |= unsigned(item < columns.items && column + j * step < columns.length) << j;
  }
  const bool wide = columns.wide && valid == (1u << n) - 1;
  const int last = work.kept.dims - 1;
  const auto base = work.kept.offsets(valid == 0 ? 0 : run, last);
  const auto mask_step = work.kept.strides[1][last] * step;
  const T* from = work.input + base[0] + column;
  const auto* mask = work.mask == nullptr ? nullptr : work.mask + base[1] + column * work.kept.strides[1][last];
  const auto begin = blockIdx.y * columns.part_elements,
             end = valid == 0 ? 0 : min(begin + columns.part_elements, work.reduced.count);
  Part<A> totals[n];
#pragma unroll 1
  for (auto first = begin + group; first < end;) {
    Few<order, A> few[n];
    if constexpr (order == 2) {
#pragma unroll
      for (int j = 0; j < n; ++j) few[j].center = totals[j].first.rounded();
    }
#pragma unroll 1
    for (int t = 0; t < kTiles && first < end; ++t, first += columns.groups * rows) {
      std::int64_t offsets[rows];
      unsigned kept[rows], wanted = 0;
      Group<T, n> groups[rows];
#pragma unroll
      for (int k = 0; k < rows; ++k) {
        const auto element = first + k * columns.groups;
        kept[k] = 0;
        if (element >= end) continue;
        const auto at = work.reduced.offsets(element);
        offsets[k] = at[0];
        kept[k] = kept_among<n>(valid, mask == nullptr ? nullptr : mask + at[1], mask_step);
        wanted |= unsigned(mask_step != 0 || kept[k] != 0) << k;
      }
#pragma unroll
      for (int k = 0; k < rows; ++k) {
        if (wanted >> k & 1) groups[k] = load_valid<T, n>(valid, from + offsets[k], step, wide);
      }
      if constexpr (order == 2) {
#pragma unroll
        for (int j = 0; j < n; ++j) {
          if (totals[j].count + few[j].count > 0) continue;
          Few<1, A> first_ones;
#pragma unroll
          for (int k = 0; k < rows; ++k) {
            T values[n];
            groups[k].get(values);
            first_ones.add(widen(values[j]), kept[k] >> j & 1);
          }
          few[j].center = first_ones.mean();
        }
      }
#pragma unroll
      for (int k = 0; k < rows; ++k) {
        if (kept[k] == 0) continue;
        T values[n];
        groups[k].get(values);
#pragma unroll
        for (int j = 0; j < n; ++j) few[j].add(widen(values[j]), kept[k] >> j & 1);
      }
    }
#pragma unroll
    for (int j = 0; j < n; ++j) totals[j] = merge<order>(totals[j], few[j].part());
  }
  auto& others = shared<Part<A>[kThreads / 2][n], Few<order, T>>();
  const auto place = [&](int of) {
    return (int(threadIdx.x) / threads * (columns.groups / 2) + of) * columns.across + x;
  };
  for (int half = columns.groups / 2; half > 0; half /= 2) {
    if (group >= half && group < 2 * half) {
#pragma unroll
      for (int j = 0; j < n; ++j) others[place(group - half)][j] = totals[j];
    }
    __syncthreads();
    if (group < half) {
#pragma unroll
      for (int j = 0; j < n; ++j) totals[j] = merge<order>(totals[j], others[place(group)][j]);
    }
    __syncthreads();  // before the next ones are written
  }
  if (group != 0) return;
#pragma unroll
  for (int j = 0; j < n; ++j) {
    if (valid >> j & 1) to.give(blockIdx.y, run * columns.length + column + j * step, totals[j]);
  }
}

// Of each row, by so many threads.
template <int order, class A>
__global__ void __launch_bounds__(kThreads) merge_parts(const Part<A>* parts, int count, int lanes, Destination<A> to) {
  const int lane = threadIdx.x % lanes, group = threadIdx.x / lanes;
  const auto row = std::int64_t(blockIdx.x) * (kThreads / lanes) + group;
  Part<A> total;
  for (int p = lane; p < count && row < to.rows; p += lanes) {
    total = merge<order>(total, parts[p * to.rows + row]);
  }
  total = lanes == kThreads ? reduce_block(total, MergeWarp<order>{}) : reduce_lanes(total, lanes, MergeParts<order>{});
  if (lane == 0 && row < to.rows) to.give(0, row, total);
}

template <class R>
struct AffineElements {
  std::int64_t count;
  Strided scale, input, mean, offset, mask;
  R* result;
};

template <class T, class R>
__global__ void __launch_bounds__(kThreads) affine_elements(AffineElements<R> work) {
  using A = Accumulation<T>;
  constexpr int n = Pack<T>::size, packs = 2;
  const auto begin = std::int64_t(blockIdx.x) * (packs * kThreads * n);
  const auto first_of = [&](int k) { return begin + (threadIdx.x + k * kThreads) * n; };
  const auto count_of = [&](int k) {
    return static_cast<int>(max(std::int64_t(0), min(std::int64_t(n), work.count - first_of(k))));
  };
  Kept<n> kept[packs];
  Group<T, n> inputs[packs];
  if (work.input.contiguous && work.mask.contiguous && begin + packs * kThreads * n <= work.count) {
#pragma unroll
    for (int k = 0; k < packs; ++k) {
      kept[k] = load_contiguous_kept<n>(work.mask, first_of(k));
      if (work.input.data != nullptr) inputs[k] = load_contiguous<T, n>(work.input, first_of(k));
    }
  } else {
#pragma unroll
    for (int k = 0; k < packs; ++k) kept[k] = load_kept<n>(work.mask, first_of(k), count_of(k));
#pragma unroll
    for (int k = 0; k < packs; ++k) {
      if (work.input.data == nullptr || (work.mask.repeats && !kept[k].any())) continue;
      inputs[k] = load_elements<T, n>(work.input, first_of(k), count_of(k));
    }
  }
#pragma unroll
  for (int k = 0; k < packs; ++k) {
    const auto first = first_of(k);
    const int count = count_of(k);
    if (count == 0) continue;
    A values[n] = {};
    if (kept[k].any()) {
      load_elements<A, n, true>(work.scale, first, count).get(values);
      if (work.input.data != nullptr) {
        T input[n];
        A mean[n];
        inputs[k].get(input);
        load_elements<A, n, true>(work.mean, first, count).get(mean);
#pragma unroll
        for (int j = 0; j < n; ++j) values[j] *= widen(input[j]) - mean[j];
      }
      if (work.offset.data != nullptr) {
        A offset[n];
        load_elements<A, n, true>(work.offset, first, count).get(offset);
#pragma unroll
        for (int j = 0; j < n; ++j) values[j] += offset[j];
      }
#pragma unroll
      for (int j = 0; j < n; ++j) values[j] = kept[k][j] ? values[j] : A(0);
    }
    store_elements(work.result + first, count, values);
  }
}

// Whether the elements at every place that these rows name begin at multiples of `n` of them.
template <class T>
bool are_aligned(const MomentsWork<T>& work, int n, int kept_dims, int reduced_dims) {
  bool aligned = reinterpret_cast<std::uintptr_t>(work.input) % (n * sizeof(T)) == 0;
  for (int d = 0; d < kept_dims; ++d) aligned &= work.kept.strides[0][d] % n == 0;
  for (int d = 0; d < reduced_dims; ++d) aligned &= work.reduced.strides[0][d] % n == 0;
  return aligned;
}

template <class T>
Lines lines_of(const MomentsWork<T>& work) {
  constexpr int n = Pack<T>::size;
  constexpr std::int64_t packs = kPacks<true>, tile = kThreads * packs, few_rows = 1 << 10;
  const auto rows = work.kept.count;
  const int last = work.reduced.dims - 1;
  Lines lines{last < 0 ? 1 : work.reduced.sizes[last], 0, 0, {}, 1, 1, 0};
  if (work.reduced.count == 0) return lines;
  const bool shifted = last >= 0 && work.reduced.strides[0][last] == 1 && !are_aligned(work, n, work.kept.dims, last);
  lines.packs = divide_up(lines.length + (shifted ? n - 1 : 0), n);
  lines.items = work.reduced.count / lines.length * lines.packs;
  lines.by_packs = Quotient(lines.packs);
  while (lines.lanes < 32 && lines.lanes * packs < lines.items) lines.lanes *= 2;
  if (lines.items > (rows < few_rows ? 32 * packs : tile)) {
    lines.lanes = kThreads;
    lines.parts = std::clamp<std::int64_t>(kBlocks / rows, 1, divide_up(lines.items, tile));
  }
  lines.part_items = divide_up(divide_up(lines.items, lines.parts), tile) * tile;
  lines.parts = divide_up(lines.items, lines.part_items);
  return lines;
}

template <class T>
bool by_columns(const MomentsWork<T>& work) {
  const auto &kept = work.kept, &reduced = work.reduced;
  return kept.dims > 0 && reduced.dims > 0 && reduced.count > 0 && reduced.strides[0][reduced.dims - 1] != 1 &&
         kept.strides[0][kept.dims - 1] == 1;
}

template <class T>
Columns columns_of(const MomentsWork<T>& work) {
  constexpr int n = kColumns<T>, rows = kRows<T, 1>;
  const auto elements = work.reduced.count;
  Columns columns{work.kept.sizes[work.kept.dims - 1], 0, 0, {}, 1, 1, false, 1, 0};
  while (columns.across < 32 && columns.across * n < columns.length) columns.across *= 2;
  while (columns.across * columns.groups < kThreads && columns.groups * rows < elements) columns.groups *= 2;
  columns.tiles = divide_up(columns.length, columns.across * n);
  columns.by_tiles = Quotient(columns.tiles);
  columns.items = work.kept.count / columns.length * columns.tiles;
  columns.wide = are_aligned(work, n, work.kept.dims - 1, work.reduced.dims);
  // A part is worth more elements than it takes to write it.
  const std::int64_t tile = columns.groups * rows;
  const auto blocks = divide_up(columns.items, kThreads / (columns.across * columns.groups));
  columns.parts = std::clamp<std::int64_t>(kBlocks / blocks, 1, divide_up(elements, 4 * tile));
  columns.part_elements = divide_up(divide_up(elements, columns.parts), tile) * tile;
  columns.parts = divide_up(elements, columns.part_elements);
  return columns;
}

template <int order, class T, class A>
void find(const MomentsWork<T>& work, void* memory, const MomentsResult<A>& result, cudaStream_t stream) {
  const auto rows = work.kept.count;
  if (rows == 0) return;
  const Destination<A> results{nullptr, result, rows};
  auto to = results;
  const auto split = [&](std::int64_t parts) {
    if (parts > 1) to.parts = static_cast<Part<A>*>(memory);
    return static_cast<unsigned>(parts);
  };
  unsigned parts;
  if (by_columns(work)) {
    const auto columns = columns_of(work);
    parts = split(columns.parts);
    const auto blocks = divide_up(columns.items, kThreads / (columns.across * columns.groups));
    launch(moments_of_columns<order, T>, {{unsigned(blocks), parts}, kThreads}, stream, work, columns, to);
  } else {
    const auto lines = lines_of(work);
    parts = split(lines.parts);
    const auto blocks = divide_up(rows, kThreads / lines.lanes);
    const auto kernel =
        lines.items == lines.packs ? moments_of_lines<order, T, true> : moments_of_lines<order, T, false>;
    launch(kernel, {{unsigned(blocks), parts}, kThreads}, stream, work, lines, to);
  }
  if (parts == 1) return;
  // Neighbouring threads read neighbouring rows, where there are enough of them.
  const int lanes = rows >= 1 << 13 ? 1 : rows >= 1 << 6 ? 32 : kThreads;
  launch(merge_parts<order, A>, {unsigned(divide_up(rows, kThreads / lanes)), kThreads}, stream,
         static_cast<const Part<A>*>(to.parts), int(parts), lanes, results);
}

}  // namespace

template <class T>
std::int64_t moments_bytes(const MomentsWork<T>& work) {
  if (work.kept.count == 0) return 0;
  const auto parts = by_columns(work) ? columns_of(work).parts : lines_of(work).parts;
  return parts == 1 ? 0 : parts * work.kept.count * std::int64_t(sizeof(Part<Accumulation<T>>));
}

template <class T, class A>
void find_moments(const MomentsWork<T>& work, int order, void* memory, const MomentsResult<A>& result,
                  cudaStream_t stream) {
  order < 2 ? find<1>(work, memory, result, stream) : find<2>(work, memory, result, stream);
}

template <class T, class R>
void affine_to(const AffineWork& of, cudaStream_t stream) {
  if (of.count == 0) return;
  const AffineElements<R> work{of.count,           strided(of.scale), strided(of.input),         strided(of.mean),
                               strided(of.offset), strided(of.mask),  static_cast<R*>(of.result)};
  const auto blocks = divide_up(of.count, 2 * kThreads * Pack<T>::size);
  launch(affine_elements<T, R>, {unsigned(blocks), kThreads}, stream, work);
}

template <class T>
void affine(const AffineWork& of, cudaStream_t stream) {
  affine_to<T, T>(of, stream);
}

template <class T>
void affine_wide(const AffineWork& of, cudaStream_t stream) {
  affine_to<T, Accumulation<T>>(of, stream);
}

#define INSTANTIATE(T, A)                                                                               \
  template std::int64_t moments_bytes(const MomentsWork<T>&);                                           \
  template void find_moments(const MomentsWork<T>&, int, void*, const MomentsResult<A>&, cudaStream_t); \
  template void affine<T>(const AffineWork&, cudaStream_t);                                             \
  template void affine_wide<T>(const AffineWork&, cudaStream_t);
MASKED_LOSS_EACH_DTYPE(INSTANTIATE)
#undef INSTANTIATE

}  // namespace masked_loss::cuda
