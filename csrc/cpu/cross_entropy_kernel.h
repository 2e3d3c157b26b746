#pragma once

#include <cstdint>

#include "common/cross_entropy.h"
#include "cpu/capability.h"
#include "cpu/kernel_table.h"

namespace masked_loss::cpu {

// Classes of a row that are visited together.
inline constexpr std::int64_t kBlock = 2048;

// What is known of a block once it has been visited.
template <class A>
struct CrossEntropyBlock {
  Softmax<A> softmax;
  ClassSums smoothing, target;  // the latter of class probabilities
};

// What the gradient of a row is made from, once all of its blocks have been visited.
template <class A>
struct CrossEntropyEnd {
  Softmax<A> softmax;
  CrossEntropyGradient<A> terms;
};

template <class T, class A>
struct CrossEntropyKernel {
  using Work = CrossEntropyWork<T, A>;

  // Works on the rows [begin, end); `scratch` holds scratch_size(work, mode) elements. Of the work, index, coefficient
  // and loss are those of these rows alone; in the steps below, of all rows.
  void (*run)(const Work& work, CrossEntropyMode mode, std::int64_t begin, std::int64_t end, A* scratch);
  std::int64_t (*scratch_size)(const Work& work, CrossEntropyMode mode);
  std::int64_t (*rows_at_once)(const Work& work);  // of which there should be whole multiples in [begin, end)

  // The same in steps, for a row whose blocks several threads share: blocks [begin, end) are visited (forward), what
  // they amount to is concluded, and they are finished (where a gradient is asked for).
  bool (*in_blocks)(const Work& work);  // whether its rows can be had so
  void (*visit)(const Work& work, CrossEntropyMode mode, std::int64_t row, std::int64_t begin, std::int64_t end,
                CrossEntropyBlock<A>* blocks);
  CrossEntropyEnd<A> (*conclude)(const Work& work, CrossEntropyMode mode, std::int64_t row,
                                 const CrossEntropyBlock<A>* blocks);
  void (*finish)(const Work& work, CrossEntropyMode mode, std::int64_t row, std::int64_t begin, std::int64_t end,
                 const CrossEntropyBlock<A>* blocks, const CrossEntropyEnd<A>& row_end);

  // to = from * by, but a zero stays +0 whatever the factor; `to` may be `from`
  void (*scale)(T* to, const T* from, std::int64_t n, A by);
};

using CrossEntropyKernels = KernelTable<CrossEntropyKernel<float, float>, CrossEntropyKernel<double, double>,
                                        CrossEntropyKernel<at::BFloat16, float>, CrossEntropyKernel<at::Half, float>>;

MASKED_LOSS_KERNELS(const CrossEntropyKernels& cross_entropy_kernels());

}  // namespace masked_loss::cpu
