#pragma once

#include <ATen/core/Tensor.h>
#include <masked_loss/export.h>
#include <masked_loss/reduction.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace masked_loss {

struct CrossEntropyOptions {
  Reduction reduction = Reduction::Mean;
  std::optional<at::Tensor> weight = {};         // [C], of the classes
  std::optional<at::Tensor> sample_weight = {};  // the target's rank, each size equal or 1
  std::optional<at::Tensor> class_mask = {};     // [C], or the input's rank with each size equal or 1; true = allowed
  std::optional<at::Tensor> normalizer = {};     // 0-d: what Mean divides by; with SequenceMean the number of sequences
  std::vector<std::int64_t> ignore_index{-100};
  double label_smoothing = 0;
  double z_loss = 0;
  std::int64_t dim = 1;
  std::optional<at::ScalarType> dtype = {};  // of the result, by default what the logits and probabilities promote to
};

// Cross entropy over the positions that `mask` keeps; 0 when it keeps none. input [N, C, ...] of logits; target [N,
// ...] of class indices, or [N, C, ...] of class probabilities; mask as [N, ...], each size equal or 1 (true = keep).
MASKED_LOSS_API at::Tensor cross_entropy(const at::Tensor& input, const at::Tensor& target,
                                         const std::optional<at::Tensor>& mask = std::nullopt,
                                         const CrossEntropyOptions& options = {});

struct LossNormalizerOptions {
  std::optional<at::Tensor> weight = {};
  std::optional<at::Tensor> sample_weight = {};
  std::optional<at::Tensor> class_mask = {};
  std::vector<std::int64_t> ignore_index{-100};
  std::int64_t dim = 1;
};

// The sum of the kept weights that cross entropy's Mean divides by: 0-d, float (double if a weight is), no gradient.
MASKED_LOSS_API at::Tensor loss_normalizer(const at::Tensor& target,
                                           const std::optional<at::Tensor>& mask = std::nullopt,
                                           const LossNormalizerOptions& options = {});

// A copy of `target`; throws c10::IndexError where a kept target lies outside [0, num_classes).
MASKED_LOSS_API at::Tensor check_targets(const at::Tensor& target, std::int64_t num_classes,
                                         const std::optional<at::Tensor>& mask = std::nullopt,
                                         at::IntArrayRef ignore_index = -100);

}  // namespace masked_loss
