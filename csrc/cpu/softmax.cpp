#include <ATen/Dispatch.h>
#include <c10/util/SmallBuffer.h>

#include "common/host_device.h"
#include "common/huge_pages.h"
#include "common/softmax_inner.h"
#include "cpu/parallel.h"
#include "cpu/softmax_kernel.h"

namespace masked_loss::cpu {
namespace {

constexpr std::int64_t kElementsPerTask = 1 << 16;

template <class T, class A>
void run(const SoftmaxWork<T, A>& work, SoftmaxPass pass) {
  static const auto& kernels = MASKED_LOSS_PICK(softmax_kernels);
  const auto& kernel = kernels.of<T>();
  const auto rows = work.rows.count, at_once = kernel.rows_at_once(work, pass);
  const auto elements_at_once = std::max<std::int64_t>(1, at_once * work.classes);
  const auto chunk = at_once * std::max<std::int64_t>(1, kElementsPerTask / elements_at_once);
  run_tasks(divide_up(rows, chunk), [&] {
    constexpr std::int64_t line = 64;
    c10::SmallBuffer<char, 4096> memory(kernel.scratch_size(work, pass) + line);
    return [&work, pass, chunk, rows, &kernel, memory = std::move(memory)](std::int64_t task) mutable {
      auto* scratch = reinterpret_cast<char*>(divide_up(reinterpret_cast<std::intptr_t>(memory.data()), line) * line);
      kernel.run(work, pass, task * chunk, std::min(rows, (task + 1) * chunk), scratch);
    };
  });
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
