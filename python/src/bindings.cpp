#include <ATen/core/dispatch/Dispatcher.h>
#include <masked_loss/masked_loss.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <array>
#include <string>
#include <variant>

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// A number or a tensor. pybind11's variant would try torch's complex number, which leaves an error behind.
struct Value {
  std::variant<Tensor, at::Scalar> is;
};

}  // namespace

template <>
struct pybind11::detail::type_caster<Value> {
  PYBIND11_TYPE_CASTER(Value, const_name("number | torch.Tensor"));

  bool load(handle source, bool) {
    const auto take = [&]<class T, class To>(To*) {
      make_caster<T> caster;
      if (!caster.load(source, /*convert=*/true)) return false;
      value.is = To(cast_op<T>(caster));
      return true;
    };
    at::Scalar* scalar = nullptr;
    if (take.template operator()<Tensor>(static_cast<Tensor*>(nullptr))) return true;
    if (PyBool_Check(source.ptr())) return take.template operator()<bool>(scalar);
    if (PyComplex_Check(source.ptr())) return take.template operator()<c10::complex<double>>(scalar);
    if (PyIndex_Check(source.ptr())) return take.template operator()<std::int64_t>(scalar);
    return take.template operator()<double>(scalar);
  }
};

namespace {

Tensor cross_entropy(const Tensor& input, const Tensor& target, const OptionalTensor& mask, std::int64_t reduction,
                     const OptionalTensor& weight, const OptionalTensor& sample_weight,
                     const OptionalTensor& class_mask, const OptionalTensor& normalizer,
                     const std::vector<std::int64_t>& ignore_index, double label_smoothing, double z_loss,
                     std::int64_t dim, std::optional<at::ScalarType> dtype) {
  return masked_loss::cross_entropy(input, target, mask,
                                    {.reduction = static_cast<masked_loss::Reduction>(reduction),
                                     .weight = weight,
                                     .sample_weight = sample_weight,
                                     .class_mask = class_mask,
                                     .normalizer = normalizer,
                                     .ignore_index = ignore_index,
                                     .label_smoothing = label_smoothing,
                                     .z_loss = z_loss,
                                     .dim = dim,
                                     .dtype = dtype});
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

Tensor masked_fill(const Tensor& input, const Tensor& mask, const Value& value) {
  return std::visit([&](const auto& v) { return masked_loss::masked_fill(input, mask, v); }, value.is);
}

void masked_fill_(Tensor input, const Tensor& mask, const Value& value) {
  std::visit([&](const auto& v) { masked_loss::masked_fill_(input, mask, v); }, value.is);
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
  return [function](const Tensor& input, const OptionalTensor& mask, const std::vector<std::int64_t>& dim, bool keepdim,
                    std::optional<at::ScalarType> dtype) {
    return function(input, mask, {.dim = dim, .keepdim = keepdim, .dtype = dtype});
  };
}

auto variance(Variance function) {
  return [function](const Tensor& input, const OptionalTensor& mask, const std::vector<std::int64_t>& dim, bool keepdim,
                    double correction, std::optional<at::ScalarType> dtype) {
    return function(input, mask, {.dim = dim, .keepdim = keepdim, .correction = correction, .dtype = dtype});
  };
}

Tensor masked_whiten(const Tensor& input, const OptionalTensor& mask, const std::vector<std::int64_t>& dim,
                     std::optional<at::ScalarType> dtype) {
  return masked_loss::masked_whiten(input, mask, {.dim = dim, .dtype = dtype});
}

// By its op, which takes the side as a word.
Tensor sequence_mask(const Tensor& lengths, std::int64_t maxlen, const std::string& padding_side) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("masked_loss::sequence_mask", "")
                             .typed<Tensor(const Tensor&, c10::SymInt, std::string_view)>();
  return op.call(lengths, maxlen, padding_side);
}

Tensor causal_mask(std::int64_t query_len, std::optional<std::int64_t> key_len, std::optional<at::Device> device) {
  return masked_loss::causal_mask(query_len, key_len, device);
}

Tensor mask_from_ids(const Tensor& tokens, const std::vector<std::int64_t>& ids) {
  return masked_loss::mask_from_ids(tokens, ids);
}

// What an argument of type T has to be, in an error.
template <class T>
constexpr const char* kExpected = nullptr;
template <>
constexpr const char* kExpected<Tensor> = "a Tensor";
template <>
constexpr const char* kExpected<OptionalTensor> = "a Tensor";
template <>
constexpr const char* kExpected<Value> = "a number or a 0-d Tensor";
template <>
constexpr const char* kExpected<bool> = "a bool";
template <>
constexpr const char* kExpected<double> = "a number";
template <>
constexpr const char* kExpected<std::int64_t> = "an int";
template <>
constexpr const char* kExpected<std::optional<std::int64_t>> = "an int";
template <>
constexpr const char* kExpected<std::vector<std::int64_t>> = "a list of ints";
template <>
constexpr const char* kExpected<std::string> = "a str";
template <>
constexpr const char* kExpected<std::optional<at::Device>> = "a torch.device";
template <>
constexpr const char* kExpected<std::optional<at::ScalarType>> = "a torch.dtype";

template <class T>
constexpr bool kIsTensor = std::is_same_v<T, Tensor> || std::is_same_v<T, OptionalTensor>;

using Names = std::vector<std::string>;

std::string type_name(py::handle value) { return py::str(py::type::handle_of(value).attr("__name__")); }

// Of a number or a string, which are short; else empty.
std::string short_repr(py::handle value) {
  const auto* type = Py_TYPE(value.ptr());
  const bool is_short = value.is_none() || type == &PyBool_Type || type == &PyLong_Type || type == &PyFloat_Type ||
                        type == &PyComplex_Type || type == &PyUnicode_Type;
  return is_short ? std::string(py::repr(value)) : std::string();
}

// What may have been meant by something that stands where a tensor belongs.
std::string tensor_hint(const std::string& name, const Names& names, py::handle value) {
  const auto has = [&](const char* other) { return std::find(names.begin(), names.end(), other) != names.end(); };
  const auto type = type_name(value), text = short_repr(value);
  if (value.is_none()) return "";
  if (type == "str")
    return name == "mask" && has("reduction") ? "; a reduction is passed by name, reduction=" + text : "";
  if (type == "int" && name == "mask" && has("dim")) return "; a dimension is passed by name, dim=" + text;
  if (!text.empty()) return "; use torch.tensor(" + text + ")";
  if (type == "PackedSequence") return "; use torch.nn.utils.rnn.pad_packed_sequence";
  if (!py::hasattr(value, "__array__") && !py::isinstance<py::list>(value)) return "";
  return "; use torch.as_tensor(" + name + ")";
}

// Raises the error of the first argument that has not the type of its parameter, if there is one. Never with what an
// argument holds, which may be large.
template <class... T>
void explain(const std::string& op, const Names& names, const py::args& arguments) {
  std::size_t at = 0;
  const auto check = [&]<class U>() {
    const auto i = at++;
    if (i >= arguments.size()) return;
    const py::handle value = arguments[i];
    if (py::detail::make_caster<U>().load(value, /*convert=*/true)) return;
    const auto text = short_repr(value), type = type_name(value);
    const auto got = text.empty() || value.is_none() ? type == "NoneType" ? "None" : type : text + " (" + type + ")";
    throw py::type_error(op + ": expected " + names[i] + " to be " + kExpected<U> + ", got " + got +
                         (kIsTensor<U> ? tensor_hint(names[i], names, value) : ""));
  };
  (check.template operator()<std::decay_t<T>>(), ...);
}

const Tensor* tensor_in(const Tensor& argument) { return &argument; }
const Tensor* tensor_in(const OptionalTensor& argument) { return argument ? &*argument : nullptr; }
template <class T>
const Tensor* tensor_in(const T&) {
  return nullptr;
}

// A DTensor has no rules of ours for its placements yet; torch's own error for that does not say what to do.
void refuse_dtensor(const char* op, const std::string& name, const Tensor* tensor) {
  if (tensor == nullptr || !tensor->unsafeGetTensorImpl()->is_python_dispatch()) return;
  if (type_name(py::cast(*tensor)) != "DTensor") return;
  throw py::type_error(std::string(op) + ": expected " + name + " to be a plain Tensor, got DTensor; pass " + name +
                       ".full_tensor(), or to_local() where each rank has rows of its own");
}

// Adds a function, with a second overload that tells what is wrong with arguments that the first does not take. torch's
// wrapper turns c10 errors into Python's and releases the GIL.
template <class Function, class Result, class... T>
void add(py::module_& m, const char* op, Function function, const Names& names, Result (*)(T...)) {
  m.def(op, [op, names, wrapped = torch::wrap_pybind_function_no_gil(function)](T... arguments) -> Result {
    std::size_t i = 0;
    (refuse_dtensor(op, names[i++], tensor_in(arguments)), ...);
    return wrapped(arguments...);
  });
  m.def(op, [op, names](const py::args& arguments) {
    explain<T...>(op, names, arguments);
    throw py::reference_cast_error();  // on to the first overload once more, which then converts
  });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  const auto def = [&m](const char* name, auto function, auto... arguments) {
    using Signature = py::detail::function_signature_t<decltype(function)>;
    add(m, name, function, {arguments...}, static_cast<std::add_pointer_t<Signature>>(nullptr));
  };
  def("cross_entropy", cross_entropy, "input", "target", "mask", "reduction", "weight", "sample_weight", "class_mask",
      "normalizer", "ignore_index", "label_smoothing", "z_loss", "dim", "dtype");
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
  def("masked_sum", reduction(ml::masked_sum), "input", "mask", "dim", "keepdim", "dtype");
  def("masked_mean", reduction(ml::masked_mean), "input", "mask", "dim", "keepdim", "dtype");
  def("masked_var", variance(ml::masked_var), "input", "mask", "dim", "keepdim", "correction", "dtype");
  def("masked_std", variance(ml::masked_std), "input", "mask", "dim", "keepdim", "correction", "dtype");
  def("masked_whiten", masked_whiten, "input", "mask", "dim", "dtype");
  def("sequence_mask", sequence_mask, "lengths", "maxlen", "padding_side");
  def("causal_mask", causal_mask, "query_len", "key_len", "device");
  def("mask_from_ids", mask_from_ids, "tokens", "ids");
  def("masked_fill", masked_fill, "input", "mask", "value");
  def("masked_fill_", masked_fill_, "input", "mask", "value");
  def("empty_cache", ml::empty_cache);
}
