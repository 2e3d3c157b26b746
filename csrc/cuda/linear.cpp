#include <ATen/TensorOperators.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <cmath>
#include <limits>

#include "common/linear_engine.h"
#include "cuda/cross_entropy.h"

namespace masked_loss::cuda {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

template <class Body>
void dispatch_wide(at::ScalarType type, const Body& body) {
  type == at::kDouble ? body(double{}) : body(float{});
}

Tensor zero(const Tensor& like) { return at::zeros_like(like); }

// The columns of the states of rows, in double.
enum Column { kMax, kSum, kWeighted, kTargetLogit, kTargetAllowed, kLogits, kWeight, kClasses, kColumns };

// Whole rows by the kernels of cross entropy; blocks of classes in torch's ops.
class Backend : public LinearBackend {
 public:
  explicit Backend(const Tensor& input) : on_(input) {}

  LinearKept keep(const RowArguments& arguments, const LinearCrossEntropyOptions& options,
                  at::ScalarType wide) const override {
    LinearKept kept;
    dispatch_wide(wide, [&](auto a) {
      using A = decltype(a);
      const RowView<A> view(arguments);
      const auto plan = make_row_plan(view,
                                      {.reduction = options.reduction,
                                       .normalizer = options.normalizer,
                                       .order = true,
                                       .upstream = std::nullopt,
                                       .loss = {},
                                       .softmax = {}},
                                      on_.device());
      const auto count = view.rows.count;
      const bool bounded = options.max_kept || is_capturing();
      // The one place where the library waits for the device.
      const auto n = bounded      ? std::min(options.max_kept.value_or(count), count)
                     : count == 0 ? count
                                  : plan.kept.template item<std::int64_t>();
      const auto rows = plan.order.narrow(0, 0, n);
      kept = {rows, plan.index.index_select(0, rows), plan.coefficient.index_select(0, rows), {}, false};
      // A divisor of 0 has dropped rows that were kept.
      if (bounded || options.reduction != Reduction::None) kept.valid = kept.target.ge(0);
      if (bounded && n < count) check_bound(arguments.op, plan.kept, n, kept.coefficient);
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

  Tensor new_states(std::int64_t rows, const at::TensorOptions& options) const override {
    auto states = at::zeros({kColumns, rows}, options.dtype(at::kDouble));
    states[kMax].fill_(std::numeric_limits<double>::lowest());
    return states;
  }

  void visit(const LinearBlock& block, const Tensor& states) const override {
    const auto z = allowed_or(block, block.logits, -kInfinity);
    const auto before = states[kMax].clone(), sum_before = states[kSum].clone();
    const auto max = at::maximum(before, z.amax(-1).to(at::kDouble));
    const auto shift = z - max.to(z.scalar_type()).unsqueeze(-1);
    const auto exponentials = shift.exp();
    const auto moved = before - max;
    const auto none = sum_before.eq(0);
    const auto old_sum = at::where(none, zero(max), sum_before * moved.exp());
    const auto old_weighted = at::where(none, zero(max), moved.exp() * (states[kWeighted] + sum_before * moved));
    states[kMax].copy_(max);
    states[kSum].copy_(old_sum + exponentials.sum(-1));
    states[kWeighted].copy_(old_weighted + (exponentials * shift.clamp_min(kLowestShift)).sum(-1));
    const auto [here, index] = targets_in(block);
    const auto logit = z.gather(-1, index).squeeze(-1).to(at::kDouble);
    states[kTargetLogit].add_(at::where(here, logit, zero(logit)));
    const auto allowed = here.logical_and(allowed_or(block, at::ones_like(z), 0).gather(-1, index).squeeze(-1).ne(0));
    states[kTargetAllowed].add_(allowed.to(at::kDouble));
    if (block.label_smoothing == 0) return;
    const auto weight = allowed_or(block, weights(block), 0);
    states[kLogits].add_((at::where(weight.eq(0), zero(z), z) * weight).sum(-1, false, at::kDouble));
    states[kWeight].add_(weight.sum(-1, false, at::kDouble));
    states[kClasses].add_(allowed_or(block, at::ones_like(z), 0).sum(-1, false, at::kDouble));
  }

  std::tuple<Tensor, Tensor, Tensor> conclude(const LinearBlock& rows, const Tensor& weight,
                                              const Tensor& states) const override {
    const auto type = rows.coefficient.scalar_type();
    const auto max = states[kMax], sum = states[kSum], log_sum = sum.log(), mean = states[kWeighted] / sum;
    const auto lse = max + log_sum;
    const auto of_target = weight.defined() ? weight.to(at::kDouble) : at::ones_like(max);
    auto loss = (1 - rows.label_smoothing) * of_target * (log_sum - (states[kTargetLogit] - max));
    if (rows.label_smoothing != 0) {
      const auto costs = states[kWeight] * max - states[kLogits] + states[kWeight] * log_sum;
      loss = loss + rows.label_smoothing / states[kClasses] * costs;
    }
    if (rows.z_loss != 0) loss = loss + rows.z_loss * of_target * lse * lse;
    loss = at::where(states[kTargetAllowed].eq(0), at::full_like(loss, kInfinity), loss);
    loss = (loss * rows.coefficient).to(type);
    auto entropy = (log_sum - mean).to(type);
    entropy = at::where(rows.coefficient.isnan(), rows.coefficient, entropy);
    auto saved = at::stack({max, sum, mean, states[kClasses], states[kWeight]}, -1).to(type);
    if (rows.valid.defined()) {
      loss = at::where(rows.valid, loss, zero(loss));
      entropy = at::where(rows.valid, entropy, zero(entropy));
    }
    return {loss, entropy, saved};
  }

  void write(const LinearBlock& block, const Tensor& weight, const Tensor& saved,
             const Tensor& entropy_grad) const override {
    const auto column = [&](std::int64_t i) { return saved.select(1, i).unsqueeze(-1); };
    const auto max = column(0), sum = column(1), mean = column(2), classes = column(3), of_classes = column(4);
    const auto coefficient = block.coefficient.unsqueeze(-1);
    const auto of_target = weight.defined() ? weight.unsqueeze(-1) : at::ones_like(max);
    const double smoothing = block.label_smoothing;
    auto probability = (1 - smoothing) * of_target;
    if (smoothing != 0) probability = probability + smoothing / classes * of_classes;
    if (block.z_loss != 0) probability = probability + 2 * block.z_loss * of_target * (max + sum.log());
    probability = coefficient * probability;
    const auto shift = allowed_or(block, block.logits, -kInfinity) - max;
    Tensor factor = probability;
    if (entropy_grad.defined()) {
      factor = probability - entropy_grad.unsqueeze(-1) * (shift.clamp_min(kLowestShift) - mean);
    }
    auto gradient = shift.exp() / sum * factor;
    if (smoothing != 0) gradient = gradient - coefficient * (smoothing / classes) * weights(block);
    const auto [here, index] = targets_in(block);
    const auto less = at::where(here, (1 - smoothing) * (coefficient * of_target).squeeze(-1), zero(block.coefficient));
    gradient = gradient.scatter_add(-1, index, less.neg().unsqueeze(-1).to(gradient.scalar_type()));
    gradient = allowed_or(block, gradient, 0);
    if (block.valid.defined()) gradient = at::where(block.valid.unsqueeze(-1), gradient, zero(gradient));
    block.gradient.copy_(gradient);
  }

  void soften(const Tensor& logits, double softcap, double temperature) const override {
    if (softcap != 0) logits.div_(softcap).tanh_().mul_(softcap);
    if (temperature != 1) logits.div_(temperature);
  }

  void harden(const Tensor& to, const Tensor& gradient, const Tensor& logits, double softcap,
              double temperature) const override {
    if (softcap == 0) {
      to.copy_(temperature == 1 ? gradient : gradient / temperature);
      return;
    }
    const auto derivative = (1 - (logits * (temperature / softcap)).square()).clamp_min(0) / temperature;
    // What masked classes hold is nobody's.
    to.copy_(at::where(gradient.eq(0), zero(gradient), gradient * derivative));
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

  static Tensor allowed_or(const LinearBlock& block, const Tensor& values, double other) {
    if (!block.class_mask.defined()) return values;
    return at::where(block.class_mask.ne(0), values, at::full({}, other, values.options()));
  }

  static Tensor weights(const LinearBlock& block) {
    return block.weight.defined() ? block.weight.expand_as(block.logits) : at::ones_like(block.logits);
  }

  // Whether a block has the target of a row, and where, [R, 1].
  static std::pair<Tensor, Tensor> targets_in(const LinearBlock& block) {
    const auto at = block.target - block.first;
    const auto here = at.ge(0).logical_and(at.lt(block.logits.size(1)));
    return {here, at::where(here, at, zero(at)).unsqueeze(-1)};
  }

  const OnDevice on_;
};

}  // namespace

MASKED_LOSS_CUDA_IMPL(m) { LinearOps<Backend>::implement(m); }

}  // namespace masked_loss::cuda
