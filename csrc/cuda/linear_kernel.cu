#include "cuda/linear_kernel.h"

#include "cuda/row_packs.cuh"

namespace masked_loss::cuda {
namespace {

constexpr int kThreads = 512;  // of a block, which takes one row after the other

template <class A>
constexpr int kUnrolled = 32 / sizeof(A);  // classes that a thread reads before it uses any

// Merged in an order that the lanes fix.
struct WarpRow {
  template <class A>
  __device__ __forceinline__ LinearRow<A> operator()(const LinearRow<A>& row) const {
    return reduce_lanes(row, 32, [](const LinearRow<A>& a, const LinearRow<A>& b) { return merge(a, b); });
  }
};

// A row of logits whose classes are contiguous: body(first class, logits of some classes kThreads apart, which of
// them count). What does not count is -inf.
template <class A, class Body>
__device__ __forceinline__ void for_classes(const A* row, const std::uint8_t* allowed, std::int64_t classes,
                                            const Body& body) {
  for (std::int64_t first = threadIdx.x; first < classes; first += kThreads * kUnrolled<A>) {
    A x[kUnrolled<A>];
    bool counts[kUnrolled<A>];
#pragma unroll
    for (int k = 0; k < kUnrolled<A>; ++k) {
      const auto c = first + k * kThreads;
      counts[k] = c < classes && (allowed == nullptr || allowed[c] != 0);
      x[k] = c < classes ? row[c] : A(0);
    }
#pragma unroll
    for (int k = 0; k < kUnrolled<A>; ++k) {
      if (!counts[k]) x[k] = -std::numeric_limits<A>::infinity();
    }
    body(first, x, counts);
  }
}

// Adds logits to the softmax of what has been seen; they become their distances from its maximum.
template <class A>
__device__ __forceinline__ Softmax<A> add(const Softmax<A>& seen, A (&x)[kUnrolled<A>]) {
  A max = seen.max;
#pragma unroll
  for (const A value : x) max = greater(max, value);
  Softmax<A> softmax{max, seen.sum * fast_exp(seen.max - max)};
#pragma unroll
  for (A& value : x) {
    value -= max;
    softmax.sum += fast_exp(value);
  }
  return softmax;
}

template <class A>
__device__ __forceinline__ const std::uint8_t* mask_of(const LinearWork<A>& work, std::int64_t r) {
  return work.class_mask == nullptr ? nullptr : work.class_mask + r * work.rows.strides[2][0];
}

template <class A>
__global__ void __launch_bounds__(kThreads) visit_block(LinearWork<A> work) {
  for (std::int64_t r = blockIdx.x; r < work.rows.count; r += gridDim.x) {
    const A* logits = work.logits + r * work.classes;
    const auto* allowed = mask_of(work, r);
    LinearRow<A> row;
    for_classes(logits, allowed, work.classes, [&](std::int64_t first, A(&x)[kUnrolled<A>], const auto& counts) {
      if (work.label_smoothing != 0) {
#pragma unroll
        for (int k = 0; k < kUnrolled<A>; ++k) {
          if (!counts[k]) continue;
          const double weight = work.weight == nullptr ? 1.0 : double(work.weight[first + k * kThreads]);
          row.smoothing = row.smoothing + ClassSums{weight == 0 ? 0 : weight * double(x[k]), weight, 1};
        }
      }
      const auto before = row.softmax;
      row.softmax = add(before, x);
      row.weighted = weighted_at(before, row.weighted, row.softmax.max);
#pragma unroll
      for (const A shift : x) row.weighted += fast_exp(shift) * max_or_nan(shift, A(kLowestShift));
    });
    row = reduce_block(row, WarpRow{});
    if (threadIdx.x != 0) continue;
    if (const auto target = work.target[r] - work.first; target >= 0 && target < work.classes) {
      row.target_logit = logits[target];
      row.target_allowed = allowed == nullptr || allowed[target] != 0;
    }
    work.state[r] = work.first == 0 ? row : merge(work.state[r], row);
  }
}

template <class A>
__global__ void __launch_bounds__(kThreads) write_block(LinearWork<A> work) {
  for (std::int64_t r = blockIdx.x; r < work.rows.count; r += gridDim.x) {
    const bool there = work.target[r] >= 0;
    const auto target = work.target[r] - work.first;
    const auto& saved = work.saved[r];
    const CrossEntropyRow<A> row{work.coefficient[r], work.target_weight == nullptr ? A(1) : work.target_weight[r],
                                 work.label_smoothing, work.z_loss,
                                 ClassSums{0, double(saved.weight), std::int64_t(saved.classes)}};
    const auto gradient = linear_gradient(row, saved, work.entropy_grad == nullptr ? A(0) : work.entropy_grad[r]);
    A* out = work.gradient + r * work.classes;
    for_classes(work.logits + r * work.classes, mask_of(work, r), work.classes,
                [&](std::int64_t first, const A(&x)[kUnrolled<A>], const auto& counts) {
#pragma unroll
                  for (int k = 0; k < kUnrolled<A>; ++k) {
                    const auto c = first + k * kThreads;
                    if (c >= work.classes) continue;
                    const A shift = x[k] - saved.softmax.max;
                    A value = fast_exp(shift) *
                              (gradient.entropy * max_or_nan(shift, A(kLowestShift)) + gradient.loss.probability);
                    if (row.label_smoothing != 0) {
                      value -= gradient.loss.smoothing * (work.weight == nullptr ? A(1) : work.weight[c]);
                    }
                    if (c == target) value -= gradient.loss.target;
                    out[c] = there && counts[k] ? value : A(0);
                  }
                });
  }
}

template <class A>
__global__ void __launch_bounds__(128) conclude_rows(LinearConclusion<A> work, std::int64_t rows) {
  const auto r = std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (r < rows) work(r);
}

// Rows by two heads are read three times, all but once from a cache.
template <class A, DivergenceKind kind>
__global__ void __launch_bounds__(kThreads) divergence_of(DivergenceWork<A> work) {
  using Class = ClassDivergence<ScalarMath<A>, kind>;
  const auto n = work.classes;
  for (std::int64_t r = blockIdx.x; r < work.rows; r += gridDim.x) {
    const A *x = work.logits + r * n, *t = work.target_logits + r * n;
    A* gradients[] = {work.gradient == nullptr ? nullptr : work.gradient + r * n,
                      work.target_gradient == nullptr ? nullptr : work.target_gradient + r * n};
    if (work.index[r] < 0) {
      if (threadIdx.x == 0) work.loss[r] = 0;
      for (A* gradient : gradients) {
        for (std::int64_t c = threadIdx.x; gradient != nullptr && c < n; c += kThreads) gradient[c] = 0;
      }
      continue;
    }
    const auto* allowed = work.class_mask == nullptr ? nullptr : work.class_mask + r * work.class_mask_stride;
    const auto softmax_of = [&](const A* logits) {
      Softmax<A> softmax;
      for_classes(logits, allowed, n,
                  [&](std::int64_t, A(&of)[kUnrolled<A>], const auto&) { softmax = add(softmax, of); });
      return reduce_block(softmax, WarpSoftmax{});
    };
    const auto softmax = softmax_of(x), target_softmax = softmax_of(t);
    DivergenceRow<A> row(softmax, target_softmax, work.beta, work.coefficient[r]);
    const auto each = [&](const auto& body) {
      for (std::int64_t c = threadIdx.x; c < n; c += kThreads) {
        const A none = -std::numeric_limits<A>::infinity();
        const bool counts = allowed == nullptr || allowed[c] != 0;
        body(c, Class((counts ? x[c] : none) - softmax.max, (counts ? t[c] : none) - target_softmax.max, row));
      }
    };
    DivergenceSums<A> sums{0, 0};
    each([&](std::int64_t, const Class& of) {
      const auto terms = of.terms(row);
      sums.target += terms.target;
      sums.input += terms.input;
    });
    row.sums = {reduce_block(sums.target, WarpSum{}), reduce_block(sums.input, WarpSum{})};
    if (threadIdx.x == 0) work.loss[r] = row.coefficient * row.template value<kind>();
    if (gradients[0] == nullptr && gradients[1] == nullptr) continue;
    each([&](std::int64_t c, const Class& of) {
      if (gradients[0] != nullptr) gradients[0][c] = of.input_gradient(row);
      if (gradients[1] != nullptr) gradients[1][c] = of.target_gradient(row);
    });
  }
}

// Elements side by side, as many as a thread takes at once.
template <class T>
struct alignas(sizeof(T) * 4 < 16 ? sizeof(T) * 4 : 16) Four {
  T values[4];
};

// Calls body(element, number of them) for fours and, at the end, fewer.
template <class Body>
__device__ __forceinline__ void for_fours(std::int64_t n, const Body& body) {
  const auto step = std::int64_t(gridDim.x) * blockDim.x * 4;
  for (auto i = (std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * 4; i < n; i += step) {
    body(i, static_cast<int>(min(n - i, std::int64_t(4))));
  }
}

template <class T>
__device__ __forceinline__ Four<T> load_four(const T* from, int size) {
  Four<T> four{};
  if (size == 4) return *reinterpret_cast<const Four<T>*>(from);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (j < size) four.values[j] = from[j];
  }
  return four;
}

template <class T>
__device__ __forceinline__ void store_four(T* to, const Four<T>& four, int size) {
  if (size == 4) {
    *reinterpret_cast<Four<T>*>(to) = four;
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j < size) to[j] = four.values[j];
    }
  }
}

template <class A>
__global__ void __launch_bounds__(256) soften_elements(A* logits, std::int64_t n, A softcap, A temperature) {
  for_fours(n, [&](std::int64_t i, int size) {
    auto x = load_four(logits + i, size);
#pragma unroll
    for (A& value : x.values) {
      if (softcap != 0) value = softcap * std::tanh(value / softcap);
      if (temperature != 1) value /= temperature;
    }
    store_four(logits + i, x, size);
  });
}

template <class T, class A>
__global__ void __launch_bounds__(256)
    harden_elements(T* to, const A* gradient, const A* logits, std::int64_t n, A softcap, A temperature) {
  const A by = 1 / temperature, tangent = softcap == 0 ? A(0) : temperature / softcap;
  for_fours(n, [&](std::int64_t i, int size) {
    const auto g = load_four(gradient + i, size);
    Four<A> x{};
    if (softcap != 0) x = load_four(logits + i, size);
    Four<T> out;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const A slope = 1 - x.values[j] * tangent * (x.values[j] * tangent);
      // What masked classes hold is nobody's.
      out.values[j] = narrow<T>(g.values[j] == 0 ? A(0) : g.values[j] * by * (slope > 0 ? slope : A(0)));
    }
    store_four(to + i, out, size);
  });
}

Launch of_rows(std::int64_t rows, int multiprocessors) { return {row_grid(rows, multiprocessors, kThreads), kThreads}; }
Launch of_fours(std::int64_t n, int multiprocessors) {
  return {row_grid(divide_up(n, 1024), multiprocessors, 256), 256};
}

}  // namespace

template <class A>
void run_linear(const LinearWork<A>& work, LinearMode mode, int multiprocessors, cudaStream_t stream) {
  if (work.rows.count == 0) return;
  launch(mode == LinearMode::Visit ? visit_block<A> : write_block<A>, of_rows(work.rows.count, multiprocessors), stream,
         work);
}

template <class A>
void conclude_linear(const LinearConclusion<A>& work, std::int64_t rows, cudaStream_t stream) {
  if (rows == 0) return;
  launch(conclude_rows<A>, {unsigned(divide_up(rows, 128)), 128}, stream, work, rows);
}

template <class A>
void run_divergence(const DivergenceWork<A>& work, DivergenceKind kind, int multiprocessors, cudaStream_t stream) {
  if (work.rows == 0) return;
  using enum DivergenceKind;
  const auto kernel = kind == Forward   ? divergence_of<A, Forward>
                      : kind == Reverse ? divergence_of<A, Reverse>
                                        : divergence_of<A, Mixture>;
  launch(kernel, of_rows(work.rows, multiprocessors), stream, work);
}

template <class A>
void soften(A* logits, std::int64_t n, A softcap, A temperature, int multiprocessors, cudaStream_t stream) {
  if (n == 0) return;
  launch(soften_elements<A>, of_fours(n, multiprocessors), stream, logits, n, softcap, temperature);
}

template <class T, class A>
void harden(T* to, const A* gradient, const A* logits, std::int64_t n, A softcap, A temperature, int multiprocessors,
            cudaStream_t stream) {
  if (n == 0) return;
  launch(harden_elements<T, A>, of_fours(n, multiprocessors), stream, to, gradient, logits, n, softcap, temperature);
}

#define INSTANTIATE(A)                                                                       \
  template void run_linear(const LinearWork<A>&, LinearMode, int, cudaStream_t);             \
  template void conclude_linear(const LinearConclusion<A>&, std::int64_t, cudaStream_t);     \
  template void run_divergence(const DivergenceWork<A>&, DivergenceKind, int, cudaStream_t); \
  template void soften(A*, std::int64_t, A, A, int, cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

#define INSTANTIATE(T, A) template void harden(T*, const A*, const A*, std::int64_t, A, A, int, cudaStream_t);
MASKED_LOSS_EACH_DTYPE(INSTANTIATE)
#undef INSTANTIATE

}  // namespace masked_loss::cuda
