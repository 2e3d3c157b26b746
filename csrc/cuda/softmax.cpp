#include <ATen/ops/empty_like.h>

#include "common/softmax_operands.h"
#include "cuda/dispatch.h"
#include "cuda/softmax_kernel.h"
#include "cuda/stream.h"

namespace masked_loss::cuda {
namespace {

// Whether rows are contiguous in all operands with elements.
template <class T, class A>
bool contiguous_rows(const SoftmaxWork<T, A>& work) {
  const auto& rows = work.rows;
  const void* operands[] = {work.input, work.result, nullptr, work.grad};
  for (int k = 0; k < 4; ++k) {
    if (operands[k] != nullptr && (rows.dims == 0 || rows.strides[k][rows.dims - 1] != 1)) return false;
  }
  return true;
}

struct Backend {
  static Tensor output(const Tensor& like) { return at::empty_like(like); }

  static void run(SoftmaxPass pass, const SoftmaxOperands& operands) {
    const OnDevice on(operands.input);
    const auto device = on.device();
    dispatch(operands.input.scalar_type(), [&](auto t, auto a) {
      const auto work = operands.work<decltype(t), decltype(a)>();
      const bool contiguous_classes = work.input_stride == 1 && work.grad_stride == 1 && work.result_stride == 1 &&
                                      (work.mask_stride == 0 || work.mask_stride == 1);
      const auto regime =
          pick_softmax_regime(pass, work.rows.count, work.classes, sizeof(t), contiguous_classes, contiguous_rows(work),
                              softmax_ring_blocks(work, pass), device.multiprocessors);
      run_softmax(work, pass, regime, device.multiprocessors, device.stream);
    });
  }
};

}  // namespace

MASKED_LOSS_CUDA_IMPL(m) { SoftmaxInnerOps<Backend>::implement(m); }

}  // namespace masked_loss::cuda
