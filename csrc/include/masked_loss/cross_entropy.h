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
  std::optional<at::Tensor> weight = {};         // [C], weights of the classes
  std::optional<at::Tensor> sample_weight = {};  // of the positions; the mask's shape
  std::optional<at::Tensor> class_mask = {};     // true = allowed; [C], or the input's rank, each size equal or 1
  std::optional<at::Tensor> normalizer = {};     // 0-d; Mean and SequenceMean divide by it instead
  std::vector<std::int64_t> ignore_index{-100};  // positions with these targets are masked
  double label_smoothing = 0;                    // in [0, 1]
  double z_loss = 0;                             // coefficient of logsumexp(input)^2
  std::int64_t dim = 1;                          // of the classes
  std::optional<at::ScalarType> dtype = {};      // of the result; by default what input and probabilities promote to
};

// Cross entropy over the positions that `mask` keeps (true = keep); 0 if all are masked.
// input: logits [N, C, ...]; target: class indices [N, ...] or class probabilities [N, C, ...].
// mask: the rank of [N, ...], each size equal or 1.
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

// The divisor of cross_entropy's Mean: the sum of the unmasked weights. 0-d, float (double if a weight is double),
// without gradient. target: class indices of any shape; mask: its rank, each size equal or 1.
MASKED_LOSS_API at::Tensor loss_normalizer(const at::Tensor& target,
                                           const std::optional<at::Tensor>& mask = std::nullopt,
                                           const LossNormalizerOptions& options = {});

// Throws c10::IndexError if an unmasked target is outside [0, num_classes); returns a copy of `target`.
// target: any shape; mask: its rank, each size equal or 1.
MASKED_LOSS_API at::Tensor check_targets(const at::Tensor& target, std::int64_t num_classes,
                                         const std::optional<at::Tensor>& mask = std::nullopt,
                                         at::IntArrayRef ignore_index = -100);

}  // namespace masked_loss
