#pragma once

#include <ATen/core/Tensor.h>
#include <masked_loss/export.h>

#include <cstdint>
#include <optional>
#include <vector>

// torch's functions over the elements that `mask` keeps (true = keep). mask broadcasts to the input, aligned at the
// last dimension. causal: query q attends to keys 0 to q (the last two dimensions are [T, S]); no mask tensor is built.
namespace masked_loss {

struct SoftmaxOptions {
  std::int64_t dim = -1;
  bool causal = false;                       // only with the last dim
  std::optional<at::ScalarType> dtype = {};  // the input is converted to it first
};

// The input's shape; exactly 0 where masked.
MASKED_LOSS_API at::Tensor softmax(const at::Tensor& input, const std::optional<at::Tensor>& mask = std::nullopt,
                                   const SoftmaxOptions& options = {});

// The input's shape; exactly -inf where masked.
MASKED_LOSS_API at::Tensor log_softmax(const at::Tensor& input, const std::optional<at::Tensor>& mask = std::nullopt,
                                       const SoftmaxOptions& options = {});

struct LogsumexpOptions {
  std::vector<std::int64_t> dim{-1};  // empty: all
  bool keepdim = false;
  bool causal = false;
  std::optional<at::ScalarType> dtype = {};
};

// The input's shape without `dim`; -inf for a fully masked slice.
MASKED_LOSS_API at::Tensor logsumexp(const at::Tensor& input, const std::optional<at::Tensor>& mask = std::nullopt,
                                     const LogsumexpOptions& options = {});

}  // namespace masked_loss
