#include "common/masked_fill_ops.h"

#include <ATen/ops/empty_like.h>
#include <ATen/ops/ne.h>

#include <algorithm>
#include <numeric>

#include "common/strides.h"
#include "cuda/masked_fill_kernel.h"
#include "cuda/stream.h"

namespace masked_loss::cuda {
namespace {

constexpr std::int64_t kShortLine = 64;  // elements, below which a thread an element is better

// The lines of `out`, innermost the dimension in which its elements stand closest.
MaskedFillWork lines_of(const Tensor& out, const Tensor* in, const Tensor& mask) {
  at::DimVector order(out.dim());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return out.stride(a) > out.stride(b); });
  const auto in_order = [&](at::IntArrayRef values) {
    at::DimVector result;
    for (const auto d : order) result.push_back(values[d]);
    return result;
  };
  const auto wide = mask.expand(out.sizes());
  MaskedFillWork work{};
  work.lines = make_rows<3>(in_order(out.sizes()), {in_order(out.strides()), in_order((in ? *in : out).strides()),
                                                    in_order(row_strides(wide))});
  work.length = 1;
  work.element_bytes = static_cast<int>(out.itemsize());
  work.out = out.mutable_data_ptr();
  work.in = in == nullptr ? nullptr : in->const_data_ptr();
  work.mask = static_cast<const unsigned char*>(wide.const_data_ptr());
  const int last = work.lines.dims - 1;
  if (last < 0 || work.lines.sizes[last] < kShortLine) return work;
  const auto& strides = work.lines.strides;
  if (strides[0][last] != 1 || strides[1][last] != 1 || strides[2][last] > 1) return work;
  work.length = work.lines.sizes[last];
  work.shared_mask = strides[2][last] == 0;
  work.lines.dims = last;
  work.lines.count /= work.length;
  return work;
}

// The value as bits on the host, or a tensor of the input's dtype on its device, whose value is not waited for.
struct Value {
  Value(const char* op, const Tensor& input, const at::Scalar& value) : bits(element_bits(op, value, input)) {}
  Value(const char* op, const Tensor& input, const Tensor& value) {
    if (value.device() == input.device() && (!checks_values() || is_capturing())) {
      on_device = value.to(input.scalar_type());
    } else {
      bits = element_bits(op, value.item(), input);
    }
  }

  void give(MaskedFillWork& work) const {
    std::copy(bits.begin(), bits.end(), work.value);
    if (on_device.defined()) work.device_value = on_device.const_data_ptr();
  }

  Bits16 bits{};
  Tensor on_device;
};

template <class V>
Tensor masked_fill(const Tensor& input, const Tensor& mask, const V& value) {
  constexpr auto op = "masked_fill";
  check_masked_fill(input, mask, tensor_or_null(value));
  const OnDevice on(input);
  check_mask_values(op, "mask", mask);
  const Value bits(op, input, value);
  const auto from = broadcast_to_mask(input, mask), bytes = byte_mask(mask);
  const auto out = at::empty_like(from, at::MemoryFormat::Contiguous);
  auto work = lines_of(out, &from, bytes);
  bits.give(work);
  const auto device = on.device();
  masked_fill(work, device.multiprocessors, device.stream);
  return out;
}

template <class V>
void masked_fill_(Tensor& input, const Tensor& mask, const V& value) {
  constexpr auto op = "masked_fill_";
  check_masked_fill_(input, mask, tensor_or_null(value));
  check_memory_overlap(input, mask);
  const OnDevice on(input);
  check_mask_values(op, "mask", mask);
  const Value bits(op, input, value);
  // A mask in the input's own memory would change while it is read.
  const auto bytes = mask.is_alias_of(input) ? mask.ne(0) : byte_mask(mask);
  auto work = lines_of(input, nullptr, bytes);
  bits.give(work);
  const auto device = on.device();
  masked_fill(work, device.multiprocessors, device.stream);
}

}  // namespace

MASKED_LOSS_CUDA_IMPL(m) {
  impl<MaskedFill<at::Scalar>, masked_fill<at::Scalar>>(m);
  impl<MaskedFill<Tensor>, masked_fill<Tensor>>(m);
  impl<MaskedFill_<at::Scalar>, masked_fill_<at::Scalar>>(m);
  impl<MaskedFill_<Tensor>, masked_fill_<Tensor>>(m);
}

}  // namespace masked_loss::cuda
