#include <ATen/ops/empty.h>
#include <ATen/ops/isnan.h>
#include <ATen/ops/nonzero.h>
#include <ATen/ops/take.h>

#include "common/pointwise_operands.h"
#include "cuda/dispatch.h"
#include "cuda/operands.h"
#include "cuda/pointwise_kernel.h"
#include "cuda/stream.h"

namespace masked_loss::cuda {
namespace {

void make_walkable(PointwiseCall& call) {
  const at::DimVector shape(call.input.sizes());
  for (Tensor* tensor : {&call.input, &call.target}) *tensor = walkable(*tensor, shape);
  for (OptionalTensor* tensor : {&call.other, &call.mask, &call.options.weight, &call.options.sample_weight}) {
    if (*tensor) *tensor = walkable(**tensor, shape);
  }
}

// What losses are divided by; undefined for 1.
template <class A>
Tensor divisor_of(PointwiseOperands<A>& operands, const PointwiseOptions& options, const Tensor& input,
                  const Device& device) {
  const auto reduction = options.reduction;
  if (reduction == Reduction::None || reduction == Reduction::Sum || operands.work.count == 0) return {};
  const bool shares = reduction == Reduction::SequenceMean;
  Weighing<A> weighing{};
  weighing.by_sequence = reduction != Reduction::Mean;
  const auto count = operands.count(weighing.by_sequence);
  weighing.times = count.times;
  if (shares || !options.normalizer) {
    weighing.sequences = count.sequences;
    weighing.length = count.work.count / count.sequences;
  }
  const auto numbers = input.options().dtype(at::kDouble);
  Tensor normalizer;
  if (options.normalizer) {
    normalizer = options.normalizer->to(at::kDouble);
    if (checks_values() && !is_capturing()) {
      check_normalizer_value(pointwise_traits(options.loss).name, normalizer.item<double>());
    }
    weighing.normalizer = normalizer.const_data_ptr<double>();
  }
  if (shares) {
    operands.set_shares(at::empty({count.sequences}, numbers.dtype(accumulation_type(input.scalar_type()))));
    weighing.shares = operands.shares.template mutable_data_ptr<A>();
  }
  const auto parts = at::empty({kMaxParts * 2}, numbers), divisor = at::empty({2}, numbers);
  weighing.parts = reinterpret_cast<PointwiseSum*>(parts.mutable_data_ptr<double>());
  weighing.divisor = reinterpret_cast<PointwiseDivisor*>(divisor.mutable_data_ptr<double>());
  find_divisor(count.work, weighing, device.stream);
  return divisor;
}

struct Results {
  Tensor loss, gradient, other_gradient;
};

// `grad`: what arrives from upstream at the losses, of their shape or 0-d.
Results compute(PointwiseCall call, bool with_gradient, const Tensor* grad) {
  make_walkable(call);
  const auto& [op, input, target, other, mask, options, dtype] = call;
  const OnDevice on(input);
  const auto device = on.device();
  const auto sizes = input.sizes();
  const bool both = pointwise_traits(options.loss).has_other_slope, each = options.reduction == Reduction::None;
  Results results;
  if (grad == nullptr) {
    results.loss =
        at::empty(each ? sizes : at::IntArrayRef(), input.options().dtype(accumulation_type(input.scalar_type())));
  }
  if (with_gradient) {
    results.gradient = at::empty(sizes, input.options());
    results.other_gradient = at::empty(both ? sizes : at::IntArrayRef({0}), input.options());
  }
  dispatch(input.scalar_type(), [&](auto t, auto a) {
    using A = decltype(a);
    PointwiseOperands<A> operands(input, target, other, mask, options);
    auto& work = operands.work;
    if (with_gradient) {
      work.gradient = results.gradient.mutable_data_ptr();
      work.other_gradient = both ? results.other_gradient.mutable_data_ptr() : nullptr;
    }
    Tensor partials, divisor;
    PointwiseTotal<A> total{};
    if (grad != nullptr) {
      operands.set_coefficient(*grad);
      if (work.coefficient.at.dims > kOperandDims) operands.set_coefficient(grad->contiguous());
    } else if (each) {
      work.loss = results.loss.template mutable_data_ptr<A>();
    } else {
      total.result = results.loss.template mutable_data_ptr<A>();
      partials = at::empty({kMaxChunks * 2}, input.options().dtype(at::kDouble));
      total.partials = reinterpret_cast<PointwiseSum*>(partials.template mutable_data_ptr<double>());
      // The mean of a forward pass, for which the losses and what is kept can be counted at once.
      total.by_kept = options.reduction == Reduction::Mean && !with_gradient && !options.normalizer &&
                      !options.sample_weight && !operands.counted.defined();
    }
    if (!total.by_kept) divisor = divisor_of(operands, options, input, device);
    if (divisor.defined()) {
      total.divisor = reinterpret_cast<const PointwiseDivisor*>(divisor.template const_data_ptr<double>());
    }
    run_pointwise<decltype(t)>(static_cast<int>(options.loss), work, total, device.stream);
  });
  return results;
}

// An error for the first kept value that does not fit the formula, which makes its loss NaN. Waits for the device.
void check_domains(const PointwiseCall& call) {
  const auto& traits = pointwise_traits(call.options.loss);
  if (!traits.input_domain.is_bounded() && !traits.other_domain.is_bounded()) return;
  auto each = call;
  each.options.reduction = Reduction::None;
  each.options.normalizer.reset();
  const auto found = compute(each, false, nullptr).loss.flatten().isnan().nonzero().flatten();
  const auto at = found.cpu();
  const auto check = [&](const char* name, const Domain& domain, const OptionalTensor& operand) {
    if (!domain.is_bounded()) return;
    const auto values = operand->take(found).to(at::kDouble).cpu();
    for (std::int64_t i = 0; i < at.numel(); ++i) {
      const double value = values.const_data_ptr<double>()[i];
      const auto position = at.const_data_ptr<std::int64_t>()[i];
      if (domain.excludes(value)) throw_outside_domain(traits.name, name, domain, value, position, call.input.sizes());
    }
  };
  check("input", traits.input_domain, call.input);
  check("target", traits.target_domain, call.target);
  check(traits.other_name(), traits.other_domain, call.other);
}

Results run(const PointwiseCall& call, bool with_gradient, const Tensor* grad) {
  check_pointwise(call.input, call.target, call.other, call.mask, call.options);
  if (checks_values() && !is_capturing()) check_domains(call);
  return compute(call, with_gradient, grad);
}

Tensor forward(const Tensor& input, const Tensor& target, const OptionalTensor& other, const OptionalTensor& mask,
               const PointwiseOptions& options) {
  return run({"_pointwise", input, target, other, mask, options}, false, nullptr).loss;
}

std::tuple<Tensor, Tensor, Tensor> forward_grad(const Tensor& input, const Tensor& target, const OptionalTensor& other,
                                                const OptionalTensor& mask, const PointwiseOptions& options) {
  const auto results = run({"_pointwise", input, target, other, mask, options}, true, nullptr);
  return {results.loss, results.gradient, results.other_gradient};
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& input, const Tensor& target,
                                    const OptionalTensor& other, const OptionalTensor& mask,
                                    const PointwiseOptions& options) {
  const auto results = run({"_pointwise", input, target, other, mask, options}, true, &grad);
  return {results.gradient, results.other_gradient};
}

}  // namespace

MASKED_LOSS_CUDA_IMPL(m) {
  impl<PointwiseForward, forward>(m);
  impl<PointwiseForwardGrad, forward_grad>(m);
  impl<PointwiseBackward, backward>(m);
}

}  // namespace masked_loss::cuda
