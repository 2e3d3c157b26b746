#include <ATen/ops/empty.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/pointwise_operands.h"
#include "cuda/pointwise_kernel.h"
#include "cuda/stream.h"

namespace masked_loss::cuda {
namespace {

template <class Body>
void dispatch(at::ScalarType type, const Body& body) {
  switch (type) {
    case at::kFloat: return body(float{}, float{});
    case at::kDouble: return body(double{}, double{});
    case at::kBFloat16: return body(__nv_bfloat16{}, float{});
    default: return body(__half{}, float{});
  }
}

// What a mean divides by, 0-d and on the device; undefined for the reductions that do not divide.
template <class A>
Tensor divisor_of(PointwiseOperands<A>& operands, const PointwiseOptions& options, const Tensor& input,
                  const Device& device) {
  const auto reduction = options.reduction;
  if (reduction == Reduction::None || reduction == Reduction::Sum || operands.work.count == 0) return {};
  const bool by_sequence = reduction != Reduction::Mean;
  const auto count = operands.count(by_sequence);
  const auto parts = by_sequence ? count.sequences : std::min(kPointwiseBlocks, (count.work.count + 4095) / 4096);
  const auto sums =
      at::empty({parts * static_cast<std::int64_t>(sizeof(PointwiseSum))}, input.options().dtype(at::kByte));
  auto* data = reinterpret_cast<PointwiseSum*>(sums.data_ptr<std::uint8_t>());
  weigh_elements(count.work, parts, count.times, data, device.stream);
  Tensor normalizer, shares;
  if (options.normalizer) {
    normalizer = options.normalizer->to(at::kDouble);
    if (checks_values() && !is_capturing()) {
      check_normalizer_value(pointwise_traits(options.loss).name, normalizer.item<double>());
    }
  }
  A* share = nullptr;
  if (reduction == Reduction::SequenceMean) {
    shares = at::empty({parts}, input.options().dtype(accumulation_type(input.scalar_type())));
    share = shares.template mutable_data_ptr<A>();
    operands.set_shares(shares);
  }
  const auto divisor = at::empty({}, input.options().dtype(at::kDouble));
  sum_elements(data, parts, by_sequence, normalizer.defined() ? normalizer.const_data_ptr<double>() : nullptr,
               divisor.mutable_data_ptr<double>(), share, device.stream);
  return divisor;
}

struct Results {
  Tensor loss, gradient, other_gradient;
};

// `grad`: what arrives from upstream at the losses, of their shape or 0-d.
Results compute(const Tensor& input, const Tensor& target, const OptionalTensor& other, const OptionalTensor& mask,
                const PointwiseOptions& options, bool with_gradient, const Tensor* grad) {
  check_pointwise(input, target, other, mask, options);
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
    A* sum = nullptr;
    if (grad != nullptr) {
      operands.set_coefficient(*grad);
    } else if (each) {
      work.loss = results.loss.template mutable_data_ptr<A>();
    } else {
      sum = results.loss.template mutable_data_ptr<A>();
    }
    const auto divisor = divisor_of(operands, options, input, device);
    const auto partials = at::empty({kPointwiseBlocks}, input.options().dtype(at::kDouble));
    run_pointwise<decltype(t)>(static_cast<int>(options.loss), work,
                               divisor.defined() ? divisor.template const_data_ptr<double>() : nullptr,
                               partials.template mutable_data_ptr<double>(), sum, device.stream);
  });
  return results;
}

Tensor forward(const Tensor& input, const Tensor& target, const OptionalTensor& other, const OptionalTensor& mask,
               const PointwiseOptions& options) {
  return compute(input, target, other, mask, options, false, nullptr).loss;
}

std::tuple<Tensor, Tensor, Tensor> forward_grad(const Tensor& input, const Tensor& target, const OptionalTensor& other,
                                                const OptionalTensor& mask, const PointwiseOptions& options) {
  const auto results = compute(input, target, other, mask, options, true, nullptr);
  return {results.loss, results.gradient, results.other_gradient};
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& input, const Tensor& target,
                                    const OptionalTensor& other, const OptionalTensor& mask,
                                    const PointwiseOptions& options) {
  const auto results = compute(input, target, other, mask, options, true, &grad);
  return {results.gradient, results.other_gradient};
}

}  // namespace

MASKED_LOSS_CUDA_IMPL(m) {
  m.impl("_pointwise_forward", PointwiseForward::kernel<forward>);
  m.impl("_pointwise_forward_grad", PointwiseForwardGrad::kernel<forward_grad>);
  m.impl("_pointwise_backward", PointwiseBackward::kernel<backward>);
}

}  // namespace masked_loss::cuda
