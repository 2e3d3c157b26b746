#include <masked_loss/masked_loss.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <variant>

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Value = std::variant<Tensor, bool, std::int64_t, double, c10::complex<double>>;

Tensor cross_entropy(const Tensor& input, const Tensor& target, const OptionalTensor& mask, std::int64_t reduction,
                     const OptionalTensor& weight, const OptionalTensor& sample_weight,
                     const OptionalTensor& class_mask, const OptionalTensor& normalizer,
                     const std::vector<std::int64_t>& ignore_index, double label_smoothing, double z_loss,
                     std::int64_t dim) {
  return masked_loss::cross_entropy(input, target, mask,
                                    {.reduction = static_cast<masked_loss::Reduction>(reduction),
                                     .weight = weight,
                                     .sample_weight = sample_weight,
                                     .class_mask = class_mask,
                                     .normalizer = normalizer,
                                     .ignore_index = ignore_index,
                                     .label_smoothing = label_smoothing,
                                     .z_loss = z_loss,
                                     .dim = dim});
}

Tensor loss_normalizer(const Tensor& target, const OptionalTensor& mask, const OptionalTensor& weight,
                       const OptionalTensor& sample_weight, const OptionalTensor& class_mask,
                       const std::vector<std::int64_t>& ignore_index, std::int64_t dim) {
  return masked_loss::loss_normalizer(target, mask,
                                      {.weight = weight,
                                       .sample_weight = sample_weight,
                                       .class_mask = class_mask,
                                       .ignore_index = ignore_index,
                                       .dim = dim});
}

Tensor check_targets(const Tensor& target, std::int64_t num_classes, const OptionalTensor& mask,
                     const std::vector<std::int64_t>& ignore_index) {
  return masked_loss::check_targets(target, num_classes, mask, ignore_index);
}

// Calls `fill` with a tensor or with a c10::Scalar, which pybind11 cannot take by itself.
template <class Fill>
auto with_value(const Value& value, const Fill& fill) {
  return std::visit(
      [&](const auto& v) {
        if constexpr (std::is_same_v<std::decay_t<decltype(v)>, Tensor>) {
          return fill(v);
        } else {
          return fill(at::Scalar(v));
        }
      },
      value);
}

Tensor masked_fill(const Tensor& input, const Tensor& mask, const Value& value) {
  return with_value(value, [&](const auto& v) { return masked_loss::masked_fill(input, mask, v); });
}

void masked_fill_(Tensor input, const Tensor& mask, const Value& value) {
  with_value(value, [&](const auto& v) { masked_loss::masked_fill_(input, mask, v); });
}

// A loss of elements; `Argument...` are the members of its options after the reduction, in their order.
template <class... Argument, class Options>
auto pointwise(Tensor (*loss)(const Tensor&, const Tensor&, const OptionalTensor&, const Options&)) {
  return [loss](const Tensor& input, const Tensor& target, const OptionalTensor& mask, std::int64_t reduction,
                Argument... argument, const OptionalTensor& sample_weight, const OptionalTensor& normalizer,
                std::optional<at::ScalarType> dtype) {
    return loss(input, target, mask,
                Options{static_cast<masked_loss::Reduction>(reduction), argument..., sample_weight, normalizer, dtype});
  };
}

Tensor gaussian_nll_loss(const Tensor& input, const Tensor& target, const Tensor& var, const OptionalTensor& mask,
                         std::int64_t reduction, bool full, double eps, const OptionalTensor& sample_weight,
                         const OptionalTensor& normalizer, std::optional<at::ScalarType> dtype) {
  return masked_loss::gaussian_nll_loss(
      input, target, var, mask,
      {static_cast<masked_loss::Reduction>(reduction), full, eps, sample_weight, normalizer, dtype});
}

using Softmax = Tensor (*)(const Tensor&, const OptionalTensor&, const masked_loss::SoftmaxOptions&);

auto softmax(Softmax function) {
  return [function](const Tensor& input, const OptionalTensor& mask, std::int64_t dim, bool causal,
                    std::optional<at::ScalarType> dtype) {
    return function(input, mask, {.dim = dim, .causal = causal, .dtype = dtype});
  };
}

Tensor logsumexp(const Tensor& input, const OptionalTensor& mask, const std::vector<std::int64_t>& dim, bool keepdim,
                 bool causal, std::optional<at::ScalarType> dtype) {
  return masked_loss::logsumexp(input, mask, {.dim = dim, .keepdim = keepdim, .causal = causal, .dtype = dtype});
}

using Reduction = Tensor (*)(const Tensor&, const OptionalTensor&, const masked_loss::ReductionOptions&);
using Variance = Tensor (*)(const Tensor&, const OptionalTensor&, const masked_loss::VarianceOptions&);

auto reduction(Reduction function) {
  return [function](const Tensor& input, const OptionalTensor& mask, const std::vector<std::int64_t>& dim,
                    bool keepdim) { return function(input, mask, {.dim = dim, .keepdim = keepdim}); };
}

auto variance(Variance function) {
  return [function](const Tensor& input, const OptionalTensor& mask, const std::vector<std::int64_t>& dim, bool keepdim,
                    double correction) {
    return function(input, mask, {.dim = dim, .keepdim = keepdim, .correction = correction});
  };
}

Tensor masked_whiten(const Tensor& input, const OptionalTensor& mask, const std::vector<std::int64_t>& dim) {
  return masked_loss::masked_whiten(input, mask, dim);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  // The wrapper turns c10 errors into Python's and releases the GIL.
  const auto def = [&m](const char* name, auto function, auto... arguments) {
    m.def(name, torch::wrap_pybind_function_no_gil(function), py::arg(arguments)...);
  };
  def("cross_entropy", cross_entropy, "input", "target", "mask", "reduction", "weight", "sample_weight", "class_mask",
      "normalizer", "ignore_index", "label_smoothing", "z_loss", "dim");
  def("loss_normalizer", loss_normalizer, "target", "mask", "weight", "sample_weight", "class_mask", "ignore_index",
      "dim");
  def("check_targets", check_targets, "target", "num_classes", "mask", "ignore_index");
  const auto def_loss = [&def](const char* name, auto loss, auto... arguments) {
    def(name, loss, "input", "target", "mask", "reduction", arguments..., "sample_weight", "normalizer", "dtype");
  };
  namespace ml = masked_loss;
  using Weight = const OptionalTensor&;
  def_loss("mse_loss", pointwise<Weight>(ml::mse_loss), "weight");
  def_loss("l1_loss", pointwise<Weight>(ml::l1_loss), "weight");
  def_loss("smooth_l1_loss", pointwise<double>(ml::smooth_l1_loss), "beta");
  def_loss("huber_loss", pointwise<double, Weight>(ml::huber_loss), "delta", "weight");
  def_loss("binary_cross_entropy_with_logits", pointwise<Weight, Weight>(ml::binary_cross_entropy_with_logits),
           "weight", "pos_weight");
  def_loss("binary_cross_entropy", pointwise<Weight>(ml::binary_cross_entropy), "weight");
  def_loss("kl_div", pointwise<bool>(ml::kl_div), "log_target");
  def_loss("poisson_nll_loss", pointwise<bool, bool, double>(ml::poisson_nll_loss), "log_input", "full", "eps");
  def_loss("sigmoid_focal_loss", pointwise<double, double>(ml::sigmoid_focal_loss), "alpha", "gamma");
  def("gaussian_nll_loss", gaussian_nll_loss, "input", "target", "var", "mask", "reduction", "full", "eps",
      "sample_weight", "normalizer", "dtype");
  def("softmax", softmax(ml::softmax), "input", "mask", "dim", "causal", "dtype");
  def("log_softmax", softmax(ml::log_softmax), "input", "mask", "dim", "causal", "dtype");
  def("logsumexp", logsumexp, "input", "mask", "dim", "keepdim", "causal", "dtype");
  def("masked_sum", reduction(ml::masked_sum), "input", "mask", "dim", "keepdim");
  def("masked_mean", reduction(ml::masked_mean), "input", "mask", "dim", "keepdim");
  def("masked_var", variance(ml::masked_var), "input", "mask", "dim", "keepdim", "correction");
  def("masked_std", variance(ml::masked_std), "input", "mask", "dim", "keepdim", "correction");
  def("masked_whiten", masked_whiten, "input", "mask", "dim");
  def("masked_fill", masked_fill, "input", "mask", "value");
  def("masked_fill_", masked_fill_, "input", "mask", "value");
}
