#include <ATen/ops/empty.h>

#include <algorithm>

#include "common/reductions_operands.h"
#include "cuda/dispatch.h"
#include "cuda/operands.h"
#include "cuda/reductions_kernel.h"
#include "cuda/stream.h"

namespace masked_loss::cuda {
namespace {

// The dimensions that are kept, in their order, and then the reduced ones, those last whose elements stand closest.
at::DimVector in_memory_order(const Tensor& input, at::IntArrayRef dims) {
  at::DimVector order, reduced(dims.begin(), dims.end());
  for (std::int64_t d = 0; d < input.dim(); ++d) {
    if (std::find(dims.begin(), dims.end(), d) == dims.end()) order.push_back(d);
  }
  std::stable_sort(reduced.begin(), reduced.end(), [&](auto a, auto b) { return input.stride(a) > input.stride(b); });
  order.append(reduced.begin(), reduced.end());
  return order;
}

std::tuple<Tensor, Tensor, Tensor> masked_moments(const Tensor& given, const OptionalTensor& given_mask,
                                                  std::int64_t order, at::IntArrayRef dim) {
  auto dims = check_moments(given, given_mask, order, dim);
  check_mask_values("_masked_moments", "mask", given_mask);
  const OnDevice on(given);
  const auto moments = empty_moments(given, order, dims);
  auto input = given.dim() == 0 ? given.unsqueeze(0) : given;
  auto mask = given_mask ? byte_mask(*given_mask).expand(input.sizes()) : Tensor();
  if (dims.size() > 1) {
    const auto memory_order = in_memory_order(input, dims);
    input = input.permute(memory_order);
    if (mask.defined()) mask = mask.permute(memory_order);
    for (std::size_t i = 0; i < dims.size(); ++i) dims[i] = input.dim() - 1 - static_cast<std::int64_t>(i);
  }
  dispatch(input.scalar_type(), [&](auto t, auto a) {
    using A = decltype(a);
    const auto work = make_moments_work<decltype(t)>(input, mask, dims);
    const auto memory = at::empty({moments_bytes(work)}, given.options().dtype(at::kByte));
    find_moments(work, static_cast<int>(order), memory.mutable_data_ptr(), moments_result<A>(moments, order),
                 on.device().stream);
  });
  return moments;
}

Tensor masked_affine(const Tensor& scale, const OptionalTensor& input, const OptionalTensor& mean,
                     const OptionalTensor& offset, const OptionalTensor& mask, c10::SymIntArrayRef symbolic_sizes,
                     at::ScalarType type) {
  check_affine(scale, input, mean, offset, mask, symbolic_sizes, type);
  const OnDevice on(scale);
  const auto sizes = C10_AS_INTARRAYREF_SLOW(symbolic_sizes);
  const auto result = at::empty(sizes, scale.options().dtype(type));
  const auto accumulation = accumulation_type(type);
  const auto read_as = affine_input_type(input, type);
  AffineWork work{result.numel(), {}, {}, {}, {}, {}, result.mutable_data_ptr()};
  c10::SmallVector<Tensor, 5> owned;
  const auto set = [&](Operand& to, const OptionalTensor& tensor, at::ScalarType as) {
    if (!tensor) return;
    const auto read = as == at::kBool ? byte_mask(*tensor) : tensor->to(as);
    owned.push_back(walkable(read.expand(sizes), sizes));
    to = make_operand(owned.back(), sizes);
  };
  set(work.scale, scale, accumulation);
  set(work.input, input, read_as);
  set(work.mean, mean, accumulation);
  set(work.offset, offset, accumulation);
  set(work.mask, mask, at::kBool);
  dispatch(read_as, [&](auto t, auto) {
    (read_as == type ? affine<decltype(t)> : affine_wide<decltype(t)>)(work, on.device().stream);
  });
  return result;
}

}  // namespace

MASKED_LOSS_CUDA_IMPL(m) {
  impl<MaskedMoments, masked_moments>(m);
  impl<MaskedAffine, masked_affine>(m);
}

}  // namespace masked_loss::cuda
