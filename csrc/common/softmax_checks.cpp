#include "softmax_ops.h"

#include <string_view>

namespace masked_loss {

namespace {

// The mask broadcasts from the last dimension on, as attention masks do.
void check_kept(const char* op, const Tensor& input, const OptionalTensor& mask) {
  check_layout(op, "input", input);
  if (!mask) return;
  check_device(op, "mask", *mask, "input", input);
  check_mask_dtype(op, "mask", *mask, "; what is added to the logits is no mask");
  check_trailing(op, "mask", "input", input.sym_sizes(), mask->sym_sizes());
}

// As torch's softmax and logsumexp under autocast: in float32, but on the CPU.
at::ScalarType softmax_type(const char* op, const Tensor& input, std::optional<at::ScalarType> dtype) {
  if (dtype) return *dtype;
  const auto type = input.scalar_type();
  // torch's logsumexp alone takes integers.
  if (std::string_view(op) == Logsumexp::name && at::isIntegralType(type, /*includeBool=*/true)) {
    return at::get_default_dtype_as_scalartype();
  }
  return input.is_cpu() ? type : result_type(input, type);
}

}  // namespace

at::DimVector check_softmax(const char* op, const Tensor& input, const OptionalTensor& mask, at::IntArrayRef dim,
                            bool causal) {
  check_kept(op, input, mask);
  check_floating(op, "input", input);
  const auto dims = wrapped_dims(op, dim, input.dim());
  TORCH_CHECK(!causal || input.dim() >= 2, op, ": expected input of rank 2 or more with causal, got shape ",
              input.sym_sizes());
  TORCH_CHECK_VALUE(!causal || (dims.size() == 1 && dims[0] == input.dim() - 1), op,
                    ": expected dim to be the last one with causal, got ", dim);
  return dims;
}

LogsumexpSlices logsumexp_slices(const Tensor& input, const LogsumexpOptions& options) {
  const auto dims = wrapped_dims(Logsumexp::name, options.dim, input.dim());
  return {{dims.begin(), dims.end()}, options.causal};
}

void check_softmax_grad(const char* op, const Tensor& grad, const Tensor& result) {
  check_device(op, "grad", grad, "result", result);
  TORCH_CHECK(grad.sizes() == result.sizes() && grad.scalar_type() == result.scalar_type(), op,
              ": expected grad of the result's shape and dtype, ", result.sizes(), " ", result.scalar_type(), ", got ",
              grad.sizes(), " ", grad.scalar_type());
}

Tensor resolve_softmax(const char* op, const Tensor& input, const OptionalTensor& mask, at::IntArrayRef dim,
                       bool causal, std::optional<at::ScalarType> dtype) {
  check_layout(op, "input", input);
  TORCH_CHECK_TYPE(!input.is_complex(), op, ": expected real input, got ", input.scalar_type());
  check_dtype(op, dtype);
  const auto type = softmax_type(op, input, dtype);
  const auto converted = type == input.scalar_type() ? input : input.to(type);
  check_softmax(op, converted, mask, dim, causal);
  return converted;
}

}  // namespace masked_loss
