#pragma once

#include "softmax_ops.h"
#include "softmax_work.h"
#include "strides.h"

namespace masked_loss {

// The tensors of a pass as the kernels of any device see them; what a pass does not have is left undefined.
struct SoftmaxOperands {
  Tensor input = {}, grad = {}, result = {};
  Tensor reduced = {}, row_grad = {};  // contiguous; the input's sizes, but 1 for `dim`
  OptionalTensor mask = {};
  std::int64_t dim = 0;
  bool causal = false;

  // Brings all of them to one rank of at least 1, and the mask to bytes and the input's sizes, by its strides.
  void resolve() {
    if (mask) mask = byte_mask(*mask).expand(input.sizes());
    if (input.dim() > 0) return;
    for (auto* tensor : {&input, &grad, &result}) {
      if (tensor->defined()) *tensor = tensor->unsqueeze(0);
    }
    if (mask) mask = mask->unsqueeze(0);
  }

  // T is the device's type for the input's dtype, A the one of what is reduced.
  template <class T, class A>
  SoftmaxWork<T, A> work() const {
    SoftmaxWork<T, A> work{};
    std::array<at::DimVector, 4> strides;
    const auto line = [&](const Tensor& tensor, int operand, std::int64_t& stride) -> const void* {
      stride = 1;
      if (!tensor.defined()) return nullptr;
      strides[operand] = row_strides(tensor, dim);
      stride = class_stride(tensor, dim);
      return tensor.const_data_ptr();
    };
    work.classes = input.size(dim);
    work.queries = causal ? input.size(-2) : 0;
    if (work.queries > 0) work.by_queries = Quotient(work.queries);
    work.input = static_cast<const T*>(line(input, 0, work.input_stride));
    work.grad = static_cast<const T*>(line(grad, 1, work.grad_stride));
    line(result, 2, work.result_stride);
    if (result.defined()) work.result = static_cast<T*>(result.mutable_data_ptr());
    work.mask = static_cast<const std::uint8_t*>(line(mask.value_or(Tensor()), 3, work.mask_stride));
    at::DimVector sizes(input.sizes());
    sizes.erase(sizes.begin() + dim);
    work.rows = make_rows<4>(sizes, strides);
    if (reduced.defined()) work.reduced = static_cast<A*>(reduced.mutable_data_ptr());
    if (row_grad.defined()) work.row_grad = static_cast<const A*>(row_grad.const_data_ptr());
    return work;
  }
};

}  // namespace masked_loss
