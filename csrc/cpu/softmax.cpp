#include <ATen/Dispatch.h>

#include "common/host_device.h"
#include "common/softmax_operands.h"
#include "cpu/huge_pages.h"
#include "cpu/row_driver.h"
#include "cpu/softmax_kernel.h"

namespace masked_loss::cpu {
namespace {

template <class T, class A>
void run(const SoftmaxWork<T, A>& work, SoftmaxPass pass) {
  static const auto& kernels = MASKED_LOSS_PICK(softmax_kernels);
  const RowDriver driver(kernels.of<T>(), work, pass, work.rows.count);
  driver([&] { return [&](std::int64_t, std::int64_t, std::int64_t, const auto& run) { run(work); }; });
}

struct Backend {
  static Tensor output(const Tensor& like) { return empty_output(like); }

  static void run(SoftmaxPass pass, const SoftmaxOperands& operands) {
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, operands.input.scalar_type(), "softmax",
                                    [&] { cpu::run(operands.work<scalar_t, Accumulation<scalar_t>>(), pass); });
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(masked_loss, CPU, m) { SoftmaxInnerOps<Backend>::implement(m); }

}  // namespace masked_loss::cpu
