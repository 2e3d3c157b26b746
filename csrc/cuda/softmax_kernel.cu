#include "cuda/softmax_kernel.h"

#include "cuda/row_packs.cuh"

namespace masked_loss::cuda {
namespace {

using Pass = SoftmaxPass;

// What kernels are compiled for: the first two do the passes of log_softmax as well.
enum class Kind { Softmax, SoftmaxBackward, Logsumexp, LogsumexpBackward };

template <class A>
constexpr A kInfinity = std::numeric_limits<A>::infinity();

// The softmax of what has been seen and of x, of which exponentials relative to the new maximum remain, unless it is
// asked to `stay`. `bounded`: infinite elements have an infinite sum, and not one of NaN, which theirs alone is.
template <bool bounded, class A, int n>
__device__ __forceinline__ Softmax<A> add(Softmax<A> seen, A (&x)[n], bool stay) {
  A max = seen.max;
#pragma unroll
  for (const A value : x) max = greater(max, value);
  if constexpr (bounded) max = min(max, std::numeric_limits<A>::max());
  A sum = seen.sum * fast_exp(seen.max - max);
#pragma unroll
  for (A& value : x) {
    const A e = fast_exp(value - max);
    sum += e;
    if (!stay) value = e;
  }
  return {max, sum};
}

// What log_softmax gives for an element.
template <class A>
struct LogSoftmaxOf {
  A max, log_sum;
  __device__ __forceinline__ explicit LogSoftmaxOf(Softmax<A> row) : max(row.max), log_sum(std::log(row.sum)) {}
  __device__ __forceinline__ A operator()(A x, A) const { return x - max - log_sum; }
};

// What softmax gives for an element, or for its exponential relative to some maximum.
template <class A>
struct SoftmaxOf {
  A max, scale;
  __device__ __forceinline__ A operator()(A x, A) const { return fast_exp(x - max) * scale; }
};
template <class A>
struct Scaled {
  A scale;
  __device__ __forceinline__ A operator()(A e, A) const { return e * scale; }
};

// Gradients of an element, from what the pass before gave, or else was given, for it: what is summed over the row, and
// what the sum makes of it.
struct OfSoftmax {
  template <class A>
  __device__ __forceinline__ static A term(A y, A grad) {
    return y * grad;
  }
  template <class A>
  __device__ __forceinline__ static A value(A y, A grad, A sum) {
    return y * (grad - sum);
  }
};
struct OfLogSoftmax {
  template <class A>
  __device__ __forceinline__ static A term(A, A grad) {
    return grad;
  }
  template <class A>
  __device__ __forceinline__ static A value(A y, A grad, A sum) {
    return grad - fast_exp(y) * sum;
  }
};
template <class A>
struct LogsumexpGradient {
  A lse, grad;
  __device__ __forceinline__ A operator()(A x, A) const { return fast_exp(x - lse) * grad; }
};
template <class Of, class A>
struct Gradient {
  A sum;
  __device__ __forceinline__ A operator()(A y, A grad) const { return Of::value(y, grad, sum); }
};

template <class A>
__device__ __forceinline__ A masked_value(Kind kind, bool log) {
  return kind == Kind::Softmax && log ? -kInfinity<A> : A(0);
}

// A row whose classes lie side by side.
template <class T, class A>
struct Line : RowPacks<T> {
  const T *input, *grad;
  T* result;
  const unsigned char* mask;                 // or null
  int end;                                   // nothing is kept from there on
  bool aligned, grad_aligned, mask_aligned;  // of packs

  __device__ __forceinline__ Line(const SoftmaxWork<T, A>& work, std::int64_t r) {
    const auto offsets = work.rows.offsets(r);
    input = work.input + offsets[0];
    grad = work.grad + offsets[1];
    result = work.result + offsets[2];
    static_cast<RowPacks<T>&>(*this) = {work.result == nullptr ? input : result, static_cast<int>(work.classes)};
    aligned = is_aligned(input + this->head);
    grad_aligned = grad != nullptr && is_aligned(grad + this->head);
    end = static_cast<int>(work.causal_end(r));
    mask = work.mask == nullptr ? nullptr : work.mask + offsets[3];
    if (mask != nullptr && work.mask_stride == 0) {
      if (*mask == 0) end = 0;
      mask = nullptr;
    }
    mask_aligned = (reinterpret_cast<std::uintptr_t>(mask) + this->head) % Pack<T>::size == 0;
  }

  __device__ __forceinline__ bool keeps(int i) const { return i < end && (mask == nullptr || mask[i] != 0); }
};

// Takes one row after the other, by kLanes threads that hold kElements of it each, which is a tile. The last tile with
// something kept, most often the only one, stays on chip until the results are written; others are read again.
template <class T, Kind kind, int kLanes, int kElements>
class LineGroup {
 public:
  using A = Accumulation<T>;

  __device__ __forceinline__ LineGroup(const SoftmaxWork<T, A>& work, bool log)
      : work_(work), log_(log), lane_(threadIdx.x % kLanes) {}

  // Every thread of the group comes here with the same row.
  __device__ __forceinline__ void visit(std::int64_t r) {
    const Line<T, A> line(work_, r);
    single_ = line.single(lane_);
    kept_single_ = single_ >= 0 && line.keeps(single_);
    x_single_ = kept_single_ ? widen(line.input[single_]) : -kInfinity<A>;
    if constexpr (has_grad) grad_single_ = kept_single_ ? widen(line.grad[single_]) : A(0);
    last_ = (max(1, min(line.packs, (line.end - line.head + n - 1) / n)) - 1) / (kLanes * kPacks);
    if (line.end == 0) {
      if constexpr (kind == Kind::Logsumexp) {
        if (lane_ == 0) work_.reduced[r] = -kInfinity<A>;
      } else {
        store_masked(line, 0);
        store_single(line, Scaled<A>{});
      }
    } else if constexpr (kind == Kind::Softmax || kind == Kind::Logsumexp) {
      forward(line, r);
    } else if constexpr (kind == Kind::SoftmaxBackward) {
      log_ ? backward<OfLogSoftmax>(line) : backward<OfSoftmax>(line);
    } else {
      const LogsumexpGradient<A> value{work_.reduced[r], work_.row_grad[r]};
      for (int t = 0; t <= last_; ++t) {
        load(line, t, false);
        store(line, t, value);
      }
      finish(line, value);
    }
  }

 private:
  using P = Pack<T>;
  static constexpr int n = P::size, kPacks = kElements / n;
  static constexpr unsigned every = (1u << n) - 1;
  static constexpr bool has_grad = kind == Kind::SoftmaxBackward;
  static_assert(kElements <= 32, "a bit an element");

  // The first pack of this thread in a tile; `step` elements from one to the next.
  __device__ __forceinline__ int first(int t) const { return t * kPacks * kLanes + lane_; }
  static constexpr int step = kLanes * n;

  // Sets the bits of what is kept of each pack; the masks of all of them are under way at once.
  __device__ __forceinline__ void load_mask(const Line<T, A>& line, int i, unsigned (&bits)[kPacks]) const {
    const int end = min(line.end, line.element(line.packs));
    const auto kept = [&](int k) { return max(0, min(n, end - i - k * step)); };
    if (line.mask != nullptr && line.mask_aligned) {
      MaskWord<n> words[kPacks];
#pragma unroll
      for (int k = 0; k < kPacks; ++k) {
        if (kept(k) > 0)
          words[k] = *reinterpret_cast<const MaskWord<n>*>(line.mask + i + k * step);  // others may share it
      }
#pragma unroll
      for (int k = 0; k < kPacks; ++k) bits[k] = kept(k) > 0 ? mask_bits(words[k]) : 0;
    } else {
#pragma unroll
      for (int k = 0; k < kPacks; ++k) {
        bits[k] = line.mask == nullptr ? every : kept(k) > 0 ? mask_bits<n>(line.mask + i + k * step) : 0;
      }
    }
#pragma unroll
    for (int k = 0; k < kPacks; ++k) bits[k] &= (1u << kept(k)) - 1;
  }

  // A pack with nothing kept is not read.
  __device__ __forceinline__ static void load_kept(P (&packs)[kPacks], const T* from, const unsigned (&bits)[kPacks],
                                                   bool aligned, bool again) {
    const auto load = [&](const auto& load_one) {
#pragma unroll
      for (int k = 0; k < kPacks; ++k) {
        packs[k] = {};
        if (bits[k] != 0) packs[k] = load_one(from + k * step);
      }
    };
    if (!aligned) {
      load([](const T* address) { return load_pack(address, false); });
    } else if (again) {
      load([](const T* address) { return load_cached(address); });
    } else {
      load([](const T* address) { return load_streaming(address); });
    }
  }

  __device__ __forceinline__ void load(const Line<T, A>& line, int t, bool again) {
    unsigned bits[kPacks];
    P packs[kPacks], grads[kPacks];
    const int i = line.element(first(t));
    load_mask(line, i, bits);
    load_kept(packs, line.input + i, bits, line.aligned, again);
    if constexpr (has_grad) load_kept(grads, line.grad + i, bits, line.grad_aligned, again);
    kept_ = 0;
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      kept_ |= bits[k] << (k * n);
#pragma unroll
      for (int j = 0; j < n; ++j) {
        x_[k * n + j] = widen(packs[k].values[j]);
        if constexpr (has_grad) grad_[k * n + j] = widen(grads[k].values[j]);
      }
      if (bits[k] == every) continue;
#pragma unroll
      for (int j = 0; j < n; ++j) {
        const bool counts = bits[k] >> j & 1;
        x_[k * n + j] = counts ? x_[k * n + j] : has_grad ? A(0) : -kInfinity<A>;
        if constexpr (has_grad) grad_[k * n + j] = counts ? grad_[k * n + j] : A(0);
      }
    }
  }

  // Chosen, not multiplied: what is masked may be anything.
  template <class Value>
  __device__ __forceinline__ void store(const Line<T, A>& line, int t, const Value& value) const {
    const T masked = narrow<T>(masked_value<A>(kind, log_));
    const int p = first(t);
    T* result = line.result + line.element(p);
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      if (p + k * kLanes >= line.packs) continue;
      P results;
#pragma unroll
      for (int j = 0; j < n; ++j) {
        results.values[j] = narrow<T>(value(x_[k * n + j], has_grad ? grad_[has_grad ? k * n + j : 0] : A(0)));
      }
      const unsigned bits = kept_ >> (k * n) & every;
      if (bits != every) {
#pragma unroll
        for (int j = 0; j < n; ++j) results.values[j] = bits >> j & 1 ? results.values[j] : masked;
      }
      store_streaming(result + k * step, results);
    }
  }

  __device__ __forceinline__ void store_masked(const Line<T, A>& line, int first_tile) const {
    P masked;
#pragma unroll
    for (T& value : masked.values) value = narrow<T>(masked_value<A>(kind, log_));
    for (int p = first(first_tile); p < line.packs; p += kLanes) {
      store_streaming(line.result + line.element(p), masked);
    }
  }

  template <class Value>
  __device__ __forceinline__ void store_single(const Line<T, A>& line, const Value& value) const {
    if (single_ < 0) return;
    line.result[single_] = narrow<T>(kept_single_ ? value(x_single_, grad_single_) : masked_value<A>(kind, log_));
  }

  // All but the tile that was on chip, from their elements.
  template <class Value>
  __device__ __forceinline__ void finish(const Line<T, A>& line, const Value& value) {
    store_single(line, value);
    store_masked(line, last_ + 1);
  }
  template <class Value>
  __device__ __forceinline__ void store_others(const Line<T, A>& line, const Value& value) {
    for (int t = last_ - 1; t >= 0; --t) {
      load(line, t, false);
      store(line, t, value);
    }
    finish(line, value);
  }

  __device__ __forceinline__ void forward(const Line<T, A>& line, std::int64_t r) {
    constexpr bool reduces = kind == Kind::Logsumexp;
    Softmax<A> softmax;
    if (single_ >= 0) {
      A single[1] = {x_single_};
      softmax = add<reduces>(softmax, single, true);
    }
    for (int t = 0; t <= last_; ++t) {
      load(line, t, !reduces && t < last_);
      softmax = add<reduces>(softmax, x_, reduces || log_);
    }
    const A max = softmax.max;
    softmax = reduce_group<kLanes, WarpSoftmax>(softmax);
    if constexpr (reduces) {
      if (lane_ == 0) work_.reduced[r] = log_sum_exp(softmax);
    } else if (log_) {
      const LogSoftmaxOf<A> value(softmax);
      store(line, last_, value);
      store_others(line, value);
    } else {
      const A scale = 1 / softmax.sum;
      store(line, last_, Scaled<A>{fast_exp(max - softmax.max) * scale});
      store_others(line, SoftmaxOf<A>{softmax.max, scale});
    }
  }

  template <class Of>
  __device__ __forceinline__ void backward(const Line<T, A>& line) {
    A sum = kept_single_ ? Of::term(x_single_, grad_single_) : A(0);
    for (int t = 0; t <= last_; ++t) {
      load(line, t, t < last_);
#pragma unroll
      for (int i = 0; i < kElements; ++i) sum += Of::term(x_[i], grad_[i]);
    }
    const Gradient<Of, A> value{reduce_group<kLanes, WarpSum>(sum)};
    store(line, last_, value);
    store_others(line, value);
  }

  const SoftmaxWork<T, A>& work_;
  const bool log_;
  const int lane_;
  A x_[kElements], grad_[has_grad ? kElements : 1];
  unsigned kept_;  // a bit an element
  int last_;       // tile with something kept
  int single_;
  bool kept_single_;
  A x_single_, grad_single_ = 0;
};

constexpr int threads_of(int lanes) { return std::max(lanes, 128); }

// While one block reduces, others have to keep the memory busy: 768 threads of 80 registers, or 512 that hold twice as
// much. Warps of short rows are under way with less of them, and so there are more.
constexpr int resident_blocks(Kind kind, int lanes, int elements) {
  const int held = kind == Kind::SoftmaxBackward ? 2 * elements : elements;
  return std::max(1, (held > 16 ? 512 : lanes == 32 ? 896 : 768) / threads_of(lanes));
}

template <class T, Kind kind, int kLanes, int kElements>
__global__ void __launch_bounds__(threads_of(kLanes), resident_blocks(kind, kLanes, kElements))
    softmax_packs(SoftmaxWork<T, Accumulation<T>> work, bool log) {
  LineGroup<T, kind, kLanes, kElements> group(work, log);
  const int groups_in_block = blockDim.x / kLanes;
  const auto first = std::int64_t(blockIdx.x) * groups_in_block + threadIdx.x / kLanes;
  const auto step = std::int64_t(gridDim.x) * groups_in_block;
  for (auto r = first; r < work.rows.count; r += step) group.visit(r);
}

// Some classes of a row that lie anywhere, so many threads apart: they are all read before any is used.
template <class T, bool has_grad>
struct Few {
  using A = Accumulation<T>;
  static constexpr int size = 4;
  A x[size], grad[has_grad ? size : 1];
  bool kept[size];

  template <class Keeps>
  __device__ __forceinline__ void load(const SoftmaxWork<T, A>& work, const T* input, const T* grads,
                                       std::int64_t first, int lanes, const Keeps& keeps) {
#pragma unroll
    for (int u = 0; u < size; ++u) kept[u] = keeps(first + u * lanes);
#pragma unroll
    for (int u = 0; u < size; ++u) {
      const auto c = first + u * lanes;
      x[u] = kept[u] ? widen(input[c * work.input_stride]) : -kInfinity<A>;
      if constexpr (has_grad) grad[u] = kept[u] ? widen(grads[c * work.grad_stride]) : A(0);
    }
  }
};

// Of the threads that share a row, all of which get it; `rows` are neighbours in a block.
template <class A>
__device__ __forceinline__ Softmax<A> reduce_row(Softmax<A> value, int lanes, int rows, bool rows_first) {
  if (!rows_first) return reduce_softmax(value, lanes);
  if (lanes == 1) return value;
  return reduce_apart(value, lanes, rows, [](const Softmax<A>& a, const Softmax<A>& b) { return merge(a, b); });
}
template <class A>
__device__ __forceinline__ A reduce_row(A value, int lanes, int rows, bool rows_first) {
  const auto plus = [](A a, A b) { return a + b; };
  if (!rows_first) return reduce_lanes(value, lanes, plus);
  return lanes == 1 ? value : reduce_apart(value, lanes, rows, plus);
}

// Rows of classes anywhere in memory: `lanes` threads a row.
template <class T, Kind kind>
__global__ void __launch_bounds__(512, 1)
    softmax_lanes(SoftmaxWork<T, Accumulation<T>> work, bool log, int lanes, bool rows_first) {
  using A = Accumulation<T>;
  constexpr bool has_grad = kind == Kind::SoftmaxBackward;
  const int rows = blockDim.x / lanes;
  const int lane = rows_first ? threadIdx.x / rows : threadIdx.x % lanes;
  const int row_in_block = rows_first ? threadIdx.x % rows : threadIdx.x / lanes;
  const int step = lanes * Few<T, has_grad>::size;
  for (auto first = std::int64_t(blockIdx.x) * rows; first < work.rows.count; first += std::int64_t(gridDim.x) * rows) {
    const auto r = first + row_in_block;
    const bool there = r < work.rows.count;
    const auto offsets = there ? work.rows.offsets(r) : std::array<std::int64_t, 4>{};
    const T *input = work.input + offsets[0], *grads = work.grad + offsets[1];
    const std::uint8_t* mask = work.mask == nullptr ? nullptr : work.mask + offsets[3];
    const auto end = there ? work.causal_end(r) : 0;
    const auto keeps = [&](std::int64_t c) { return c < end && (mask == nullptr || mask[c * work.mask_stride]); };
    Few<T, has_grad> few;
    const auto write = [&](const auto& value) {
      if (!there) return;
      T* result = work.result + offsets[2];
      const T masked = narrow<T>(masked_value<A>(kind, log));
      for (std::int64_t c = lane; c < work.classes; c += step) {
        few.load(work, input, grads, c, lanes, keeps);
#pragma unroll
        for (int u = 0; u < few.size; ++u) {
          if (c + u * lanes >= work.classes) continue;
          const T kept = narrow<T>(value(few.x[u], has_grad ? few.grad[has_grad ? u : 0] : A(0)));
          result[(c + u * lanes) * work.result_stride] = few.kept[u] ? kept : masked;
        }
      }
    };
    const auto write_gradient = [&](auto of) {
      using Of = decltype(of);
      A sum = 0;
      for (std::int64_t c = lane; c < end; c += step) {
        few.load(work, input, grads, c, lanes, keeps);
#pragma unroll
        for (int u = 0; u < few.size; ++u) {
          if (few.kept[u]) sum += Of::term(few.x[u], few.grad[has_grad ? u : 0]);
        }
      }
      write(Gradient<Of, A>{reduce_row(sum, lanes, rows, rows_first)});
    };
    if constexpr (kind == Kind::SoftmaxBackward) {
      log ? write_gradient(OfLogSoftmax{}) : write_gradient(OfSoftmax{});
    } else if constexpr (kind == Kind::LogsumexpBackward) {
      write(there ? LogsumexpGradient<A>{work.reduced[r], work.row_grad[r]} : LogsumexpGradient<A>{});
    } else {
      Softmax<A> softmax;
      for (std::int64_t c = lane; c < end; c += step) {
        few.load(work, input, grads, c, lanes, keeps);
        softmax = add<kind == Kind::Logsumexp>(softmax, few.x, true);
      }
      softmax = reduce_row(softmax, lanes, rows, rows_first);
      if constexpr (kind == Kind::Logsumexp) {
        if (there && lane == 0) work.reduced[r] = log_sum_exp(softmax);
      } else {
        log ? write(LogSoftmaxOf<A>(softmax)) : write(SoftmaxOf<A>{softmax.max, 1 / softmax.sum});
      }
    }
  }
}

// The sizes of a tile, of which the first that holds a row is taken, else the last. Of two operands registers hold half
// as much; where nothing has to stay on chip a warp walks along short rows, and a block along others.
struct Shape {
  int lanes, elements;
};
constexpr Shape kForward[] = {{32, 16}, {32, 32}, {128, 16}, {256, 16}, {256, 32}, {512, 32}};
constexpr Shape kBackward[] = {{32, 16}, {128, 16}, {256, 16}, {512, 16}};
constexpr Shape kWalking[] = {{32, 16}, {256, 16}};

template <Kind kind>
constexpr const auto& shapes() {
  if constexpr (kind == Kind::Softmax) {
    return kForward;
  } else if constexpr (kind == Kind::SoftmaxBackward) {
    return kBackward;
  } else {
    return kWalking;
  }
}

constexpr std::int64_t kFewBytes = 128;  // bytes of a row up to which a pack a thread would leave most threads idle
constexpr int kWalked = 2048;            // classes up to which a warp walks along a row

template <Kind kind>
int pick_shape(std::int64_t classes) {
  if (kind == Kind::Logsumexp || kind == Kind::LogsumexpBackward) return classes > kWalked;
  int shape = 0;
  for (const auto& [lanes, elements] : shapes<kind>()) shape += lanes * elements < classes;
  return std::min<int>(shape, std::size(shapes<kind>()) - 1);
}

// Calls run(constant) with the kind as a constant.
template <class Run>
auto with_kind(Pass pass, const Run& run) {
  switch (pass) {
    case Pass::Softmax:
    case Pass::LogSoftmax: return run(std::integral_constant<Kind, Kind::Softmax>());
    case Pass::SoftmaxBackward:
    case Pass::LogSoftmaxBackward: return run(std::integral_constant<Kind, Kind::SoftmaxBackward>());
    case Pass::Logsumexp: return run(std::integral_constant<Kind, Kind::Logsumexp>());
    default: return run(std::integral_constant<Kind, Kind::LogsumexpBackward>());
  }
}

template <class T, Kind kind, int index = 0, class A>
void run_packs(const SoftmaxWork<T, A>& work, bool log, int shape, int multiprocessors, cudaStream_t stream) {
  if constexpr (index + 1 < int(std::size(shapes<kind>()))) {
    if (index != shape) return run_packs<T, kind, index + 1>(work, log, shape, multiprocessors, stream);
  }
  constexpr auto of = shapes<kind>()[index];
  constexpr int threads = threads_of(of.lanes);
  const auto blocks = divide_up(work.rows.count, threads / of.lanes);
  launch(softmax_packs<T, kind, of.lanes, of.elements>, {grid(blocks, multiprocessors, threads), threads}, stream, work,
         log);
}

template <class T, Kind kind, class A>
void run_kind(const SoftmaxWork<T, A>& work, bool log, const SoftmaxRegime& regime, int multiprocessors,
              cudaStream_t stream) {
  if constexpr (!std::is_same_v<T, double>) {
    if (regime.kind == SoftmaxRegime::Packs) {
      return run_packs<T, kind>(work, log, regime.shape, multiprocessors, stream);
    }
  }
  const unsigned threads = std::max(128, regime.rows_first ? 32 * regime.lanes : 0);
  const auto blocks = divide_up(work.rows.count, threads / regime.lanes);
  launch(softmax_lanes<T, kind>, {grid(blocks, multiprocessors, threads), threads}, stream, work, log, regime.lanes,
         regime.rows_first);
}

}  // namespace

SoftmaxRegime pick_softmax_regime(Pass pass, std::int64_t rows, std::int64_t classes, std::int64_t element_bytes,
                                  bool contiguous_classes, bool contiguous_rows, int multiprocessors) {
  if (!contiguous_classes || element_bytes > 4 || classes * element_bytes <= kFewBytes ||
      classes >= (std::int64_t{1} << 30)) {
    SoftmaxRegime regime{SoftmaxRegime::Lanes, 0, 1, !contiguous_classes && contiguous_rows};
    const auto enough = [&] {
      return regime.rows_first ? regime.lanes * 4 >= classes || regime.lanes == 16 ||
                                     rows * regime.lanes >= std::int64_t(multiprocessors) * 1024
                               : regime.lanes * 4 >= classes || regime.lanes == 32;
    };
    while (!enough()) regime.lanes *= 2;
    return regime;
  }
  const auto shape = with_kind(pass, [&](auto kind) { return pick_shape<kind()>(classes); });
  return {SoftmaxRegime::Packs, shape, 1, false};
}

std::vector<SoftmaxRegime> softmax_regimes(Pass pass, std::int64_t classes, std::int64_t element_bytes,
                                           bool contiguous_classes, bool contiguous_rows) {
  const bool rows_first = !contiguous_classes && contiguous_rows;
  std::vector<SoftmaxRegime> all;
  for (int lanes = 1; lanes <= (rows_first ? 16 : 32); lanes *= 2) {
    all.push_back({SoftmaxRegime::Lanes, 0, lanes, rows_first});
  }
  if (!contiguous_classes || element_bytes > 4 || classes * element_bytes < 16) return all;
  const int count = with_kind(pass, [](auto kind) { return int(std::size(shapes<kind()>())); });
  for (int shape = 0; shape < count; ++shape) all.push_back({SoftmaxRegime::Packs, shape, 1, false});
  return all;
}

template <class T, class A>
void run_softmax(const SoftmaxWork<T, A>& work, Pass pass, const SoftmaxRegime& regime, int multiprocessors,
                 cudaStream_t stream) {
  if (work.rows.count == 0) return;
  const bool log = pass == Pass::LogSoftmax || pass == Pass::LogSoftmaxBackward;
  with_kind(pass, [&](auto kind) { run_kind<T, kind()>(work, log, regime, multiprocessors, stream); });
}

#define INSTANTIATE(T, A) \
  template void run_softmax(const SoftmaxWork<T, A>&, Pass, const SoftmaxRegime&, int, cudaStream_t);
MASKED_LOSS_EACH_DTYPE(INSTANTIATE)
#undef INSTANTIATE

}  // namespace masked_loss::cuda
