#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

// Everything that host code needs of a device. When kernels are emulated,
// tests/cuda_emulation/cuda/stream.h takes its place: its folder comes first among those of includes.
#define MASKED_LOSS_CUDA_IMPL(m) TORCH_LIBRARY_IMPL(masked_loss, CUDA, m)

namespace masked_loss::cuda {

struct Device {
  cudaStream_t stream;
  int multiprocessors;
};

// The device of a tensor is the current one while this lives.
class OnDevice {
 public:
  explicit OnDevice(const at::Tensor& tensor) : guard_(tensor.device()) {}

  Device device() const {
    int multiprocessors = 0;
    C10_CUDA_CHECK(
        cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, guard_.current_device().index()));
    return {c10::cuda::getCurrentCUDAStream(), multiprocessors};
  }

 private:
  c10::cuda::CUDAGuard guard_;
};

// Whether calls are recorded in a graph, where nothing can be waited for.
inline bool is_capturing() {
  return c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
}

}  // namespace masked_loss::cuda
