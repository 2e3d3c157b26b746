#pragma once

#include <ATen/core/Tensor.h>
#include <masked_loss/export.h>

#include <cstdint>
#include <optional>
#include <vector>

// torch's functions of the elements that `mask` keeps (true = keep), whose shape broadcasts to the input's from the
// last dimension on. `causal` keeps of row q of the last two dimensions [T, S] the first q + 1 elements, without a
// mask.
namespace masked_loss {

struct SoftmaxOptions {
  std::int64_t dim = -1;
  bool causal = false;                       // for the last dimension only
  std::optional<at::ScalarType> dtype = {};  // what the input is converted to first
};

// The input's shape; 0 where masked.
MASKED_LOSS_API at::Tensor softmax(const at::Tensor& input, const std::optional<at::Tensor>& mask = std::nullopt,
                                   const SoftmaxOptions& options = {});

// The input's shape; -inf where masked.
MASKED_LOSS_API at::Tensor log_softmax(const at::Tensor& input, const std::optional<at::Tensor>& mask = std::nullopt,
                                       const SoftmaxOptions& options = {});

struct LogsumexpOptions {
  std::vector<std::int64_t> dim{-1};  // several are reduced together; none: all
  bool keepdim = false;
  bool causal = false;
  std::optional<at::ScalarType> dtype = {};
};

// The input's shape without `dim`; -inf where nothing is kept.
MASKED_LOSS_API at::Tensor logsumexp(const at::Tensor& input, const std::optional<at::Tensor>& mask = std::nullopt,
                                     const LogsumexpOptions& options = {});

}  // namespace masked_loss
