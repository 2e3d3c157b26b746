#pragma once

#include <ATen/core/Tensor.h>
#include <masked_loss/export.h>
#include <masked_loss/reduction.h>

#include <optional>

// Losses of an element, over the elements that `mask` keeps (true = keep); 0 when it keeps none. input and target
// broadcast as in torch; mask and sample_weight have the rank of the unreduced loss, each size equal or 1.
namespace masked_loss {

struct MseLossOptions {
  Reduction reduction = Reduction::Mean;
  std::optional<at::Tensor> weight = {};         // of elements: Mean divides by its sum
  std::optional<at::Tensor> sample_weight = {};  // of elements: Mean divides by its sum
  std::optional<at::Tensor> normalizer = {};  // 0-d: what Mean divides by; SequenceMean, BatchMean: how many there are
  std::optional<at::ScalarType> dtype = {};   // of the result, by default what input and target promote to
};
using L1LossOptions = MseLossOptions;

struct SmoothL1LossOptions {
  Reduction reduction = Reduction::Mean;
  double beta = 1;
  std::optional<at::Tensor> sample_weight = {};
  std::optional<at::Tensor> normalizer = {};
  std::optional<at::ScalarType> dtype = {};
};

struct HuberLossOptions {
  Reduction reduction = Reduction::Mean;
  double delta = 1;
  std::optional<at::Tensor> weight = {};  // multiplies the loss; Mean does not divide by it
  std::optional<at::Tensor> sample_weight = {};
  std::optional<at::Tensor> normalizer = {};
  std::optional<at::ScalarType> dtype = {};
};

struct BinaryCrossEntropyOptions {
  Reduction reduction = Reduction::Mean;
  std::optional<at::Tensor> weight = {};  // multiplies the loss; Mean does not divide by it
  std::optional<at::Tensor> sample_weight = {};
  std::optional<at::Tensor> normalizer = {};
  std::optional<at::ScalarType> dtype = {};
};

struct BinaryCrossEntropyWithLogitsOptions {
  Reduction reduction = Reduction::Mean;
  std::optional<at::Tensor> weight = {};      // multiplies the loss; Mean does not divide by it
  std::optional<at::Tensor> pos_weight = {};  // of positive targets; broadcasts to them
  std::optional<at::Tensor> sample_weight = {};
  std::optional<at::Tensor> normalizer = {};
  std::optional<at::ScalarType> dtype = {};
};

struct KlDivOptions {
  Reduction reduction = Reduction::Mean;
  bool log_target = false;
  std::optional<at::Tensor> sample_weight = {};
  std::optional<at::Tensor> normalizer = {};
  std::optional<at::ScalarType> dtype = {};
};

struct PoissonNllLossOptions {
  Reduction reduction = Reduction::Mean;
  bool log_input = true;
  bool full = false;
  double eps = 1e-8;
  std::optional<at::Tensor> sample_weight = {};
  std::optional<at::Tensor> normalizer = {};
  std::optional<at::ScalarType> dtype = {};
};

struct GaussianNllLossOptions {
  Reduction reduction = Reduction::Mean;
  bool full = false;
  double eps = 1e-6;
  std::optional<at::Tensor> sample_weight = {};
  std::optional<at::Tensor> normalizer = {};
  std::optional<at::ScalarType> dtype = {};
};

struct SigmoidFocalLossOptions {
  Reduction reduction = Reduction::Mean;
  double alpha = 0.25;  // below 0: none
  double gamma = 2;
  std::optional<at::Tensor> sample_weight = {};
  std::optional<at::Tensor> normalizer = {};
  std::optional<at::ScalarType> dtype = {};
};

// (input - target)^2
MASKED_LOSS_API at::Tensor mse_loss(const at::Tensor& input, const at::Tensor& target,
                                    const std::optional<at::Tensor>& mask = std::nullopt,
                                    const MseLossOptions& options = {});
// |input - target|
MASKED_LOSS_API at::Tensor l1_loss(const at::Tensor& input, const at::Tensor& target,
                                   const std::optional<at::Tensor>& mask = std::nullopt,
                                   const L1LossOptions& options = {});
// Squared below beta, linear above.
MASKED_LOSS_API at::Tensor smooth_l1_loss(const at::Tensor& input, const at::Tensor& target,
                                          const std::optional<at::Tensor>& mask = std::nullopt,
                                          const SmoothL1LossOptions& options = {});
// Squared below delta, linear above.
MASKED_LOSS_API at::Tensor huber_loss(const at::Tensor& input, const at::Tensor& target,
                                      const std::optional<at::Tensor>& mask = std::nullopt,
                                      const HuberLossOptions& options = {});
// Of logits, with targets in [0, 1].
MASKED_LOSS_API at::Tensor binary_cross_entropy_with_logits(const at::Tensor& input, const at::Tensor& target,
                                                            const std::optional<at::Tensor>& mask = std::nullopt,
                                                            const BinaryCrossEntropyWithLogitsOptions& options = {});
// Of probabilities, with targets in [0, 1].
MASKED_LOSS_API at::Tensor binary_cross_entropy(const at::Tensor& input, const at::Tensor& target,
                                                const std::optional<at::Tensor>& mask = std::nullopt,
                                                const BinaryCrossEntropyOptions& options = {});
// Kullback-Leibler divergence of target probabilities (or their logarithms) from log-probabilities.
MASKED_LOSS_API at::Tensor kl_div(const at::Tensor& input, const at::Tensor& target,
                                  const std::optional<at::Tensor>& mask = std::nullopt,
                                  const KlDivOptions& options = {});
// Negative log-likelihood of counts, whose rate (or its logarithm) is the input.
MASKED_LOSS_API at::Tensor poisson_nll_loss(const at::Tensor& input, const at::Tensor& target,
                                            const std::optional<at::Tensor>& mask = std::nullopt,
                                            const PoissonNllLossOptions& options = {});
// Negative log-likelihood of normal distributions; var has the input's shape, or lacks the last dimension, or has 1.
MASKED_LOSS_API at::Tensor gaussian_nll_loss(const at::Tensor& input, const at::Tensor& target, const at::Tensor& var,
                                             const std::optional<at::Tensor>& mask = std::nullopt,
                                             const GaussianNllLossOptions& options = {});
// Binary cross entropy of logits, weighted by (1 - p_t)^gamma.
MASKED_LOSS_API at::Tensor sigmoid_focal_loss(const at::Tensor& input, const at::Tensor& target,
                                              const std::optional<at::Tensor>& mask = std::nullopt,
                                              const SigmoidFocalLossOptions& options = {});

}  // namespace masked_loss
