#pragma once

#include <ATen/core/Tensor.h>
#include <masked_loss/export.h>
#include <masked_loss/reduction.h>

#include <optional>

// Elementwise losses over the elements that `mask` keeps (true = keep); 0 if all are masked. input and target broadcast
// as in torch. mask and sample_weight have the rank of the unreduced loss, each size equal or 1.
namespace masked_loss {

struct MseLossOptions {
  Reduction reduction = Reduction::Mean;
  std::optional<at::Tensor> weight = {};         // of the elements; Mean divides by their sum
  std::optional<at::Tensor> sample_weight = {};  // of the elements; Mean divides by their sum
  std::optional<at::Tensor> normalizer = {};     // 0-d; Mean, SequenceMean and BatchMean divide by it instead
  std::optional<at::ScalarType> dtype = {};      // of the result; by default what input and target promote to
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
  std::optional<at::Tensor> weight = {};  // of the elements; Mean does not divide by their sum
  std::optional<at::Tensor> sample_weight = {};
  std::optional<at::Tensor> normalizer = {};
  std::optional<at::ScalarType> dtype = {};
};

struct BinaryCrossEntropyOptions {
  Reduction reduction = Reduction::Mean;
  std::optional<at::Tensor> weight = {};  // of the elements; Mean does not divide by their sum
  std::optional<at::Tensor> sample_weight = {};
  std::optional<at::Tensor> normalizer = {};
  std::optional<at::ScalarType> dtype = {};
};

struct BinaryCrossEntropyWithLogitsOptions {
  Reduction reduction = Reduction::Mean;
  std::optional<at::Tensor> weight = {};      // of the elements; Mean does not divide by their sum
  std::optional<at::Tensor> pos_weight = {};  // of the positive part of the loss; broadcasts to target
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
  double alpha = 0.25;  // weight of positive targets; if negative, no class weights
  double gamma = 2;     // exponent of (1 - p_t)
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
// Quadratic for errors below beta, linear above.
MASKED_LOSS_API at::Tensor smooth_l1_loss(const at::Tensor& input, const at::Tensor& target,
                                          const std::optional<at::Tensor>& mask = std::nullopt,
                                          const SmoothL1LossOptions& options = {});
// Quadratic for errors below delta, linear above.
MASKED_LOSS_API at::Tensor huber_loss(const at::Tensor& input, const at::Tensor& target,
                                      const std::optional<at::Tensor>& mask = std::nullopt,
                                      const HuberLossOptions& options = {});
// Binary cross entropy of logits; target in [0, 1], with input's shape.
MASKED_LOSS_API at::Tensor binary_cross_entropy_with_logits(const at::Tensor& input, const at::Tensor& target,
                                                            const std::optional<at::Tensor>& mask = std::nullopt,
                                                            const BinaryCrossEntropyWithLogitsOptions& options = {});
// Binary cross entropy of probabilities; target in [0, 1], with input's shape.
MASKED_LOSS_API at::Tensor binary_cross_entropy(const at::Tensor& input, const at::Tensor& target,
                                                const std::optional<at::Tensor>& mask = std::nullopt,
                                                const BinaryCrossEntropyOptions& options = {});
// Kullback-Leibler divergence; input: log-probabilities, target: probabilities, or log-probabilities if log_target.
MASKED_LOSS_API at::Tensor kl_div(const at::Tensor& input, const at::Tensor& target,
                                  const std::optional<at::Tensor>& mask = std::nullopt,
                                  const KlDivOptions& options = {});
// Negative log-likelihood under Poisson distributions; input: rates, or their logarithms if log_input; target: counts.
MASKED_LOSS_API at::Tensor poisson_nll_loss(const at::Tensor& input, const at::Tensor& target,
                                            const std::optional<at::Tensor>& mask = std::nullopt,
                                            const PoissonNllLossOptions& options = {});
// Negative log-likelihood under normal distributions; input: means.
// var: variances, with the rank of the loss, each size equal or 1, or with the loss's shape without its last dimension.
MASKED_LOSS_API at::Tensor gaussian_nll_loss(const at::Tensor& input, const at::Tensor& target, const at::Tensor& var,
                                             const std::optional<at::Tensor>& mask = std::nullopt,
                                             const GaussianNllLossOptions& options = {});
// Binary cross entropy of logits times (1 - p_t)^gamma; target in [0, 1], with input's shape.
MASKED_LOSS_API at::Tensor sigmoid_focal_loss(const at::Tensor& input, const at::Tensor& target,
                                              const std::optional<at::Tensor>& mask = std::nullopt,
                                              const SigmoidFocalLossOptions& options = {});

}  // namespace masked_loss
