#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <cstring>

#include "common/pointwise_operands.h"
#include "cpu/huge_pages.h"
#include "cpu/parallel.h"
#include "cpu/pointwise_kernel.h"

namespace masked_loss::cpu {
namespace {

constexpr std::int64_t kChunk = 1 << 16;  // elements; fixed, so that sums do not depend on the number of threads

const PointwiseKernels& kernels() {
  static const auto& picked = MASKED_LOSS_PICK(pointwise_kernels);
  return picked;
}

// Of each sequence, or of chunks of all that is kept.
template <class A>
std::vector<PointwiseSum> weigh(const PointwiseCount<A>& count, bool by_sequence) {
  const auto& work = count.work;
  // Sequences are not split, short ones share a task.
  const auto part = by_sequence ? work.count / count.sequences : kChunk, parts = divide_up(work.count, part);
  const auto together = std::max<std::int64_t>(1, kChunk / part);
  std::vector<PointwiseSum> sums(parts);
  const auto& kernel = kernels().of<A>();
  run_tasks(divide_up(parts, together), [&] {
    return [&](std::int64_t task) {
      for (auto p = task * together; p < std::min(parts, (task + 1) * together); ++p) {
        sums[p] = kernel.weigh(work, p * part, std::min(work.count, (p + 1) * part));
        sums[p].weight *= count.times;
      }
    };
  });
  return sums;
}

// What a mean divides by, from what is kept. With SequenceMean the operands get the shares of the sequences.
template <class A>
double divisor_of(PointwiseOperands<A>& operands, const PointwiseOptions& options) {
  const auto reduction = options.reduction;
  if (reduction == Reduction::None || reduction == Reduction::Sum || operands.work.count == 0) return 1;
  const bool by_sequence = reduction != Reduction::Mean;
  const auto sums = weigh(operands.count(by_sequence), by_sequence);
  double divisor = 0;
  for (const auto& sum : sums) divisor += by_sequence ? sum.kept > 0 : sum.weight;
  if (options.normalizer) {
    divisor = options.normalizer->template item<double>();
    check_normalizer_value(pointwise_traits(options.loss).name, divisor);
  }
  if (reduction == Reduction::SequenceMean) {
    const auto shares = at::empty({static_cast<std::int64_t>(sums.size())},
                                  at::TensorOptions(std::is_same_v<A, double> ? at::kDouble : at::kFloat));
    A* data = shares.template mutable_data_ptr<A>();
    for (std::size_t s = 0; s < sums.size(); ++s) data[s] = sums[s].weight == 0 ? A(0) : A(1 / sums[s].weight);
    operands.set_shares(shares);
  }
  return divisor;
}

template <class A>
void check_domains(const PointwiseOperands<A>& operands, const PointwiseTraits& traits) {
  const auto& work = operands.work;
  const auto check = [&](const char* name, const Domain& domain, const Operand& operand) {
    if (!domain.is_bounded()) return;
    const auto [at, value] = kernels().of<A>().find_outside_domain(work, operand, domain);
    if (at < work.count) throw_outside_domain(traits.name, name, domain, value, at, operands.shape);
  };
  check("input", traits.input_domain, work.input);
  check("target", traits.target_domain, work.target);
  check(traits.other_name(), traits.other_domain, work.other);
}

// The loss of a reduction, and the outputs; an error where a kept value does not fit the formula.
template <class A>
double run(PointwiseOperands<A>& operands, const PointwiseOptions& options, std::int64_t element_bytes) {
  const auto& work = operands.work;
  const double divisor = divisor_of(operands, options);
  if (divisor == 0) {  // gives 0
    for (void* gradient : {work.gradient, work.other_gradient}) {
      if (gradient != nullptr) std::memset(gradient, 0, work.count * element_bytes);
    }
    return 0;
  }
  const auto& kernel = kernels().of<A>().formulas[options.loss];
  const A factor = static_cast<A>(1 / divisor);
  c10::SmallVector<double, 8> sums(divide_up(work.count, kChunk));
  run_tasks(divide_up(work.count, kChunk), [&] {
    return
        [&](std::int64_t c) { sums[c] = kernel.run(work, factor, c * kChunk, std::min(work.count, (c + 1) * kChunk)); };
  });
  double total = 0;
  for (const double sum : sums) total += sum;
  if (std::isnan(total)) check_domains(operands, pointwise_traits(options.loss));
  return total / divisor;
}

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
    const auto empty = [&] { return empty_output(sizes, input.scalar_type()); };
    results.gradient = empty();
    results.other_gradient = both ? empty() : at::empty({0}, input.options());
  }
  dispatch(accumulation, [&](auto a) {
    using A = decltype(a);
    PointwiseOperands<A> operands(input, target, other, mask, options);
    auto& work = operands.work;
    if (with_gradient) {
      work.gradient = results.gradient.mutable_data_ptr();
      work.other_gradient = both ? results.other_gradient.mutable_data_ptr() : nullptr;
    }
    if (grad != nullptr) {
      operands.set_coefficient(*grad);
    } else if (options.reduction == Reduction::None) {
      work.loss = results.loss.template mutable_data_ptr<A>();
    }
    const double loss = run(operands, options, input.itemsize());
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
  impl<PointwiseForward, forward>(m);
  impl<PointwiseForwardGrad, forward_grad>(m);
  impl<PointwiseBackward, backward>(m);
}

}  // namespace masked_loss::cpu
