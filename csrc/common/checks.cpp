#include "checks.h"

#include <ATen/autocast_mode.h>
#include <masked_loss/export.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <numeric>
#include <string_view>

#include "paths.h"

namespace masked_loss {

void check_layout(const char* op, const char* name, const Tensor& tensor) {
  TORCH_CHECK_TYPE(tensor.layout() == at::kStrided && !tensor.is_nested(), op, ": expected ", name,
                   " to be a dense tensor, got ",
                   tensor.is_nested()   ? "a nested one"
                   : tensor.is_mkldnn() ? "an mkldnn one"
                                        : "a sparse one");
}

void check_device(const char* op, const char* name, const Tensor& tensor, const char* other, const Tensor& there) {
  check_layout(op, name, tensor);
  TORCH_CHECK(tensor.device() == there.device(), op, ": expected ", name, " on the device of ", other, ", ",
              there.device(), ", got ", tensor.device());
}

void check_weight_dtype(const char* op, const char* name, const Tensor& weight, const char* hint) {
  const auto type = weight.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16, op,
                   ": expected ", name, " of a floating dtype, got ", type, hint);
}

void check_trailing(const char* op, const char* name, const char* of, c10::SymIntArrayRef ours,
                    c10::SymIntArrayRef theirs, bool both) {
  TORCH_CHECK(both || theirs.size() <= ours.size(), op, ": expected ", name, " to broadcast to ", of, " of shape ",
              ours, ", got ", theirs);
  for (std::size_t d = 1; d <= std::min(ours.size(), theirs.size()); ++d) {
    const auto &a = ours[ours.size() - d], &b = theirs[theirs.size() - d];
    auto fits = b.sym_eq(1).sym_or(b.sym_eq(a));
    if (both) fits = fits.sym_or(a.sym_eq(1));
    TORCH_SYM_CHECK(fits, op, ": expected ", name, " to broadcast ", both ? "with" : "to", " ", of, " of shape ", ours,
                    ", got ", theirs);
  }
}

void check_no_grad(const char* op, const char* name, const OptionalTensor& tensor) {
  TORCH_CHECK(
      !is_differentiated(tensor), op, ": expected ", name,
      " that does not require grad, got one that does or that has a tangent; the loss has no derivative for it");
}

void check_floating(const char* op, const char* name, const Tensor& tensor) {
  const auto type = tensor.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16, op,
                   ": expected ", name, " of dtype float32, float64, bfloat16 or float16, got ", type);
}

void check_dtype(const char* op, std::optional<at::ScalarType> dtype) {
  const auto type = dtype.value_or(at::kFloat);
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16, op,
                   ": expected dtype to be float32, float64, bfloat16 or float16, got ", type);
}

void check_normalizer(const char* op, const OptionalTensor& normalizer, Reduction reduction, const Tensor& beside) {
  if (!normalizer) return;
  TORCH_CHECK_VALUE(reduction != Reduction::None && reduction != Reduction::Sum, op,
                    ": expected a normalizer only with a mean for a reduction, got reduction '",
                    reduction == Reduction::None ? "none" : "sum", "'");
  check_device(op, "normalizer", *normalizer, "input", beside);
  TORCH_CHECK(normalizer->dim() == 0, op, ": expected normalizer to be a number or a 0-d tensor, got shape ",
              normalizer->sym_sizes());
  TORCH_CHECK_TYPE(!normalizer->is_complex() && normalizer->scalar_type() != at::kBool, op,
                   ": expected normalizer of a real dtype, got ", normalizer->scalar_type());
}

at::DimVector wrapped_dims(const char* op, at::IntArrayRef dim, std::int64_t rank) {
  const auto dims = std::max<std::int64_t>(rank, 1);
  at::DimVector result;
  for (const auto d : dim) {
    TORCH_CHECK_INDEX(d >= -dims && d < dims, op, ": expected dim in [", -dims, ", ", dims - 1, "], got ", d);
    const auto wrapped = d < 0 ? d + dims : d;
    TORCH_CHECK(std::find(result.begin(), result.end(), wrapped) == result.end(), op,
                ": expected dim to name each dimension once, got ", dim);
    result.push_back(wrapped);
  }
  return dim.empty() ? every_dim(dims) : result;
}

at::DimVector position_of(std::int64_t element, at::IntArrayRef shape) {
  at::DimVector position(shape.size());
  for (auto d = static_cast<std::int64_t>(shape.size()) - 1; d >= 0; --d) {
    position[d] = element % shape[d];
    element /= shape[d];
  }
  return position;
}

namespace {

std::atomic<bool>& values_checked() {
  static std::atomic<bool> checked = [] {
    const char* value = std::getenv("MASKED_LOSS_CHECK");
    return value != nullptr && std::string_view(value) == "1";
  }();
  return checked;
}

}  // namespace

bool checks_values() { return values_checked().load(std::memory_order_relaxed); }

// For the tests, which find it by its name.
extern "C" MASKED_LOSS_API void masked_loss_check_values(bool check) { values_checked() = check; }

void check_normalizer_value(const char* op, double normalizer) {
  TORCH_CHECK_VALUE(!(normalizer < 0), op, ": expected normalizer of at least 0, got ", normalizer);
}

at::DimVector every_dim(std::int64_t rank) {
  at::DimVector dims(rank);
  std::iota(dims.begin(), dims.end(), 0);
  return dims;
}

void check_integers(const char* op, const char* name, const Tensor& tensor) {
  check_layout(op, name, tensor);
  TORCH_CHECK_TYPE(at::isIntegralType(tensor.scalar_type(), /*includeBool=*/false), op, ": expected ", name,
                   " of an integer dtype, got ", tensor.scalar_type());
}

void check_not_negative(const char* op, const char* name, const c10::SymInt& value) {
  if (const auto number = value.maybe_as_int()) {
    TORCH_CHECK_VALUE(*number >= 0, op, ": expected ", name, " of at least 0, got ", *number);
  }
}

at::ScalarType accumulation_type(at::ScalarType type) { return type == at::kDouble ? at::kDouble : at::kFloat; }

at::ScalarType result_type(const Tensor& input, at::ScalarType computed, std::optional<at::ScalarType> dtype) {
  if (dtype) return *dtype;
  const bool half = computed == at::kHalf || computed == at::kBFloat16;
  const auto device = input.device().type();
  const bool autocast = at::autocast::is_autocast_available(device) && at::autocast::is_autocast_enabled(device);
  return half && autocast ? at::kFloat : computed;
}

}  // namespace masked_loss
