// Compiled once for every instruction set: whatever is not in an anonymous namespace or always inline could end up as
// one copy for all of them.
#include "cpu/cross_entropy_kernel.h"

#include "cpu/cross_entropy_rows.h"
#include "cpu/cross_entropy_tiles.h"

namespace masked_loss::cpu::CPU_CAPABILITY {
namespace {

constexpr std::int64_t kSmallClasses = 64;  // up to here, rows are computed beside one another in vectors

template <class T, class A>
bool by_rows(const CrossEntropyWork<T, A>& work) {
  return work.classes > kSmallClasses && work.logits_stride == 1 &&
         (work.gradient == nullptr || work.gradient_stride == 1) &&
         (work.probabilities == nullptr || work.probabilities_stride == 1) &&
         (work.class_mask == nullptr || work.class_mask_stride == 1);
}

// The scratch memory of rows: what is known of the blocks, and a row; each begins a cache line.
template <class A>
std::int64_t blocks_size(std::int64_t classes) {
  const auto blocks = (classes + kBlock - 1) / kBlock;
  return (blocks * static_cast<std::int64_t>(sizeof(CrossEntropyBlock<A>)) + 63) / 64 * (64 / sizeof(A));
}

// Calls run(constant) with the mode as a constant.
template <class Run>
auto with_mode(CrossEntropyMode mode, const Run& run) {
  using enum CrossEntropyMode;
  switch (mode) {
    case Forward: return run(std::integral_constant<CrossEntropyMode, Forward>());
    case ForwardGrad: return run(std::integral_constant<CrossEntropyMode, ForwardGrad>());
    default: return run(std::integral_constant<CrossEntropyMode, Backward>());
  }
}

template <class T, class A>
void run(const CrossEntropyWork<T, A>& work, CrossEntropyMode mode, std::int64_t begin, std::int64_t end, A* scratch) {
  with_mode(mode, [&](auto m) {
    if (by_rows(work)) {
      using Kernel = RowKernel<T, A, m()>;
      const auto count = (work.classes + kBlock - 1) / kBlock;
      A* aligned = next_line(scratch);
      auto* blocks = reinterpret_cast<CrossEntropyBlock<A>*>(aligned);
      A* row = Kernel::keeps_row(work) ? aligned + blocks_size<A>(work.classes) : nullptr;
      for (auto r = begin; r < end; ++r) {
        const Kernel kernel(work, begin, r, row);
        if (m() != CrossEntropyMode::Backward) kernel.visit(0, count, blocks);
        kernel.finish(0, count, blocks, kernel.conclude(blocks));
      }
    } else {
      TileKernel<T, A, m()>(work, scratch)(begin, end);
    }
    finish_stores();
  });
}

template <class T, class A>
std::int64_t scratch_size(const CrossEntropyWork<T, A>& work, CrossEntropyMode mode) {
  return with_mode(mode, [&](auto m) {
    if (!by_rows(work)) return TileKernel<T, A, m()>::scratch_size(work);
    return 64 / std::int64_t(sizeof(A)) + blocks_size<A>(work.classes) +
           (RowKernel<T, A, m()>::keeps_row(work) ? work.classes : 0);
  });
}

template <class T, class A>
std::int64_t rows_at_once(const CrossEntropyWork<T, A>& work) {
  return by_rows(work) ? 1 : TileKernel<T, A, CrossEntropyMode::Forward>::lanes(work);
}

template <class T, class A>
void visit(const CrossEntropyWork<T, A>& work, CrossEntropyMode mode, std::int64_t row, std::int64_t begin,
           std::int64_t end, CrossEntropyBlock<A>* blocks) {
  with_mode(mode, [&](auto m) { RowKernel<T, A, m()>(work, 0, row, nullptr).visit(begin, end, blocks); });
}

template <class T, class A>
CrossEntropyEnd<A> conclude(const CrossEntropyWork<T, A>& work, CrossEntropyMode mode, std::int64_t row,
                            const CrossEntropyBlock<A>* blocks) {
  return with_mode(mode, [&](auto m) { return RowKernel<T, A, m()>(work, 0, row, nullptr).conclude(blocks); });
}

template <class T, class A>
void finish(const CrossEntropyWork<T, A>& work, CrossEntropyMode mode, std::int64_t row, std::int64_t begin,
            std::int64_t end, const CrossEntropyBlock<A>* blocks, const CrossEntropyEnd<A>& row_end) {
  with_mode(mode, [&](auto m) { RowKernel<T, A, m()>(work, 0, row, nullptr).finish(begin, end, blocks, row_end); });
  finish_stores();
}

template <class T, class A>
void scale(T* to, const T* from, std::int64_t n, A by) {
  using V = Vectorized<A>;
  A stage[kBlock];
  for (std::int64_t begin = 0; begin < n; begin += kBlock) {
    const auto count = std::min(kBlock, n - begin);
    for_vectors<A>(from + begin, count, [&](V v, std::int64_t i, std::int64_t lanes) {
      // Where zero times the factor would not be +0: an infinite or a negative one.
      V::blendv(v * V(by), V(0), v == V(0)).store(stage + i, lanes);
    });
    store_vectors<false, A>(to + begin, count,
                            [&](std::int64_t i, std::int64_t lanes) { return V::loadu(stage + i, lanes); });
  }
}

template <class T, class A>
constexpr CrossEntropyKernel<T, A> kernel{run<T, A>,   scratch_size<T, A>, rows_at_once<T, A>, by_rows<T, A>,
                                          visit<T, A>, conclude<T, A>,     finish<T, A>,       scale<T, A>};

}  // namespace

const CrossEntropyKernels& cross_entropy_kernels() {
  static constexpr CrossEntropyKernels kernels{kernel<float, float>, kernel<double, double>,
                                               kernel<at::BFloat16, float>, kernel<at::Half, float>};
  return kernels;
}

}  // namespace masked_loss::cpu::CPU_CAPABILITY
