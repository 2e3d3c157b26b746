// What is checked of a mask, and the hints for masks that do not fit: from their shapes and values.
#include <ATen/Parallel.h>
#include <ATen/functorch/BatchedTensorImpl.h>
#include <ATen/ops/ne.h>
#include <torch/library.h>

#include <atomic>
#include <sstream>

#include "checks.h"

namespace masked_loss {
namespace {

// A value other than 0 and 1 has a bit besides the lowest one.
template <class T>
bool holds_others(const T* data, std::int64_t n, std::int64_t stride) {
  T bits = 0;
  for (std::int64_t i = 0; i < n; ++i) bits |= data[i * stride];
  return (bits & static_cast<T>(~T(1))) != 0;
}

// Of the elements of a tensor of any strides, those that repeat looked at once.
template <class T>
bool holds_others(const T* data, at::IntArrayRef sizes, at::IntArrayRef strides) {
  if (sizes.empty()) return holds_others(data, 1, 1);
  const auto n = strides[0] == 0 ? std::min<std::int64_t>(sizes[0], 1) : sizes[0];
  if (sizes.size() == 1) return holds_others(data, n, strides[0]);
  for (std::int64_t i = 0; i < n; ++i) {
    if (holds_others(data + i * strides[0], sizes.slice(1), strides.slice(1))) return true;
  }
  return false;
}

template <class T>
bool holds_others(const Tensor& mask) {
  const auto* data = static_cast<const T*>(mask.const_data_ptr());
  if (!mask.is_non_overlapping_and_dense()) return holds_others(data, mask.sizes(), mask.strides());
  std::atomic<bool> found = false;
  at::parallel_for(0, mask.numel(), 1 << 16, [&](std::int64_t begin, std::int64_t end) {
    if (holds_others(data + begin, end - begin, 1)) found = true;
  });
  return found;
}

bool holds_others(const Tensor& mask) {
  switch (mask.itemsize()) {
    case 1: return holds_others<std::uint8_t>(mask);
    case 2: return holds_others<std::uint16_t>(mask);
    case 4: return holds_others<std::uint32_t>(mask);
    default: return holds_others<std::uint64_t>(mask);
  }
}

std::int64_t value_at(const Tensor& mask, std::int64_t offset) {
  const auto* data = mask.const_data_ptr();
  switch (mask.scalar_type()) {
    case at::kByte: return static_cast<const std::uint8_t*>(data)[offset];
    case at::kChar: return static_cast<const std::int8_t*>(data)[offset];
    case at::kShort: return static_cast<const std::int16_t*>(data)[offset];
    case at::kUInt16: return static_cast<const std::uint16_t*>(data)[offset];
    case at::kInt: return static_cast<const std::int32_t*>(data)[offset];
    case at::kUInt32: return static_cast<const std::uint32_t*>(data)[offset];
    default: return static_cast<const std::int64_t*>(data)[offset];
  }
}

struct Found {
  std::int64_t value;
  at::DimVector position;
};

// The first value that is neither 0 nor 1, of a mask that holds one.
Found first_other(const Tensor& mask) {
  for (std::int64_t i = 0; i < mask.numel(); ++i) {
    auto position = position_of(i, mask.sizes());
    std::int64_t offset = 0;
    for (std::size_t d = 0; d < position.size(); ++d) offset += position[d] * mask.stride(static_cast<std::int64_t>(d));
    const auto value = value_at(mask, offset);
    if (value != 0 && value != 1) return {value, position};
  }
  return {0, {}};
}

bool is_integral(const Tensor& mask) { return at::isIntegralType(mask.scalar_type(), /*includeBool=*/false); }

bool could_be_lengths(const Tensor& mask) {
  return mask.dim() >= 1 && mask.sym_numel().sym_eq(mask.sym_size(0)).maybe_as_bool().value_or(false);
}

// Sizes that fit for certain: equal, or 1.
bool fits(const c10::SymInt& size, const c10::SymInt& of) {
  const auto known = size.maybe_as_int(), whole = of.maybe_as_int();
  return known == 1 || (known && known == whole) || size.is_same(of);
}

// Where a tensor of fewer dimensions than `shape` would fit, as an index that adds the missing ones; or nothing.
std::string missing_dimensions(c10::SymIntArrayRef sizes, c10::SymIntArrayRef shape) {
  const auto missing = shape.size() - sizes.size();
  const auto fits_from = [&](std::size_t first) {
    for (std::size_t d = 0; d < sizes.size(); ++d) {
      if (!fits(sizes[d], shape[first + d])) return false;
    }
    return true;
  };
  std::string index;
  if (fits_from(0)) {  // the first dimensions, as a mask of positions has them
    index = "...";
    for (std::size_t d = 0; d < missing; ++d) index += ", None";
  } else if (fits_from(missing)) {
    for (std::size_t d = 0; d < missing; ++d) index += d == 0 ? "None" : ", None";
  } else {  // dimensions among them
    std::size_t taken = 0;
    for (const auto& size : shape) {
      const bool takes = taken < sizes.size() && fits(sizes[taken], size);
      index += (index.empty() ? "" : ", ") + std::string(takes ? ":" : "None");
      taken += takes;
    }
    if (taken < sizes.size()) return "";
  }
  return "[" + index + "]";
}

std::string rank_hint(const char* name, const Tensor& tensor, c10::SymIntArrayRef shape) {
  const auto sizes = tensor.sym_sizes();
  std::ostringstream hint;
  if (sizes.size() > shape.size()) {
    const auto more = sizes.size() - shape.size();
    hint << "; it has " << (more == 1 ? std::string("one dimension") : std::to_string(more) + " dimensions")
         << " too many";
    return hint.str();
  }
  if (sizes.size() == 1 && is_integral(tensor) && is_readable(tensor) && holds_others(tensor)) {
    hint << "; it looks like lengths: use sequence_mask(" << name << ", " << shape[1] << ")";
    return hint.str();
  }
  if (sizes.size() == 1 && is_integral(tensor) && !is_readable(tensor)) {
    hint << "; if it holds lengths, use sequence_mask(" << name << ", " << shape[1] << ")";
  }
  hint << "; add the missing dimension" << (shape.size() - sizes.size() == 1 ? "" : "s") << " of size 1";
  if (const auto index = missing_dimensions(sizes, shape); !index.empty()) hint << ", as in " << name << index;
  return hint.str();
}

}  // namespace

bool is_readable(const Tensor& tensor) {
  using enum c10::DispatchKey;
  constexpr c10::DispatchKeySet wrapped{Python, Functionalize, FuncTorchBatched, FuncTorchGradWrapper, Batched};
  return tensor.is_cpu() && tensor.layout() == at::kStrided && !tensor.key_set().has_any(wrapped) &&
         tensor.has_storage();
}

void check_mask_dtype(const char* op, const char* name, const Tensor& mask, const char* hint) {
  TORCH_CHECK_TYPE(at::isIntegralType(mask.scalar_type(), /*includeBool=*/true), op, ": expected ", name,
                   " of dtype bool or an integer dtype, got ", mask.scalar_type(), hint);
}

void check_broadcast(const char* op, const char* name, const Tensor& tensor, c10::SymIntArrayRef shape,
                     const char* of) {
  const auto sizes = tensor.sym_sizes();
  if (sizes.size() != shape.size()) {
    TORCH_CHECK(false, op, ": expected ", name, " of rank ", shape.size(), ", as ", of, " of shape ", shape,
                ", got shape ", sizes, rank_hint(name, tensor, shape));
  }
  for (std::size_t d = 0; d < sizes.size(); ++d) {
    TORCH_SYM_CHECK(sizes[d].sym_eq(shape[d]).sym_or(sizes[d].sym_eq(1)), op, ": expected ", name,
                    " with each size 1 or that of ", of, ", ", shape, ", got ", sizes);
  }
}

Tensor byte_mask(const Tensor& mask) { return mask.itemsize() == 1 ? mask : mask.ne(0); }

void check_mask_values(const char* op, const char* name, const OptionalTensor& mask) {
  if (mask && is_integral(*mask)) call<CheckMask>(*mask, op, name);
}

void check_readable_mask(const Tensor& mask, std::string_view op, std::string_view name) {
  if (!is_readable(mask) || mask.numel() == 0 || !holds_others(mask)) return;
  const auto [value, position] = first_other(mask);
  std::ostringstream hint;
  if (value == -1 || value == -2) {
    hint << "; ~ flips every bit of an integer mask: use logical_not(), or a mask of dtype bool";
  } else if (value > 1 && value != 255 && could_be_lengths(mask)) {
    hint << "; it looks like lengths: use sequence_mask(" << name << ", T)";
  } else {
    hint << "; if any value but 0 stands for True, use " << name << " != 0";
  }
  TORCH_CHECK_VALUE(false, op, ": expected ", name, " of an integer dtype to hold 0 and 1, got ", value,
                    " at position ", at::IntArrayRef(position), hint.str());
}

namespace {

void check_batched_mask(const Tensor& mask, std::string_view op, std::string_view name) {
  const c10::impl::ExcludeDispatchKeyGuard below(c10::DispatchKey::FuncTorchBatched);
  call<CheckMask>(at::functorch::maybeGetBatchedImpl(mask)->value(), op, name);
}

}  // namespace

TORCH_LIBRARY_IMPL(masked_loss, CompositeExplicitAutograd, m) { impl<CheckMask, check_readable_mask>(m); }

TORCH_LIBRARY_IMPL(masked_loss, FuncTorchBatched, m) { impl<CheckMask, check_batched_mask>(m); }

}  // namespace masked_loss
