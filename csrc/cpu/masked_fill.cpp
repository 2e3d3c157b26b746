#include <ATen/Dispatch_v2.h>
#include <ATen/TensorIterator.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <array>
#include <cstring>

#include "common/checks.h"
#include "common/huge_pages.h"

namespace masked_loss::cpu {
namespace {

// Elements are moved as bits: an element of any dtype is one of these.
using Bits16 = std::array<std::uint64_t, 2>;

template <class Body>
void dispatch_bits(std::int64_t bytes, const Body& body) {
  switch (bytes) {
    case 1: return body(std::uint8_t{});
    case 2: return body(std::uint16_t{});
    case 4: return body(std::uint32_t{});
    case 8: return body(std::uint64_t{});
    case 16: return body(Bits16{});
    default: TORCH_INTERNAL_ASSERT(false, "masked_fill: no dtype has ", bytes, " bytes");
  }
}

// The bits of `value` in the dtype of `input`, at the front.
Bits16 as_element(const char* op, const at::Scalar& value, const Tensor& input) {
  Bits16 bits{};
  const auto take = [&] {
    AT_DISPATCH_V2(input.scalar_type(), "masked_fill", AT_WRAP([&] {
                     const auto element = value.to<scalar_t>();
                     std::memcpy(&bits, &element, sizeof(element));
                   }),
                   AT_EXPAND(AT_ALL_TYPES_AND_COMPLEX), AT_EXPAND(AT_BAREBONES_UNSIGNED_TYPES),
                   AT_EXPAND(AT_FLOAT8_TYPES), at::kBool, at::kHalf, at::kBFloat16, at::kComplexHalf);
  };
  try {
    take();
  } catch (const c10::Error&) {
    TORCH_CHECK(false, op, ": expected value that input's dtype, ", input.scalar_type(), ", can hold, got ", value);
  }
  return bits;
}

// One byte an element, which is what the loops read.
Tensor byte_mask(const Tensor& mask) { return mask.itemsize() == 1 ? mask : mask.ne(0); }

template <class T>
T at_byte(const char* data, std::int64_t byte) {
  T value;
  std::memcpy(&value, data + byte, sizeof(T));
  return value;
}

// out = mask ? value : in
template <class T>
void fill_row(char* out, const char* in, const char* mask, const std::int64_t* strides, std::int64_t n, T value) {
  constexpr auto size = static_cast<std::int64_t>(sizeof(T));
  const bool dense = strides[0] == size && (strides[1] == size || n == 1);
  if (strides[2] == 0 && dense) {
    if (*mask != 0) {
      std::fill_n(reinterpret_cast<T*>(out), n, value);
    } else {
      std::memcpy(out, in, n * size);
    }
  } else if (strides[2] == 1 && dense) {
    auto* to = reinterpret_cast<T*>(out);
    const auto* from = reinterpret_cast<const T*>(in);
    for (std::int64_t i = 0; i < n; ++i) to[i] = mask[i] != 0 ? value : from[i];
  } else {
    for (std::int64_t i = 0; i < n; ++i) {
      const T kept = at_byte<T>(in, i * strides[1]);
      const T filled = mask[i * strides[2]] != 0 ? value : kept;
      std::memcpy(out + i * strides[0], &filled, sizeof(T));
    }
  }
}

// The same in place: what is kept is not touched.
template <class T>
void fill_row_(char* out, const char* mask, const std::int64_t* strides, std::int64_t n, T value) {
  if (strides[1] == 0 && *mask == 0) return;
  if (strides[1] == 0 && strides[0] == static_cast<std::int64_t>(sizeof(T))) {
    std::fill_n(reinterpret_cast<T*>(out), n, value);
    return;
  }
  for (std::int64_t i = 0; i < n; ++i) {
    if (mask[i * strides[1]] != 0) std::memcpy(out + i * strides[0], &value, sizeof(T));
  }
}

Tensor masked_fill(const Tensor& input, const Tensor& mask, const at::Scalar& value) {
  check_masked_fill(input, mask, nullptr);
  const auto element = as_element("masked_fill", value, input);
  const auto from = broadcast_to_mask(input, mask), bytes = byte_mask(mask);
  auto out = with_huge_pages(at::empty_like(from, at::MemoryFormat::Contiguous));
  auto iterator = at::TensorIteratorConfig()
                      .set_check_mem_overlap(false)
                      .check_all_same_dtype(false)
                      .resize_outputs(false)
                      .add_output(out)
                      .add_const_input(from)
                      .add_const_input(bytes)
                      .build();
  dispatch_bits(input.itemsize(), [&](auto bits) {
    const auto fill = at_byte<decltype(bits)>(reinterpret_cast<const char*>(&element), 0);
    iterator.for_each([=](char** data, const std::int64_t* strides, std::int64_t n, std::int64_t rows) {
      for (std::int64_t r = 0; r < rows; ++r) {
        fill_row(data[0] + r * strides[3], data[1] + r * strides[4], data[2] + r * strides[5], strides, n, fill);
      }
    });
  });
  return out;
}

void masked_fill_(Tensor& input, const Tensor& mask, const at::Scalar& value) {
  check_masked_fill_(input, mask, nullptr);
  check_memory_overlap(input, mask);
  const auto element = as_element("masked_fill_", value, input);
  // A mask that is the input itself changes while it is read.
  const auto bytes = mask.is_same(input) ? mask.clone() : byte_mask(mask);
  auto iterator = at::TensorIteratorConfig()
                      .set_check_mem_overlap(false)
                      .check_all_same_dtype(false)
                      .resize_outputs(false)
                      .add_output(input)
                      .add_const_input(bytes)
                      .build();
  dispatch_bits(input.itemsize(), [&](auto bits) {
    const auto fill = at_byte<decltype(bits)>(reinterpret_cast<const char*>(&element), 0);
    iterator.for_each([=](char** data, const std::int64_t* strides, std::int64_t n, std::int64_t rows) {
      for (std::int64_t r = 0; r < rows; ++r) {
        fill_row_(data[0] + r * strides[2], data[1] + r * strides[3], strides, n, fill);
      }
    });
  });
}

Tensor masked_fill_value(const Tensor& input, const Tensor& mask, const Tensor& value) {
  check_masked_fill(input, mask, &value);
  return masked_fill(input, mask, value.item());
}

void masked_fill_value_(Tensor& input, const Tensor& mask, const Tensor& value) {
  check_masked_fill_(input, mask, &value);
  masked_fill_(input, mask, value.item());
}

}  // namespace

TORCH_LIBRARY_IMPL(masked_loss, CPU, m) {
  m.impl("masked_fill.Scalar", masked_fill);
  m.impl("masked_fill.Tensor", masked_fill_value);
  m.impl("masked_fill_.Scalar", masked_fill_);
  m.impl("masked_fill_.Tensor", masked_fill_value_);
}

}  // namespace masked_loss::cpu
