// Stands before csrc/cuda/stream.h: the host code's device is the emulation, its tensors are those of the CPU.
#pragma once

#include <ATen/core/Tensor.h>
#include <cuda_runtime_api.h>
#include <torch/library.h>

#define MASKED_LOSS_CUDA_IMPL(m) TORCH_LIBRARY_IMPL(masked_loss, CPU, m)

namespace masked_loss::cuda {

struct Device {
  cudaStream_t stream;
  int multiprocessors;
};

// Few multiprocessors, so that the loops of persistent blocks come round.
inline Device emulated_device{nullptr, 3};

class OnDevice {
 public:
  explicit OnDevice(const at::Tensor&) {}
  Device device() const { return emulated_device; }
};

inline bool is_capturing() { return false; }

}  // namespace masked_loss::cuda
