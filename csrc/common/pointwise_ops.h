#pragma once

#include <masked_loss/pointwise.h>

#include <array>

#include "checks.h"
#include "pointwise.h"

namespace masked_loss {

// The options of every elementwise loss, as the inner ops take them.
struct PointwiseOptions {
  Reduction reduction = Reduction::Mean;
  std::int64_t loss = 0;  // the index of its formula
  OptionalTensor weight = {};
  OptionalTensor sample_weight = {};
  OptionalTensor normalizer = {};
  std::vector<double> numbers = {};  // of the formula
};
inline auto fields(const PointwiseOptions& options) {
  const auto& [reduction, loss, weight, sample_weight, normalizer, numbers] = options;
  return std::tie(reduction, loss, weight, sample_weight, normalizer, numbers);
}
inline constexpr auto kPointwiseArguments =
    "int reduction=1, int loss=0, Tensor? weight=None, Tensor? sample_weight=None, Tensor? normalizer=None, "
    "float[] numbers=[]";

// input, target and other (pos_weight or var) of the inner ops have the loss's shape and one dtype.
// (input, target, other, mask) -> the loss in the accumulation dtype
struct PointwiseForward : OpWithOptions<PointwiseOptions, Tensor, const Tensor&, const Tensor&, const OptionalTensor&,
                                        const OptionalTensor&> {
  static constexpr auto name = "_pointwise_forward";
};
// -> (loss, gradients of input and of other, which is empty where the formula has none); scalar reductions only
struct PointwiseForwardGrad : OpWithOptions<PointwiseOptions, std::tuple<Tensor, Tensor, Tensor>, const Tensor&,
                                            const Tensor&, const OptionalTensor&, const OptionalTensor&> {
  static constexpr auto name = "_pointwise_forward_grad";
};
// (grad, input, target, other, mask) -> the two gradients
struct PointwiseBackward : OpWithOptions<PointwiseOptions, std::tuple<Tensor, Tensor>, const Tensor&, const Tensor&,
                                         const Tensor&, const OptionalTensor&, const OptionalTensor&> {
  static constexpr auto name = "_pointwise_backward";
};

// What host code has to know of a formula.
struct PointwiseTraits {
  const char* name;
  double safe_input, safe_target, safe_other;
  bool has_other_slope, counts_weight, broadcasts_target, broadcasts_weight;
  Domain input_domain, target_domain, other_domain;

  const char* other_name() const { return has_other_slope ? "var" : "pos_weight"; }
};
inline const PointwiseTraits& pointwise_traits(std::int64_t loss) {
  static constexpr auto table = []<class... F>(std::tuple<F...>*) {
    return std::array{PointwiseTraits{F::name, F::safe_input, F::safe_target, F::safe_other, F::has_other_slope,
                                      F::counts_weight, F::broadcasts_target, F::broadcasts_weight, F::input_domain,
                                      F::target_domain, F::other_domain}...};
  }(static_cast<PointwiseFormulas*>(nullptr));
  TORCH_CHECK_VALUE(loss >= 0 && loss < static_cast<std::int64_t>(table.size()),
                    "_pointwise: expected loss to be the index of a formula, got ", loss);
  return table[loss];
}

// A call of a public op.
struct PointwiseCall {
  const char* op;
  Tensor input;
  Tensor target;
  OptionalTensor other;
  OptionalTensor mask;
  PointwiseOptions options;
  std::optional<at::ScalarType> dtype = {};  // of the result, by default what the operands promote to
};

template <class Formula, class Options>
PointwiseOptions pointwise_options(const Options& from, std::vector<double> numbers = {}) {
  PointwiseOptions options{from.reduction,     formula_index<Formula>(), {},
                           from.sample_weight, from.normalizer,          std::move(numbers)};
  if constexpr (requires { from.weight; }) options.weight = from.weight;
  return options;
}

// The table of the public ops. Of each one: its options, their schema arguments in the order of the struct's members,
// and what formula they mean.
inline auto fields(const MseLossOptions& options) {
  const auto& [reduction, weight, sample_weight, normalizer, dtype] = options;
  return std::tie(reduction, weight, sample_weight, normalizer, dtype);
}
struct MseLoss {
  using Options = MseLossOptions;
  static constexpr auto name = "mse_loss";
  static constexpr auto arguments = "int reduction=1, Tensor? weight=None, ";
  static PointwiseOptions resolve(const Options& o) { return pointwise_options<formula::Mse>(o); }
};

struct L1Loss {
  using Options = L1LossOptions;
  static constexpr auto name = "l1_loss";
  static constexpr auto arguments = MseLoss::arguments;
  static PointwiseOptions resolve(const Options& o) { return pointwise_options<formula::L1>(o); }
};

inline auto fields(const SmoothL1LossOptions& options) {
  const auto& [reduction, beta, sample_weight, normalizer, dtype] = options;
  return std::tie(reduction, beta, sample_weight, normalizer, dtype);
}
struct SmoothL1Loss {
  using Options = SmoothL1LossOptions;
  static constexpr auto name = "smooth_l1_loss";
  static constexpr auto arguments = "int reduction=1, float beta=1., ";
  static PointwiseOptions resolve(const Options& o) {
    TORCH_CHECK_VALUE(o.beta >= 0, name, ": expected beta of at least 0, got ", o.beta);
    return pointwise_options<formula::SmoothL1>(o, {o.beta});
  }
};

inline auto fields(const HuberLossOptions& options) {
  const auto& [reduction, delta, weight, sample_weight, normalizer, dtype] = options;
  return std::tie(reduction, delta, weight, sample_weight, normalizer, dtype);
}
struct HuberLoss {
  using Options = HuberLossOptions;
  static constexpr auto name = "huber_loss";
  static constexpr auto arguments = "int reduction=1, float delta=1., Tensor? weight=None, ";
  static PointwiseOptions resolve(const Options& o) {
    TORCH_CHECK_VALUE(o.delta > 0, name, ": expected delta above 0, got ", o.delta);
    return pointwise_options<formula::Huber>(o, {o.delta});
  }
};

inline auto fields(const BinaryCrossEntropyWithLogitsOptions& options) {
  const auto& [reduction, weight, pos_weight, sample_weight, normalizer, dtype] = options;
  return std::tie(reduction, weight, pos_weight, sample_weight, normalizer, dtype);
}
struct BinaryCrossEntropyWithLogits {
  using Options = BinaryCrossEntropyWithLogitsOptions;
  static constexpr auto name = "binary_cross_entropy_with_logits";
  static constexpr auto arguments = "int reduction=1, Tensor? weight=None, Tensor? pos_weight=None, ";
  static PointwiseOptions resolve(const Options& o) {
    return pointwise_options<formula::BinaryCrossEntropyWithLogits>(o);
  }
};

inline auto fields(const BinaryCrossEntropyOptions& options) {
  const auto& [reduction, weight, sample_weight, normalizer, dtype] = options;
  return std::tie(reduction, weight, sample_weight, normalizer, dtype);
}
struct BinaryCrossEntropy {
  using Options = BinaryCrossEntropyOptions;
  static constexpr auto name = "binary_cross_entropy";
  static constexpr auto arguments = "int reduction=1, Tensor? weight=None, ";
  static PointwiseOptions resolve(const Options& o) { return pointwise_options<formula::BinaryCrossEntropy>(o); }
};

inline auto fields(const KlDivOptions& options) {
  const auto& [reduction, log_target, sample_weight, normalizer, dtype] = options;
  return std::tie(reduction, log_target, sample_weight, normalizer, dtype);
}
struct KlDiv {
  using Options = KlDivOptions;
  static constexpr auto name = "kl_div";
  static constexpr auto arguments = "int reduction=1, bool log_target=False, ";
  static PointwiseOptions resolve(const Options& o) {
    return o.log_target ? pointwise_options<formula::KlDivOfLogTarget>(o) : pointwise_options<formula::KlDiv>(o);
  }
};

inline auto fields(const PoissonNllLossOptions& options) {
  const auto& [reduction, log_input, full, eps, sample_weight, normalizer, dtype] = options;
  return std::tie(reduction, log_input, full, eps, sample_weight, normalizer, dtype);
}
struct PoissonNllLoss {
  using Options = PoissonNllLossOptions;
  static constexpr auto name = "poisson_nll_loss";
  static constexpr auto arguments = "int reduction=1, bool log_input=True, bool full=False, float eps=1e-08, ";
  static PointwiseOptions resolve(const Options& o) {
    const double full = o.full ? 1 : 0;
    return o.log_input ? pointwise_options<formula::PoissonNllOfLogInput>(o, {full})
                       : pointwise_options<formula::PoissonNll>(o, {full, o.eps});
  }
};

inline auto fields(const GaussianNllLossOptions& options) {
  const auto& [reduction, full, eps, sample_weight, normalizer, dtype] = options;
  return std::tie(reduction, full, eps, sample_weight, normalizer, dtype);
}
struct GaussianNllLoss {
  using Options = GaussianNllLossOptions;
  static constexpr auto name = "gaussian_nll_loss";
  static constexpr auto arguments = "int reduction=1, bool full=False, float eps=1e-06, ";
  static PointwiseOptions resolve(const Options& o) {
    TORCH_CHECK_VALUE(o.eps > 0, name, ": expected eps above 0, got ", o.eps);
    return pointwise_options<formula::GaussianNll>(o, {o.full ? 1.0 : 0.0, o.eps});
  }
};

inline auto fields(const SigmoidFocalLossOptions& options) {
  const auto& [reduction, alpha, gamma, sample_weight, normalizer, dtype] = options;
  return std::tie(reduction, alpha, gamma, sample_weight, normalizer, dtype);
}
struct SigmoidFocalLoss {
  using Options = SigmoidFocalLossOptions;
  static constexpr auto name = "sigmoid_focal_loss";
  static constexpr auto arguments = "int reduction=1, float alpha=0.25, float gamma=2., ";
  static PointwiseOptions resolve(const Options& o) {
    TORCH_CHECK_VALUE(o.alpha <= 1, name, ": expected alpha in [0, 1], or below 0 for none, got ", o.alpha);
    TORCH_CHECK_VALUE(o.gamma >= 0, name, ": expected gamma of at least 0, got ", o.gamma);
    return pointwise_options<formula::SigmoidFocal>(o, {o.alpha, o.gamma});
  }
};

using PointwiseLosses = std::tuple<MseLoss, L1Loss, SmoothL1Loss, HuberLoss, BinaryCrossEntropyWithLogits,
                                   BinaryCrossEntropy, KlDiv, PoissonNllLoss, GaussianNllLoss, SigmoidFocalLoss>;

template <class Loss>
inline constexpr bool kHasVar = std::is_same_v<Loss, GaussianNllLoss>;

template <class Loss>
using PointwiseSignature = std::conditional_t<
    kHasVar<Loss>,
    OpWithOptions<typename Loss::Options, Tensor, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&>,
    OpWithOptions<typename Loss::Options, Tensor, const Tensor&, const Tensor&, const OptionalTensor&>>;

template <class Loss>
struct PointwiseOp : PointwiseSignature<Loss> {
  static constexpr auto name = Loss::name;

  template <Tensor (*run)(const PointwiseCall&)>
  static Tensor boxed(const Tensor& input, const Tensor& target, const OptionalTensor& mask,
                      const typename Loss::Options& options) {
    OptionalTensor other;
    if constexpr (requires { options.pos_weight; }) other = options.pos_weight;
    return run({Loss::name, input, target, other, mask, Loss::resolve(options), options.dtype});
  }
  template <Tensor (*run)(const PointwiseCall&)>
  static Tensor boxed_with_var(const Tensor& input, const Tensor& target, const Tensor& var, const OptionalTensor& mask,
                               const typename Loss::Options& options) {
    return run({Loss::name, input, target, var, mask, Loss::resolve(options), options.dtype});
  }
};

// visit.template operator()<Loss>() for every public op.
template <class Visit, std::size_t... index>
void for_each_pointwise(const Visit& visit, std::index_sequence<index...>) {
  (visit.template operator()<std::tuple_element_t<index, PointwiseLosses>>(), ...);
}
template <class Visit>
void for_each_pointwise(const Visit& visit) {
  for_each_pointwise(visit, std::make_index_sequence<std::tuple_size_v<PointwiseLosses>>());
}

// Registers one function for every public op.
template <Tensor (*run)(const PointwiseCall&), class Library>
void implement_pointwise(Library& m) {
  for_each_pointwise([&]<class Loss>() {
    using Op = PointwiseOp<Loss>;
    if constexpr (kHasVar<Loss>) {
      impl<Op, Op::template boxed_with_var<run>>(m);
    } else {
      impl<Op, Op::template boxed<run>>(m);
    }
  });
}

// Checks a call, and returns it with input, target and other in one dtype and the loss's shape.
PointwiseCall resolve_pointwise(PointwiseCall call);

// The same for the inner ops, whose operands are as resolve_pointwise returns them.
void check_pointwise(const Tensor& input, const Tensor& target, const OptionalTensor& other, const OptionalTensor& mask,
                     const PointwiseOptions& options);

// For a kept element outside its formula's domain: `at` counts the elements of the loss.
[[noreturn]] void throw_outside_domain(const char* op, const char* name, const Domain& domain, double value,
                                       std::int64_t at, at::IntArrayRef shape);

}  // namespace masked_loss
