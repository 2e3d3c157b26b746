#include <ATen/ops/empty.h>
#include <ATen/ops/narrow.h>
#include <torch/library.h>

#include <cmath>
#include <cstring>

#include "common/checks.h"
#include "common/huge_pages.h"
#include "common/masked_fill.h"
#include "common/strides.h"
#include "cpu/parallel.h"
#include "cpu/pointwise_kernel.h"

namespace masked_loss::cpu {
namespace {

constexpr std::int64_t kChunk = 1 << 16;  // elements; fixed, so that sums do not depend on the number of threads

const PointwiseKernels& kernels() {
  static const auto& picked = MASKED_LOSS_PICK(pointwise_kernels);
  return picked;
}

ElementType element_type(at::ScalarType type) {
  switch (type) {
    case at::kFloat: return ElementType::Float;
    case at::kDouble: return ElementType::Double;
    case at::kBFloat16: return ElementType::BFloat16;
    case at::kHalf: return ElementType::Half;
    default: return ElementType::Byte;
  }
}

// `tensor` broadcasts to `shape` and has its rank.
Operand operand(const Tensor& tensor, at::IntArrayRef shape) {
  at::DimVector strides = row_strides(tensor);
  for (std::size_t d = 0; d < shape.size(); ++d) {
    if (tensor.size(d) != shape[d]) strides[d] = 0;
  }
  return {tensor.const_data_ptr(), element_type(tensor.scalar_type()), make_rows<1>(shape, {strides})};
}

// A call's tensors as the kernels see them.
template <class A>
class Work : public PointwiseWork<A> {
 public:
  Work(const Tensor& input, const Tensor& target, const OptionalTensor& other, const OptionalTensor& mask,
       const PointwiseOptions& options)
      : PointwiseWork<A>{}, shape_(input.sizes()), type_(input.scalar_type()), options_(options) {
    this->count = input.numel();
    this->input = operand(input, shape_);
    this->target = operand(target, shape_);
    if (other) this->other = operand(*other, shape_);
    if (mask) {
      mask_ = byte_mask(*mask);
      this->mask = operand(mask_, shape_);
    }
    if (options.sample_weight) this->sample_weight = operand(*options.sample_weight, shape_);
    if (options.weight) this->weight = operand(*options.weight, shape_);
    this->factor = 1;
    this->numbers = options.numbers.data();
    reduce();
  }

  // The loss of a reduction; an error where a kept value does not fit the formula.
  double run() const {
    if (dropped_) {
      const auto bytes = this->count * at::elementSize(type_);
      for (void* gradient : {this->gradient, this->other_gradient}) {
        if (gradient != nullptr) std::memset(gradient, 0, bytes);
      }
      return 0;
    }
    const auto& kernel = kernels().of<A>().formulas[options_.loss];
    c10::SmallVector<double, 8> sums(divide_up(this->count, kChunk));
    run_tasks(divide_up(this->count, kChunk), [&] {
      return [&](std::int64_t c) { sums[c] = kernel.run(*this, c * kChunk, end_of(c)); };
    });
    double total = 0;
    for (const double sum : sums) total += sum;
    if (std::isnan(total)) check_fits();
    return total / divisor_;
  }

 private:
  std::int64_t end_of(std::int64_t chunk) const { return std::min(this->count, (chunk + 1) * kChunk); }

  // What the reduction divides by, from what is kept.
  void reduce() {
    const auto reduction = options_.reduction;
    if (reduction == Reduction::None || reduction == Reduction::Sum || this->count == 0) return;
    const bool by_sequence = reduction != Reduction::Mean;
    const auto sums = weigh(by_sequence);
    divisor_ = 0;
    for (const auto& sum : sums) divisor_ += by_sequence ? sum.kept > 0 : sum.weight;
    if (options_.normalizer) {
      divisor_ = options_.normalizer->template item<double>();
      check_normalizer_value(divisor_);
    }
    dropped_ = divisor_ == 0;  // a divisor of 0 gives 0
    this->factor = static_cast<A>(1 / divisor_);
    if (reduction != Reduction::SequenceMean) return;
    shares_ = at::empty({static_cast<std::int64_t>(sums.size())}, at::TensorOptions(accumulation_type(type_)));
    A* shares = shares_.template mutable_data_ptr<A>();
    for (std::size_t s = 0; s < sums.size(); ++s) shares[s] = sums[s].weight == 0 ? A(0) : A(1 / sums[s].weight);
    at::DimVector sizes(shape_.size(), 1);
    if (!sizes.empty()) sizes[0] = shares_.numel();
    shares_ = shares_.view(sizes);
    this->share = operand(shares_, shape_);
  }

  // Of each sequence, or of chunks of all that is kept.
  std::vector<PointwiseSum> weigh(bool by_sequence) const {
    PointwiseWork<A> work{};
    at::DimVector shape(shape_.begin(), shape_.end());
    const OptionalTensor none;
    const auto& weight = pointwise_traits(options_.loss).counts_weight ? options_.weight : none;
    // Dimensions that none of them has are counted once.
    double times = 1;
    for (std::size_t d = by_sequence ? 1 : 0; d < shape.size(); ++d) {
      const auto lacks = [&](const Tensor& tensor) { return tensor.size(d) == 1 || tensor.stride(d) == 0; };
      if ((mask_.defined() && !lacks(mask_)) || (options_.sample_weight && !lacks(*options_.sample_weight)) ||
          (weight && !lacks(*weight))) {
        continue;
      }
      times *= static_cast<double>(shape[d]);
      shape[d] = 1;
    }
    const auto set = [&](Operand& to, const Tensor& tensor) {
      auto one = tensor;
      for (std::size_t d = 0; d < shape.size(); ++d) {
        if (one.size(d) > shape[d]) one = one.narrow(d, 0, 1);
      }
      to = operand(one, shape);
    };
    if (mask_.defined()) set(work.mask, mask_);
    if (options_.sample_weight) set(work.sample_weight, *options_.sample_weight);
    if (weight) set(work.weight, *weight);
    work.count = c10::multiply_integers(shape);
    const auto sequences = !by_sequence || shape.empty() ? 1 : shape[0];
    // Sequences are not split, short ones share a task.
    const auto part = by_sequence ? work.count / sequences : kChunk, parts = divide_up(work.count, part);
    const auto together = std::max<std::int64_t>(1, kChunk / part);
    std::vector<PointwiseSum> sums(parts);
    const auto& kernel = kernels().of<A>();
    run_tasks(divide_up(parts, together), [&] {
      return [&](std::int64_t task) {
        for (auto p = task * together; p < std::min(parts, (task + 1) * together); ++p) {
          sums[p] = kernel.weigh(work, p * part, std::min(work.count, (p + 1) * part));
          sums[p].weight *= times;
        }
      };
    });
    return sums;
  }

  void check_fits() const {
    const auto visit = [&](auto index) {
      using Formula = std::tuple_element_t<index, PointwiseFormulas>;
      if (options_.loss != index || Formula::requirement == nullptr) return;
      const auto at = kernels().of<A>().find_unfit(*this, Formula::fits, 0, this->count);
      if (at < this->count) throw_unfit(Formula::requirement, shape_, at);
    };
    [&]<std::size_t... index>(std::index_sequence<index...>) {
      (visit(std::integral_constant<std::size_t, index>()), ...);
    }(std::make_index_sequence<kPointwiseFormulas>());
  }

  at::DimVector shape_;
  at::ScalarType type_;
  const PointwiseOptions& options_;
  Tensor mask_, shares_;
  double divisor_ = 1;
  bool dropped_ = false;
};

template <class Body>
void dispatch(at::ScalarType type, const Body& body) {
  type == at::kDouble ? body(double{}) : body(float{});
}

struct Results {
  Tensor loss, gradient, other_gradient;
};

// `grad`: what arrives from upstream at the losses, of their shape or 0-d.
Results compute(const Tensor& input, const Tensor& target, const OptionalTensor& other, const OptionalTensor& mask,
                const PointwiseOptions& options, bool with_gradient, const Tensor* grad) {
  check_pointwise(input, target, other, mask, options);
  const auto sizes = input.sizes();
  const auto accumulation = accumulation_type(input.scalar_type());
  const bool both = pointwise_traits(options.loss).has_other_slope;
  Results results;
  if (grad == nullptr) {
    results.loss = at::empty(options.reduction == Reduction::None ? sizes : at::IntArrayRef(),
                             input.options().dtype(accumulation));
  }
  if (with_gradient) {
    const auto empty = [&] { return with_huge_pages(at::empty(sizes, input.options())); };
    results.gradient = empty();
    results.other_gradient = both ? empty() : at::empty({0}, input.options());
  }
  dispatch(accumulation, [&](auto a) {
    using A = decltype(a);
    Work<A> work(input, target, other, mask, options);
    if (with_gradient) {
      work.gradient = results.gradient.mutable_data_ptr();
      work.other_gradient = both ? results.other_gradient.mutable_data_ptr() : nullptr;
    }
    Tensor upstream;
    if (grad != nullptr) {
      upstream = grad->expand(sizes);
      work.coefficient = operand(upstream, sizes);
    } else if (options.reduction == Reduction::None) {
      work.loss = results.loss.template mutable_data_ptr<A>();
    }
    const double loss = work.run();
    if (grad == nullptr && options.reduction != Reduction::None) {
      *results.loss.template mutable_data_ptr<A>() = static_cast<A>(loss);
    }
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

TORCH_LIBRARY_IMPL(masked_loss, CPU, m) {
  m.impl("_pointwise_forward", PointwiseForward::kernel<forward>);
  m.impl("_pointwise_forward_grad", PointwiseForwardGrad::kernel<forward_grad>);
  m.impl("_pointwise_backward", PointwiseBackward::kernel<backward>);
}

}  // namespace masked_loss::cpu
