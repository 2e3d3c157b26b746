#include <masked_loss/masked_loss.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <array>
#include <string>
#include <variant>

#include "common/cross_entropy_ops.h"
#include "common/linear_ops.h"
#include "common/pointwise_ops.h"
#include "common/reductions_ops.h"
#include "common/softmax_ops.h"
#include "composite/masks.h"

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

Tensor masked_fill(const Tensor& input, const Tensor& mask, const Value& value) {
  return std::visit([&](const auto& v) { return masked_loss::masked_fill(input, mask, v); }, value.is);
}

void masked_fill_(Tensor input, const Tensor& mask, const Value& value) {
  std::visit([&](const auto& v) { masked_loss::masked_fill_(input, mask, v); }, value.is);
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
constexpr const char* kExpected<std::optional<double>> = "a number";
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

// What an argument of an op is in a function that pybind11 binds.
template <class T>
struct PythonType {
  using type = T;
};
template <class T>
struct PythonType<at::ArrayRef<T>> {
  using type = std::vector<T>;
};
template <>
struct PythonType<std::string_view> {
  using type = std::string;
};
template <>
struct PythonType<c10::SymInt> {
  using type = std::int64_t;
};
template <>
struct PythonType<std::optional<c10::SymInt>> {
  using type = std::optional<std::int64_t>;
};
template <class T>
using python_type = typename PythonType<std::decay_t<T>>::type;

// Adds an op, with the names of its schema.
template <class Op, class Result, class... T>
void add_op(py::module_& m, Result (*)(T...)) {
  const auto op = masked_loss::find<Op>();
  Names names;
  for (const auto& argument : op.schema().arguments()) names.push_back(argument.name());
  const auto function = [op](python_type<T>... arguments) -> Result { return op.call(arguments...); };
  add(m, Op::name, function, names, static_cast<Result (*)(python_type<T>...)>(nullptr));
}

}  // namespace

// Each function takes the arguments of its op in their order, none by default.
PYBIND11_MODULE(_C, m) {
  using namespace masked_loss;
  const auto def = [&m]<class... Op>() {
    (add_op<Op>(m, static_cast<std::add_pointer_t<typename Op::Signature>>(nullptr)), ...);
  };
  def.operator()<CrossEntropy, LossNormalizer, CheckTargets>();
  def.operator()<LinearCrossEntropy, LinearLogProb, LinearLogProbAndEntropy, LinearKL>();
  for_each_pointwise([&]<class Loss>() { def.template operator()<PointwiseOp<Loss>>(); });
  def.operator()<SoftmaxOp<SoftmaxKind::Softmax>, SoftmaxOp<SoftmaxKind::LogSoftmax>, Logsumexp>();
  def.operator()<MaskedSum, MaskedMean, MaskedVar, MaskedStd, MaskedWhiten>();
  def.operator()<SequenceMask, CausalMask, MaskFromIds>();
  // Of two ops: the value is a number or a tensor.
  add(m, "masked_fill", ::masked_fill, {"input", "mask", "value"}, ::masked_fill);
  add(m, "masked_fill_", ::masked_fill_, {"input", "mask", "value"}, ::masked_fill_);
  m.def("empty_cache", empty_cache);
}
