#include "composite/pointwise.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/binary_cross_entropy.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/l1_loss.h>
#include <ATen/ops/log.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/poisson_nll_loss.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/softplus.h>
#include <ATen/ops/square.h>
#include <ATen/ops/where.h>
#include <ATen/ops/xlogy.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <cmath>
#include <numbers>

#include "common/paths.h"
#include "composite/reduce.h"

namespace masked_loss {
namespace {

using Numbers = std::vector<double>;
constexpr auto none = at::Reduction::None;

// The formulas, one for each of PointwiseFormulas.
Tensor compose(formula::Mse, const Tensor& x, const Tensor& t, const Tensor&, const Numbers&) {
  // Not at::mse_loss: its forward mode multiplies an infinite slope by the target's tangent of 0.
  return (x - t).square();
}

Tensor compose(formula::L1, const Tensor& x, const Tensor& t, const Tensor&, const Numbers&) {
  return at::l1_loss(x, t, none);
}

// Of a difference: whether it is nearer to 0 than `width`, its distance, and the difference, or 0 where it is not near:
// the slope of the square of one that overflows would be NaN times 0. As torch's, the slope of the distance is NaN at
// NaN.
std::tuple<Tensor, Tensor, Tensor> split(const Tensor& d, double width) {
  const auto distance = d * at::where(d.isnan(), d, d.sign()).detach(), is_near = distance.lt(width);
  return {is_near, distance, at::where(is_near, d, at::zeros_like(d))};
}

Tensor compose(formula::SmoothL1, const Tensor& x, const Tensor& t, const Tensor&, const Numbers& numbers) {
  // Not at::smooth_l1_loss: its slope at NaN depends on whether it is batched.
  const double beta = numbers[0];
  if (beta == 0) return at::l1_loss(x, t, none);
  const auto [is_near, distance, near] = split(x - t, beta);
  return at::where(is_near, 0.5 * near.square() / beta, distance - 0.5 * beta);
}

Tensor compose(formula::Huber, const Tensor& x, const Tensor& t, const Tensor&, const Numbers& numbers) {
  // Not at::huber_loss: its backward has no forward mode.
  const double delta = numbers[0];
  const auto [is_near, distance, near] = split(x - t, delta);
  return at::where(is_near, 0.5 * near.square(), delta * (distance - 0.5 * delta));
}

// log(1 + exp(x)), whose derivatives of every order are finite; above the threshold it is x to the last digit.
Tensor log1p_exp(const Tensor& x) { return at::softplus(x, /*beta=*/1, /*threshold=*/40); }

Tensor cross_entropy_of_logits(const Tensor& x, const Tensor& t, const Tensor& pos_weight) {
  const auto log_term = log1p_exp(-x);
  return (1 - t) * x + (pos_weight.defined() ? (1 + (pos_weight - 1) * t) * log_term : log_term);
}

Tensor compose(formula::BinaryCrossEntropyWithLogits, const Tensor& x, const Tensor& t, const Tensor& pos_weight,
               const Numbers&) {
  return cross_entropy_of_logits(x, t, pos_weight);
}

Tensor compose(formula::BinaryCrossEntropy, const Tensor& x, const Tensor& t, const Tensor&, const Numbers&) {
  // Computed in the accumulation dtype, which is what autocast's refusal is about.
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  // torch's refuses what is not in [0, 1], NaN too; the loss and its slope are NaN there.
  const auto fits = x.ge(0).logical_and(x.le(1)).logical_and(t.ge(0)).logical_and(t.le(1));
  const auto half = at::full_like(x, 0.5).detach(), nan = at::full_like(x, std::nan("")).detach();
  const auto unfit = x * at::where(fits, at::zeros_like(x), nan).detach();
  return at::where(fits, at::binary_cross_entropy(at::where(fits, x, half), at::where(fits, t, half), {}, none), unfit);
}

Tensor compose(formula::KlDiv, const Tensor& x, const Tensor& t, const Tensor&, const Numbers&) {
  return at::xlogy(t, t) - t * x;
}

Tensor compose(formula::KlDivOfLogTarget, const Tensor& x, const Tensor& t, const Tensor&, const Numbers&) {
  return t.exp() * (t - x);
}

Tensor compose(formula::PoissonNll, const Tensor& x, const Tensor& t, const Tensor&, const Numbers& numbers) {
  return at::poisson_nll_loss(x, t, /*log_input=*/false, numbers[0] != 0, numbers[1], none);
}

Tensor compose(formula::PoissonNllOfLogInput, const Tensor& x, const Tensor& t, const Tensor&, const Numbers& numbers) {
  return at::poisson_nll_loss(x, t, /*log_input=*/true, numbers[0] != 0, /*eps=*/0, none);
}

Tensor compose(formula::GaussianNll, const Tensor& x, const Tensor& t, const Tensor& var, const Numbers& numbers) {
  // As torch: the derivative is that at eps, where the variance is below. A negative one is NaN, and so is its slope.
  const auto nan = at::full_like(var, std::nan("")).detach();
  const auto missing = at::where(var.lt(0), nan, numbers[1] - var).detach();
  const auto v = at::where(var.lt(numbers[1]), var + missing, var);
  const auto loss = 0.5 * (v.log() + (x - t).square() / v);
  return numbers[0] != 0 ? loss + 0.5 * std::log(2 * std::numbers::pi) : loss;
}

// What of a target's probability a logit misses.
Tensor wrong(const Tensor& x, const Tensor& t) { return t * (-x).sigmoid() + (1 - t) * x.sigmoid(); }

Tensor log_wrong(const Tensor& x, const Tensor& t) {
  // log(a q + b p) = log(a + b p / q) + log(q), of whichever term is the larger one. Where the quotient p / q is cut
  // off b is 0, or next to it.
  const auto positive = t.eq(1).logical_or((t * (-x).sigmoid()).gt((1 - t) * x.sigmoid()));
  const auto a = at::where(positive, t, 1 - t), b = at::where(positive, 1 - t, t), z = at::where(positive, x, -x);
  const auto exponent = at::where(z.gt(80), at::full_like(z, 80).detach(), z);
  return (a + b * exponent.exp()).log() - log1p_exp(z);
}

Tensor compose(formula::SigmoidFocal, const Tensor& x, const Tensor& t, const Tensor&, const Numbers& numbers) {
  // No two terms of it cancel, which would leave too little for the slope of a small power.
  const auto exact = t * log1p_exp(-x) + (1 - t) * log1p_exp(x);
  auto loss = at::where(x.isfinite(), exact, cross_entropy_of_logits(x, t, Tensor()));
  if (numbers[1] == 2) {
    loss = loss * wrong(x, t).square();
  } else if (numbers[1] != 0) {
    // A power of less than 2 has infinite derivatives at 0, which its logarithm has not.
    loss = loss * (numbers[1] * log_wrong(x, t)).exp();
  }
  return numbers[0] >= 0 ? loss * (numbers[0] * t + (1 - numbers[0]) * (1 - t)) : loss;
}

// An error for the first value that its domain excludes, as the kernels', where values can be read.
void check_domains(const PointwiseTraits& traits, const Tensor& input, const Tensor& target, const Tensor& other) {
  const auto check = [&](const char* name, const Domain& domain, const Tensor& operand) {
    if (!domain.is_bounded() || !operand.defined()) return;
    const auto excluded = operand.lt(domain.least).logical_or(operand.gt(domain.most)).flatten();
    if (readable(excluded.any()).value_or(0) == 0) return;
    const auto at = excluded.nonzero()[0].item<std::int64_t>();
    throw_outside_domain(traits.name, name, domain, operand.flatten()[at].item<double>(), at, operand.sizes());
  };
  check("input", traits.input_domain, input);
  check("target", traits.target_domain, target);
  check(traits.other_name(), traits.other_domain, other);
}

using Compose = Tensor (*)(const Tensor&, const Tensor&, const Tensor&, const Numbers&);
const Compose& composition(std::int64_t loss) {
  static constexpr auto table = []<class... F>(std::tuple<F...>*) {
    return std::array{+[](const Tensor& x, const Tensor& t, const Tensor& other, const Numbers& numbers) {
      return compose(F(), x, t, other, numbers);
    }...};
  }(static_cast<PointwiseFormulas*>(nullptr));
  return table[loss];
}

}  // namespace

Tensor composite_pointwise(const PointwiseCall& call) {
  const auto& options = call.options;
  const auto& traits = pointwise_traits(options.loss);
  const auto type = accumulation_type(call.input.scalar_type());
  check_mask_values(traits.name, "mask", call.mask);
  auto weight = at::ones_like(call.input, call.input.options().dtype(type)).detach();
  auto keep = call.mask ? call.mask->ne(0).expand_symint(call.input.sym_sizes()) : weight.ne(0);
  if (options.sample_weight) {
    // A weight of 0 masks; one that is differentiated has a gradient there, so that its element is read.
    const auto given = options.sample_weight->to(type);
    if (!is_differentiated(options.sample_weight)) keep = keep.logical_and(given.ne(0));
    weight = weight * given;
  }
  const auto safe = [&](const Tensor& tensor, double value) {
    const auto wide = tensor.to(type);
    return at::where(keep, wide, at::full_like(wide, value));
  };
  const auto or_zero = [&](const Tensor& tensor) { return at::where(keep, tensor, at::zeros_like(tensor)); };
  weight = or_zero(weight);
  const auto input = safe(call.input, traits.safe_input), target = safe(call.target, traits.safe_target);
  const auto other = call.other ? safe(*call.other, traits.safe_other) : Tensor();
  check_domains(traits, input, target, other);
  auto losses = composition(options.loss)(input, target, other, options.numbers);
  auto counted = weight;
  if (options.weight) {
    const auto of_element = or_zero(options.weight->to(type).expand_symint(input.sym_sizes()));
    losses = losses * of_element;
    if (traits.counts_weight) counted = counted * of_element;
  }
  const auto [kept, coefficient] =
      composite_coefficient(traits.name, keep, weight, counted, options.reduction, options.normalizer);
  return composite_reduce(losses, kept, coefficient, options.reduction);
}

namespace {

// In input and, where the formula has a slope in it, in other.
std::tuple<Tensor, Tensor> gradients_of(const PointwiseCall& call, const Tensor& grad, Tensor* loss) {
  const bool both = pointwise_traits(call.options.loss).has_other_slope;
  const auto gradients = composite_gradients(
      both ? std::vector<Tensor>{call.input, *call.other} : std::vector<Tensor>{call.input}, grad,
      [&](const std::vector<Tensor>& leaves) {
        auto of = call;
        of.input = leaves[0];
        if (both) of.other = leaves[1];
        return composite_pointwise(of);
      },
      loss);
  return {gradients[0], both ? gradients[1] : at::empty({0}, call.input.options())};
}

}  // namespace

std::tuple<Tensor, Tensor> composite_pointwise_backward(const Tensor& grad, const Tensor& input, const Tensor& target,
                                                        const OptionalTensor& other, const OptionalTensor& mask,
                                                        const PointwiseOptions& options) {
  return gradients_of({"_pointwise", input, target, other, mask, options}, grad, nullptr);
}

}  // namespace masked_loss

namespace masked_loss::composite {
namespace {

// Below autograd.
Tensor pointwise(const PointwiseCall& public_call) {
  const auto of = resolve_pointwise(public_call);
  return call<PointwiseForward>(of.input, of.target, of.other, of.mask, of.options)
      .to(result_type(of.input, of.input.scalar_type(), of.dtype));
}

Tensor pointwise_batched(const PointwiseCall& public_call) {
  const auto of = resolve_pointwise(public_call);
  return composite_pointwise(of).to(result_type(of.input, of.input.scalar_type(), of.dtype));
}

Tensor forward(const Tensor& input, const Tensor& target, const OptionalTensor& other, const OptionalTensor& mask,
               const PointwiseOptions& options) {
  return composite_pointwise({"_pointwise", input, target, other, mask, options});
}

std::tuple<Tensor, Tensor, Tensor> forward_grad(const Tensor& input, const Tensor& target, const OptionalTensor& other,
                                                const OptionalTensor& mask, const PointwiseOptions& options) {
  const at::NoGradGuard no_graph;
  Tensor loss;
  const auto [gradient, other_gradient] = gradients_of({"_pointwise", input, target, other, mask, options}, {}, &loss);
  return {loss, gradient, other_gradient};
}

}  // namespace

TORCH_LIBRARY_IMPL(masked_loss, CompositeExplicitAutograd, m) {
  implement_pointwise<pointwise>(m);
  impl<PointwiseForward, forward>(m);
  impl<PointwiseForwardGrad, forward_grad>(m);
  impl<PointwiseBackward, composite_pointwise_backward>(m);
}

TORCH_LIBRARY_IMPL(masked_loss, FuncTorchBatched, m) {
  implement_pointwise<pointwise_batched>(m);
  impl<PointwiseBackward, composite_pointwise_backward>(m);
}

}  // namespace masked_loss::composite
