#pragma once

#include <ATen/core/Tensor.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace masked_loss::cuda {

// Calls body(element, number): of the device's type for the dtype, and of the one that it is computed in.
template <class Body>
void dispatch(at::ScalarType type, const Body& body) {
  switch (type) {
    case at::kFloat: return body(float{}, float{});
    case at::kDouble: return body(double{}, double{});
    case at::kBFloat16: return body(__nv_bfloat16{}, float{});
    case at::kHalf: return body(__half{}, float{});
    default: TORCH_CHECK_TYPE(false, "masked_loss: expected float32, float64, bfloat16 or float16, got ", type);
  }
}

}  // namespace masked_loss::cuda
