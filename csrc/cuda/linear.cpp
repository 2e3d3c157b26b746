#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

#include <cmath>

#include "common/linear_engine.h"
#include "cuda/cross_entropy.h"
#include "cuda/dispatch.h"
#include "cuda/linear_kernel.h"

namespace masked_loss::cuda {
namespace {

class Backend : public LinearBackend {
 public:
  explicit Backend(const Tensor& input) : on_(input) {}

  LinearKept keep(const RowArguments& arguments, Reduction reduction, const OptionalTensor& normalizer,
                  std::optional<std::int64_t> max_kept, at::ScalarType wide) const override {
    LinearKept kept;
    dispatch_wide(wide, [&](auto a) {
      using A = decltype(a);
      const RowView<A> view(arguments);
      const auto plan = make_row_plan(view,
                                      {.reduction = reduction,
                                       .normalizer = normalizer,
                                       .order = true,
                                       .upstream = std::nullopt,
                                       .loss = {},
                                       .softmax = {}},
                                      on_.device());
      const auto count = view.rows.count;
      const bool bounded = max_kept || is_capturing();
      // The one place where the library waits for the device.
      const auto bound = std::min(max_kept.value_or(count), count);
      // One at least, to show that a bound of 0 does not hold.
      const auto n = bounded      ? std::min(std::max<std::int64_t>(bound, 1), count)
                     : count == 0 ? count
                                  : plan.kept.template item<std::int64_t>();
      const auto rows = plan.order.narrow(0, 0, n);
      kept = {rows, plan.index.index_select(0, rows), plan.coefficient.index_select(0, rows), {}, false};
      // A divisor of 0 has dropped rows that were kept.
      if (bounded || reduction != Reduction::None) kept.valid = kept.target.ge(0);
      if (bounded && bound < count) check_bound(arguments.op, plan.kept, bound, kept.coefficient);
    });
    return kept;
  }

  Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) const override {
    return at::empty(sizes, options);
  }

  Tensor sum(const Tensor& losses) const override {
    Tensor total;
    dispatch_wide(losses.scalar_type(), [&](auto a) { total = sum_of_losses<decltype(a)>(losses, on_.device()); });
    return total;
  }

  Tensor losses(const LinearBlock& block) const override {
    auto loss = at::zeros_like(block.coefficient);
    dispatch_wide(block.logits.scalar_type(), [&](auto a) {
      using A = decltype(a);
      auto work = make_cross_entropy_work<A>(block);
      const auto mode = work.gradient == nullptr ? CrossEntropyMode::Forward : CrossEntropyMode::ForwardGrad;
      CrossEntropyRun<A> run(work, mode, on_.device());
      const auto rows = work.rows.count;
      RowPlan<A> plan{block.target, block.coefficient, {}, {}};
      if (run.lists_rows()) {
        plan.order = at::arange(rows, block.target.options());
        plan.kept = at::full({1}, rows, block.target.options());
      }
      run(plan, loss, {});
    });
    return loss;
  }

  void visit(const LinearBlock& block, const Tensor& states) const override {
    dispatch_wide(block.logits.scalar_type(),
                  [&](auto a) { run(make_linear_work<decltype(a)>(block, states), LinearMode::Visit); });
  }

  std::tuple<Tensor, Tensor, Tensor> conclude(const LinearBlock& rows, const Tensor& weight,
                                              const Tensor& states) const override {
    const auto count = rows.target.size(0);
    auto loss = at::empty_like(rows.coefficient), entropy = at::empty_like(rows.coefficient);
    auto saved = at::empty({count, kLinearState}, loss.options());
    dispatch_wide(loss.scalar_type(), [&](auto a) {
      const auto work = make_conclusion<decltype(a)>(rows, weight, states, loss, entropy, saved);
      conclude_linear(work, count, on_.device().stream);
    });
    return {loss, entropy, saved};
  }

  void write(const LinearBlock& block, const Tensor& weight, const Tensor& saved,
             const Tensor& entropy_grad) const override {
    dispatch_wide(block.logits.scalar_type(), [&](auto a) {
      run(make_linear_work<decltype(a)>(block, weight, saved, entropy_grad), LinearMode::Write);
    });
  }

  Tensor divergence(const LinearPair& pair) const override {
    auto loss = at::empty_like(pair.coefficient);
    dispatch_wide(pair.logits.scalar_type(), [&](auto a) {
      const auto work = make_divergence_work<decltype(a)>(pair, loss);
      const auto device = on_.device();
      with_divergence(pair.kind, pair.beta,
                      [&](auto kind) { run_divergence(work, kind(), device.multiprocessors, device.stream); });
    });
    return loss;
  }

  void soften(const Tensor& logits, double softcap, double temperature) const override {
    dispatch_wide(logits.scalar_type(), [&](auto a) {
      using A = decltype(a);
      const auto device = on_.device();
      cuda::soften(data_of<A>(logits), logits.numel(), static_cast<A>(softcap), static_cast<A>(temperature),
                   device.multiprocessors, device.stream);
    });
  }

  void harden(const Tensor& to, const Tensor& gradient, const Tensor& logits, double softcap,
              double temperature) const override {
    dispatch(to.scalar_type(), [&](auto t, auto a) {
      using T = decltype(t);
      using A = decltype(a);
      const auto device = on_.device();
      cuda::harden(static_cast<T*>(to.mutable_data_ptr()), data_of<A>(gradient), data_of<A>(logits), to.numel(),
                   static_cast<A>(softcap), static_cast<A>(temperature), device.multiprocessors, device.stream);
    });
  }

 private:
  // More rows than the bound give NaN, or an error where values are checked.
  static void check_bound(const char* op, const Tensor& kept, std::int64_t n, Tensor& coefficient) {
    if (checks_values() && !is_capturing()) {
      const auto found = kept.item<std::int64_t>();
      TORCH_CHECK_VALUE(found <= n, op, ": expected max_kept of at least the number of unmasked positions, ", found,
                        ", got ", n);
    }
    coefficient = at::where(kept.gt(n), at::full_like(coefficient, std::nan("")), coefficient);
  }

  template <class A>
  void run(const LinearWork<A>& work, LinearMode mode) const {
    const auto device = on_.device();
    run_linear(work, mode, device.multiprocessors, device.stream);
  }

  const OnDevice on_;
};

}  // namespace

MASKED_LOSS_CUDA_IMPL(m) { LinearOps<Backend>::implement(m); }

}  // namespace masked_loss::cuda
