#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "common/softmax_operands.h"
#include "cuda/dispatch.h"
#include "cuda/softmax_kernel.h"
#include "cuda/stream.h"

namespace masked_loss::cuda {
namespace {

struct Backend {
  static Tensor output(const Tensor& like) { return at::empty_like(like); }

  static void run(SoftmaxPass pass, const SoftmaxOperands& operands) {
    const OnDevice on(operands.input);
    const auto device = on.device();
    dispatch(operands.input.scalar_type(), [&](auto t, auto a) {
      const auto work = operands.work<decltype(t), decltype(a)>();
      auto facts = softmax_facts(work);
      facts.ring_blocks = softmax_ring_blocks(work, pass);
      const auto regime = pick_softmax_regime(pass, facts, device.multiprocessors);
      Tensor parts;
      if (regime.slices > 1) {
        const auto bytes = facts.rows * regime.slices * kSoftmaxPartBytes<decltype(a)>;
        parts = at::empty({bytes}, operands.input.options().dtype(at::kByte));
      }
      run_softmax(work, pass, regime, parts.defined() ? parts.mutable_data_ptr() : nullptr, device.multiprocessors,
                  device.stream);
    });
  }
};

}  // namespace

MASKED_LOSS_CUDA_IMPL(m) { SoftmaxInnerOps<Backend>::implement(m); }

}  // namespace masked_loss::cuda
