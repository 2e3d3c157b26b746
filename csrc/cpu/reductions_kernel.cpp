// Compiled once for every instruction set: whatever is not in an anonymous namespace or always inline could end up as
// one copy for all of them.
#include "cpu/reductions_kernel.h"

#include <cmath>

#include "common/host_device.h"
#include "cpu/blocks.h"

namespace masked_loss::cpu::CPU_CAPABILITY {
namespace {

constexpr std::int64_t kBlock = 2048;  // elements that are visited together, twice for the second moment
constexpr std::int64_t kRows = 32;     // the same, of lanes

// Σ term(x) over what is kept.
template <bool masked, class A, class T, class Term>
A sum_of(const T* x, const std::uint8_t* keep, std::int64_t n, const Term& term) {
  using V = Vectorized<A>;
  constexpr std::int64_t size = V::size();
  V sums[4] = {V(0), V(0), V(0), V(0)};
  std::int64_t i = 0;
  const auto add = [&](V& sum, V v, std::int64_t at) {
    v = term(v);
    sum = sum + (masked ? select(keep + at, v, V(0)) : v);
  };
  for (; i + 4 * size <= n; i += 4 * size) {
    if constexpr (std::is_same_v<T, A>) {
      for (int k = 0; k < 4; ++k) add(sums[k], V::loadu(x + i + k * size), i + k * size);
    } else {
      for (int k = 0; k < 4; k += 2) {
        const auto [low, high] = at::vec::convert_to_float<T>(Vectorized<T>::loadu(x + i + k * size));
        add(sums[k], low, i + k * size);
        add(sums[k + 1], high, i + (k + 1) * size);
      }
    }
  }
  for_vectors<A>(x + i, n - i, [&](V v, std::int64_t at, std::int64_t lanes) {
    v = or_zero(masked ? keep + i + at : nullptr, term(v), lanes);
    sums[0] = sums[0] + (lanes == size ? v : V::set(V(0), v, lanes));
  });
  return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// The second moments from sums around a center that rounding has put `off` from the mean.
Moments around(double center, double off, double squares, std::int64_t count) {
  if (std::isinf(squares)) return {count, center + off, squares};  // what is subtracted may be infinite too
  const double second = squares - off * off * static_cast<double>(count);
  return {count, center + off, second < 0 ? 0 : second};  // not std::max, which loses NaN
}

// The second moments of what floats cannot add up: numbers beyond their range, infinities and NaN.
template <class At>
Moments moments_in_double(std::int64_t n, const At& at) {
  Moments moments;
  const auto each = [&](const auto& visit) {
    for (std::int64_t i = 0; i < n; ++i) {
      const auto [x, kept] = at(i);
      if (kept) visit(static_cast<double>(x));
    }
  };
  each([&](double x) { moments.first += x, ++moments.count; });
  if (moments.count > 0) moments.first /= static_cast<double>(moments.count);
  each([&](double x) { moments.second += (x - moments.first) * (x - moments.first); });
  return moments;
}

template <int order, class T>
Moments moments_of(const T* x, const std::uint8_t* keep, std::int64_t n) {
  using A = Accumulation<T>;
  using V = Vectorized<A>;
  const auto count = keep == nullptr ? n : count_nonzero(keep, n);
  if (count == 0) return {};
  const auto sum = [&](const auto& term) {
    return keep == nullptr ? sum_of<false, A>(x, keep, n, term) : sum_of<true, A>(x, keep, n, term);
  };
  const double total = sum([](V v) { return v; });
  if (order == 1) return {count, total, 0};
  if (!std::isfinite(total)) {
    return moments_in_double(n, [&](std::int64_t i) { return std::pair(x[i], keep == nullptr || keep[i] != 0); });
  }
  const A near = static_cast<A>(total / static_cast<double>(count));
  const V center(near);
  const double squares = sum([&](V v) { return (v - center) * (v - center); });
  const double off = double(sum([&](V v) { return v - center; })) / static_cast<double>(count);
  return around(near, off, squares, count);
}

// The elements, `stride` apart, beside one another.
template <class T>
const T* gathered(const T* from, std::int64_t stride, std::int64_t n, T* to) {
  if (stride == 1) return from;
  for (std::int64_t i = 0; i < n; ++i) to[i] = from[i * stride];
  return to;
}

template <int order, class T>
Moments line_of(const MomentsWork<T>& work, std::int64_t row, std::int64_t begin, std::int64_t end) {
  const auto base = work.kept.offsets(row);
  const auto last = work.reduced.dims - 1;
  const std::int64_t length = last < 0 ? 1 : work.reduced.sizes[last];
  const std::int64_t stride = last < 0 ? 1 : work.reduced.strides[0][last];
  const std::int64_t mask_stride = last < 0 ? 1 : work.reduced.strides[1][last];
  T stage[kBlock];
  std::uint8_t keep_stage[kBlock];
  Moments moments;
  for (std::int64_t i = begin, n = 0; i < end; i += n) {
    n = std::min({kBlock, end - i, length - i % length});
    const auto [input, mask] = work.reduced.offsets(i);
    const std::uint8_t* keep = work.mask == nullptr ? nullptr : work.mask + base[1] + mask;
    if (keep != nullptr && mask_stride == 0) {
      if (!*keep) continue;
      keep = nullptr;
    }
    if (keep != nullptr) keep = gathered(keep, mask_stride, n, keep_stage);
    const T* x = gathered(work.input + base[0] + input, stride, n, stage);
    moments = merge<order>(moments, moments_of<order>(x, keep, n));
  }
  return moments;
}

// Of `count` lanes, whose rows [begin, end) are at(row): elements, and the mask's or null.
template <int order, class A, class At>
void lanes_at(const At& at, std::int64_t count, std::int64_t begin, std::int64_t end, Moments* results) {
  using V = Vectorized<A>;
  A sum[kMomentLanes], center[kMomentLanes], squares[kMomentLanes];
  std::uint8_t counts[kMomentLanes];
  static_assert(kRows < 256);
  // Adds term(x, lane, n) over the rows [first, last), and counts them.
  const auto add = [&](std::int64_t first, std::int64_t last, bool counting, const auto& term) {
    std::fill(sum, sum + count, A(0));
    for (auto r = first; r < last; ++r) {
      const auto [x, keep] = at(r);
      if (counting) {
        for (std::int64_t w = 0; w < count; ++w) counts[w] += keep == nullptr || keep[w] != 0;
      }
      for_vectors<A>(x, count, [&, keep = keep](V v, std::int64_t w, std::int64_t n) {
        v = or_zero(keep == nullptr ? nullptr : keep + w, term(v, w, n), n);
        (V::loadu(sum + w, n) + v).store(sum + w, n);
      });
    }
  };
  std::fill(results, results + count, Moments());
  for (auto first = begin; first < end; first += kRows) {
    const auto last = std::min(end, first + kRows);
    std::fill(counts, counts + count, std::uint8_t(0));
    add(first, last, true, [](V v, std::int64_t, std::int64_t) { return v; });
    if (order == 1) {
      for (std::int64_t w = 0; w < count; ++w) results[w] = merge<1>(results[w], {counts[w], sum[w], 0});
      continue;
    }
    for (std::int64_t w = 0; w < count; ++w) center[w] = sum[w] / A(std::max<int>(counts[w], 1));
    const auto deviation = [&](V v, std::int64_t w, std::int64_t n) { return v - V::loadu(center + w, n); };
    add(first, last, false, [&](V v, std::int64_t w, std::int64_t n) {
      const V d = deviation(v, w, n);
      return d * d;
    });
    std::copy(sum, sum + count, squares);
    add(first, last, false, deviation);
    for (std::int64_t w = 0; w < count; ++w) {
      const double off = double(sum[w]) / std::max<int>(counts[w], 1);
      auto moments = around(center[w], off, squares[w], counts[w]);
      if (!std::isfinite(center[w])) {
        moments = moments_in_double(last - first, [&](std::int64_t r) {
          const auto [x, keep] = at(first + r);
          return std::pair(x[w], keep == nullptr || keep[w] != 0);
        });
      }
      results[w] = merge<2>(results[w], moments);
    }
  }
}

template <int order, class T>
void lanes_of(const MomentsWork<T>& work, std::int64_t row, std::int64_t count, std::int64_t begin, std::int64_t end,
              Moments* results) {
  const auto base = work.kept.offsets(row);
  const std::int64_t mask_stride = work.kept.strides[1][work.kept.dims - 1];
  std::uint8_t stage[kMomentLanes];
  const auto at = [&](std::int64_t r) {
    const auto [input, mask] = work.reduced.offsets(r);
    const std::uint8_t* keep =
        work.mask == nullptr ? nullptr : gathered(work.mask + base[1] + mask, mask_stride, count, stage);
    return std::pair(work.input + base[0] + input, keep);
  };
  lanes_at<order, Accumulation<T>>(at, count, begin, end, results);
}

// Rows become lanes in a tile.
template <int order, class T>
void tile_of(const MomentsWork<T>& work, std::int64_t row, std::int64_t count, Moments* results) {
  using A = Accumulation<T>;
  constexpr std::int64_t most = 4096 + 16 * kMomentTileElements;
  const auto length = work.reduced.count, lanes = moment_tile(length) + 16;  // no power of two, which shares cache sets
  A x[most], stage[most];
  std::uint8_t keep[most];
  std::array<std::int64_t, 2> places[kMomentTileElements];
  for (std::int64_t l = 0; l < length; ++l) places[l] = work.reduced.offsets(l);
  const bool is_line = length == 1 || (work.reduced.dims == 1 && work.reduced.strides[0][0] == 1);
  const auto last = work.kept.dims - 1;
  const std::int64_t size = last < 0 ? 1 : work.kept.sizes[last];
  const std::int64_t stride = last < 0 ? length : work.kept.strides[0][last];
  const std::int64_t mask_stride = last < 0 ? 1 : work.kept.strides[1][last];
  for (std::int64_t w = 0, n = 0; w < count; w += n) {
    n = std::min(count - w, size - (row + w) % size);
    const auto base = work.kept.offsets(row + w);
    const T* input = work.input + base[0];
    if (is_line && (std::is_same_v<T, A> || stride == length)) {
      const A* from;
      if constexpr (std::is_same_v<T, A>) {
        from = input;
      } else {
        from = load_block(input, nullptr, n * length, stage);
      }
      transpose(from, stride, x + w, lanes, n, length);
    } else {
      for (std::int64_t l = 0; l < length; ++l) {
        const T* from = input + places[l][0];
        A* to = x + l * lanes + w;
        if (stride == 1) {
          for_vectors<A>(from, n, [&](Vectorized<A> v, std::int64_t i, std::int64_t part) { v.store(to + i, part); });
        } else {
          for (std::int64_t i = 0; i < n; ++i) to[i] = static_cast<A>(from[i * stride]);
        }
      }
    }
    for (std::int64_t l = 0; l < length && work.mask != nullptr; ++l) {
      const std::uint8_t* from = work.mask + base[1] + places[l][1];
      std::uint8_t* to = keep + l * lanes + w;
      for (std::int64_t i = 0; i < n; ++i) to[i] = from[i * mask_stride];
    }
  }
  const auto at = [&](std::int64_t l) {
    return std::pair(static_cast<const A*>(x + l * lanes),
                     static_cast<const std::uint8_t*>(work.mask == nullptr ? nullptr : keep + l * lanes));
  };
  lanes_at<order, A>(at, count, 0, length, results);
}

template <class T>
Moments line(const MomentsWork<T>& work, int order, std::int64_t row, std::int64_t begin, std::int64_t end) {
  return order == 2 ? line_of<2>(work, row, begin, end) : line_of<1>(work, row, begin, end);
}

template <class T>
void lanes(const MomentsWork<T>& work, int order, std::int64_t row, std::int64_t count, std::int64_t begin,
           std::int64_t end, Moments* results) {
  (order == 2 ? lanes_of<2, T> : lanes_of<1, T>)(work, row, count, begin, end, results);
}

template <class T>
void tile(const MomentsWork<T>& work, int order, std::int64_t row, std::int64_t count, Moments* results) {
  (order == 2 ? tile_of<2, T> : tile_of<1, T>)(work, row, count, results);
}

// Elements that are `stride` bytes apart as A, of an operand whose elements repeat or not.
template <class A, class T>
const A* load_line(const char* from, std::int64_t stride, std::int64_t n, A* stage) {
  const auto* x = reinterpret_cast<const T*>(from);
  if (stride == sizeof(T)) return load_block(x, nullptr, n, stage);
  if (stride == 0) {
    std::fill(stage, stage + n, static_cast<A>(*x));
  } else {
    for (std::int64_t i = 0; i < n; ++i)
      stage[i] = static_cast<A>(x[i * stride / static_cast<std::int64_t>(sizeof(T))]);
  }
  return stage;
}

template <class T, class R>
void affine(const AffineLine& line) {
  using A = Accumulation<T>;
  using V = Vectorized<A>;
  A scale_stage[kBlock], input_stage[kBlock], mean_stage[kBlock], offset_stage[kBlock];
  std::uint8_t keep_stage[kBlock];
  for (std::int64_t i = 0; i < line.count; i += kBlock) {
    const auto n = std::min(kBlock, line.count - i);
    const std::uint8_t* keep = nullptr;
    if (line.mask != nullptr) {
      keep = gathered(reinterpret_cast<const std::uint8_t*>(line.mask) + i * line.mask_stride, line.mask_stride, n,
                      keep_stage);
    }
    const A* scale = load_line<A, A>(line.scale + i * line.scale_stride, line.scale_stride, n, scale_stage);
    const A *input = nullptr, *mean = nullptr, *offset = nullptr;
    if (line.input != nullptr) {
      input = load_line<A, T>(line.input + i * line.input_stride, line.input_stride, n, input_stage);
      mean = load_line<A, A>(line.mean + i * line.mean_stride, line.mean_stride, n, mean_stage);
    }
    if (line.offset != nullptr) {
      offset = load_line<A, A>(line.offset + i * line.offset_stride, line.offset_stride, n, offset_stage);
    }
    const auto value = [&](std::int64_t k, std::int64_t lanes) {
      V v = V::loadu(scale + k, lanes);
      if (input != nullptr) v = v * (V::loadu(input + k, lanes) - V::loadu(mean + k, lanes));
      if (offset != nullptr) v = v + V::loadu(offset + k, lanes);
      return or_zero(keep == nullptr ? nullptr : keep + k, v, lanes);
    };
    R* out = reinterpret_cast<R*>(line.result + i * line.result_stride);
    if (line.result_stride == sizeof(R)) {
      line.past_cache ? store_vectors<true, A>(out, n, value) : store_vectors<false, A>(out, n, value);
      continue;
    }
    for (std::int64_t k = 0; k < n; ++k) {
      A lane[V::size()];
      value(k, 1).store(lane);
      *reinterpret_cast<R*>(line.result + (i + k) * line.result_stride) = static_cast<R>(lane[0]);
    }
  }
  finish_stores();
}

template <class T>
constexpr ReductionsKernel<T> kernel{line<T>, lanes<T>, tile<T>, affine<T, T>, affine<T, Accumulation<T>>};

}  // namespace

const ReductionsKernels& reductions_kernels() {
  static constexpr ReductionsKernels kernels{kernel<float>, kernel<double>, kernel<at::BFloat16>, kernel<at::Half>};
  return kernels;
}

}  // namespace masked_loss::cpu::CPU_CAPABILITY
