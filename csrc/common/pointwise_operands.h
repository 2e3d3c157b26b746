#pragma once

#include <c10/util/accumulate.h>

#include "pointwise_ops.h"
#include "strides.h"

namespace masked_loss {

// What a reduction divides by is counted over these elements, each of them `times`: dimensions along which mask and
// weights repeat are counted once.
template <class A>
struct PointwiseCount {
  PointwiseWork<A> work{};
  at::DimVector shape;
  double times = 1;
  std::int64_t sequences;  // 1 but for the reductions over sequences

  PointwiseCount(at::IntArrayRef of, const Tensor& mask, const Tensor& sample_weight, const Tensor& weight,
                 bool by_sequence)
      : shape(of.begin(), of.end()) {
    const auto lacks = [](const Tensor& tensor, std::size_t d) {
      return !tensor.defined() || tensor.size(d) == 1 || tensor.stride(d) == 0;
    };
    for (std::size_t d = by_sequence ? 1 : 0; d < shape.size(); ++d) {
      if (!lacks(mask, d) || !lacks(sample_weight, d) || !lacks(weight, d)) continue;
      times *= static_cast<double>(shape[d]);
      shape[d] = 1;
    }
    const auto set = [&](Operand& to, Tensor tensor) {
      if (!tensor.defined()) return;
      for (std::size_t d = 0; d < shape.size(); ++d) {
        if (tensor.size(d) > shape[d]) tensor = tensor.narrow(d, 0, 1);
      }
      to = make_operand(tensor, shape);
    };
    set(work.mask, mask);
    set(work.sample_weight, sample_weight);
    set(work.weight, weight);
    work.count = c10::multiply_integers(shape);
    sequences = !by_sequence || shape.empty() ? 1 : shape[0];
  }
};

// A call's tensors as the kernels of any device see them; owns what had to be converted.
template <class A>
struct PointwiseOperands {
  PointwiseOperands(const Tensor& input, const Tensor& target, const OptionalTensor& other, const OptionalTensor& given,
                    const PointwiseOptions& options)
      : shape(input.sizes()) {
    constexpr auto type = std::is_same_v<A, double> ? at::kDouble : at::kFloat;
    work.count = input.numel();
    work.input = make_operand(input, shape);
    work.target = make_operand(target, shape);
    if (other) work.other = make_operand(*other, shape);
    if (given) {
      check_mask_values(pointwise_traits(options.loss).name, "mask", *given);
      mask = byte_mask(*given);
      work.mask = make_operand(mask, shape);
    }
    if (options.sample_weight) {
      sample_weight = options.sample_weight->to(type);
      work.sample_weight = make_operand(sample_weight, shape);
    }
    if (options.weight) {
      weight = options.weight->to(type);
      work.weight = make_operand(weight, shape);
    }
    TORCH_CHECK(options.numbers.size() <= kPointwiseNumbers, "_pointwise: expected at most ", kPointwiseNumbers,
                " numbers, got ", options.numbers.size());
    std::copy(options.numbers.begin(), options.numbers.end(), work.numbers);
    counted = pointwise_traits(options.loss).counts_weight ? weight : Tensor();
  }

  PointwiseCount<A> count(bool by_sequence) const { return {shape, mask, sample_weight, counted, by_sequence}; }

  // A number for each sequence.
  void set_shares(const Tensor& numbers) {
    at::DimVector sizes(shape.size(), 1);
    if (!sizes.empty()) sizes[0] = numbers.numel();
    shares = numbers.view(sizes);
    work.share = make_operand(shares, shape);
  }

  // What arrives from upstream.
  void set_coefficient(const Tensor& grad) {
    constexpr auto type = std::is_same_v<A, double> ? at::kDouble : at::kFloat;
    upstream = grad.to(type).expand(shape);
    work.coefficient = make_operand(upstream, shape);
  }

  at::DimVector shape;
  PointwiseWork<A> work{};
  Tensor mask, sample_weight, weight, counted, shares, upstream;
};

}  // namespace masked_loss
