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
  def("masked_fill", masked_fill, "input", "mask", "value");
  def("masked_fill_", masked_fill_, "input", "mask", "value");
}
