#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "common/linear_engine.h"
#include "cpu/cross_entropy.h"
#include "cpu/huge_pages.h"
#include "cpu/linear_kernel.h"
#include "cpu/row_plan.h"

namespace masked_loss::cpu {
namespace {

constexpr std::int64_t kElementsPerTask = 1 << 16;

const LinearKernels& kernels() {
  static const auto& picked = MASKED_LOSS_PICK(linear_kernels);
  return picked;
}

class Backend : public LinearBackend {
 public:
  explicit Backend(const Tensor&) {}

  LinearKept keep(const RowArguments& arguments, Reduction reduction, const OptionalTensor& normalizer,
                  std::optional<std::int64_t> max_kept, at::ScalarType wide) const override {
    LinearKept kept;
    dispatch_wide(wide, [&](auto a) {
      using A = decltype(a);
      const RowView<A> view(arguments);
      const RowPlan<A> plan(view, reduction, normalizer);
      const auto count = view.rows.count;
      const auto options_of = arguments.target.options();
      auto rows = at::empty({count}, options_of.dtype(at::kLong)), target = at::empty({count}, rows.options());
      auto coefficient = at::empty({count}, options_of.dtype(c10::CppTypeToScalarType<A>::value));
      auto* row = rows.template mutable_data_ptr<std::int64_t>();
      auto* index = target.template mutable_data_ptr<std::int64_t>();
      auto* factor = coefficient.template mutable_data_ptr<A>();
      plan(0, count, index, factor);
      std::int64_t n = 0;
      for (std::int64_t r = 0; r < count; ++r) {
        if (index[r] < 0) continue;
        row[n] = r, index[n] = index[r], factor[n] = factor[r];
        ++n;
      }
      TORCH_CHECK_VALUE(n <= max_kept.value_or(n), arguments.op,
                        ": expected max_kept of at least the number of unmasked positions, ", n, ", got ",
                        max_kept.value_or(n));
      kept = {rows.narrow(0, 0, n), target.narrow(0, 0, n), coefficient.narrow(0, 0, n), {}, n == count};
    });
    return kept;
  }

  Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) const override {
    return empty_output(sizes, c10::typeMetaToScalarType(options.dtype()));
  }

  Tensor sum(const Tensor& losses) const override {
    auto total = at::empty({}, losses.options());
    dispatch_wide(losses.scalar_type(), [&](auto a) {
      using A = decltype(a);
      *total.template mutable_data_ptr<A>() =
          static_cast<A>(cpu::sum(losses.template const_data_ptr<A>(), losses.numel()));
    });
    return total;
  }

  Tensor losses(const LinearBlock& block) const override {
    auto loss = at::empty_like(block.coefficient);
    dispatch_wide(block.logits.scalar_type(), [&](auto a) {
      using A = decltype(a);
      auto work = make_cross_entropy_work<A>(block);
      work.loss = data_of<A>(loss);
      const auto* target = data_of<std::int64_t>(block.target);
      const auto* factor = data_of<A>(block.coefficient);
      const auto mode = work.gradient == nullptr ? CrossEntropyMode::Forward : CrossEntropyMode::ForwardGrad;
      run_cross_entropy(work, mode, [&](auto begin, auto end, std::int64_t* index, A* coefficient) {
        std::copy(target + begin, target + end, index);
        std::copy(factor + begin, factor + end, coefficient);
      });
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
      for (std::int64_t r = 0; r < count; ++r) work(r);
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
      using A = decltype(a);
      const auto work = make_divergence_work<A>(pair, loss);
      with_divergence(pair.kind, pair.beta, [&](auto kind) {
        const auto run = kernels().of<A>().divergence[static_cast<int>(kind())];
        const auto grain = std::max<std::int64_t>(1, kElementsPerTask / std::max<std::int64_t>(1, work.classes));
        at::parallel_for(0, work.rows, grain, [&](auto begin, auto end) { run(work, begin, end); });
      });
    });
    return loss;
  }

  void soften(const Tensor& logits, double softcap, double temperature) const override {
    dispatch_wide(logits.scalar_type(), [&](auto a) {
      using A = decltype(a);
      auto* x = logits.template mutable_data_ptr<A>();
      at::parallel_for(0, logits.numel(), kElementsPerTask, [&](std::int64_t begin, std::int64_t end) {
        kernels().of<A>().soften(x + begin, end - begin, static_cast<A>(softcap), static_cast<A>(temperature));
      });
    });
  }

  void harden(const Tensor& to, const Tensor& gradient, const Tensor& logits, double softcap,
              double temperature) const override {
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, to.scalar_type(), "linear_cross_entropy", [&] {
      using A = Accumulation<scalar_t>;
      auto* out = to.mutable_data_ptr<scalar_t>();
      const auto *g = gradient.const_data_ptr<A>(), *x = logits.const_data_ptr<A>();
      at::parallel_for(0, gradient.numel(), kElementsPerTask, [&](std::int64_t begin, std::int64_t end) {
        kernels().harden.of<scalar_t>()(out + begin, g + begin, x + begin, end - begin, static_cast<A>(softcap),
                                        static_cast<A>(temperature));
      });
    });
  }

 private:
  template <class A>
  static void run(const LinearWork<A>& work, LinearMode mode) {
    const RowDriver driver(kernels().of<A>().rows, work, mode, work.rows.count);
    driver([&] { return [&](auto, auto, auto, const auto& run) { run(work); }; });
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(masked_loss, CPU, m) { LinearOps<Backend>::implement(m); }

}  // namespace masked_loss::cpu
