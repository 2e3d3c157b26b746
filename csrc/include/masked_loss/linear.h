#pragma once

#include <ATen/core/Tensor.h>
#include <masked_loss/export.h>
#include <masked_loss/reduction.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace masked_loss {

struct LinearCrossEntropyOptions {
  Reduction reduction = Reduction::Mean;
  std::optional<at::Tensor> linear_bias = {};    // [C]
  std::optional<at::Tensor> weight = {};         // [C], weights of the classes
  std::optional<at::Tensor> sample_weight = {};  // of the positions; the mask's shape
  std::optional<at::Tensor> class_mask = {};     // true = allowed; [C], or the logits' rank, each size equal or 1
  std::optional<at::Tensor> normalizer = {};     // 0-d; Mean and SequenceMean divide by it instead
  std::vector<std::int64_t> ignore_index{-100};  // positions with these targets are masked
  double label_smoothing = 0;                    // in [0, 1]
  double z_loss = 0;                             // coefficient of logsumexp(logits)^2
  std::optional<double> softcap = {};            // logits become softcap * tanh(logits / softcap)
  double temperature = 1;                        // which then divides them
  std::optional<std::int64_t> chunk_size = {};   // rows whose logits are held at once
  std::optional<std::int64_t> max_kept = {};     // no more positions than this are unmasked
  std::optional<at::ScalarType> dtype = {};      // of the result; by default float, double for double
};

// cross_entropy of the logits input @ linear_weight.T + linear_bias, which are never whole in memory.
// input: [..., H]; linear_weight: [C, H]; target: class indices [...]; mask: the rank of [...], each size equal or 1.
MASKED_LOSS_API at::Tensor linear_cross_entropy(const at::Tensor& input, const at::Tensor& linear_weight,
                                                const at::Tensor& target,
                                                const std::optional<at::Tensor>& mask = std::nullopt,
                                                const LinearCrossEntropyOptions& options = {});

struct LinearLogProbOptions {
  std::optional<at::Tensor> linear_bias = {};
  std::optional<at::Tensor> class_mask = {};
  std::optional<double> softcap = {};
  double temperature = 1;
  std::optional<std::int64_t> chunk_size = {};
  std::optional<std::int64_t> max_kept = {};
  std::optional<at::ScalarType> dtype = {};
};

// log p of the classes `index` by the same logits, 0 where masked.
// input: [..., H]; linear_weight: [C, H]; index: [...]; mask: the rank of [...], each size equal or 1.
MASKED_LOSS_API at::Tensor linear_log_prob(const at::Tensor& input, const at::Tensor& linear_weight,
                                           const at::Tensor& index,
                                           const std::optional<at::Tensor>& mask = std::nullopt,
                                           const LinearLogProbOptions& options = {});

// (log_prob, entropy): with the entropy -sum_c p_c log p_c of each position.
MASKED_LOSS_API std::tuple<at::Tensor, at::Tensor> linear_log_prob_and_entropy(
    const at::Tensor& input, const at::Tensor& linear_weight, const at::Tensor& index,
    const std::optional<at::Tensor>& mask = std::nullopt, const LinearLogProbOptions& options = {});

// KL(target || input), KL(input || target), or beta KL(target || m) + (1 - beta) KL(input || m) of the mixture
// m = beta target + (1 - beta) input.
enum class Divergence { Forward, Reverse, JensenShannon };

struct LinearKLOptions {
  Reduction reduction = Reduction::Mean;
  std::optional<at::Tensor> linear_bias = {};         // [C]
  std::optional<at::Tensor> target_linear_bias = {};  // [C]
  std::optional<at::Tensor> sample_weight = {};       // of the positions; the mask's shape
  std::optional<at::Tensor> class_mask = {};          // true = allowed; [C], or the logits' rank, each size equal or 1
  std::optional<at::Tensor> normalizer = {};          // 0-d; Mean and SequenceMean divide by it instead
  Divergence kind = Divergence::Forward;
  double beta = 0.5;                            // in [0, 1]; 0 is Forward, 1 Reverse
  std::optional<double> softcap = {};           // of both logits
  double temperature = 1;                       // of both logits
  std::optional<std::int64_t> chunk_size = {};  // rows whose logits are held at once
  std::optional<std::int64_t> max_kept = {};    // no more positions than this are unmasked
  std::optional<at::ScalarType> dtype = {};     // of the result; by default float, double for double
};

// The divergence of the classes' probabilities by two heads, such as a student's and a teacher's.
// input: [..., H]; linear_weight: [C, H]; target_input: [..., H']; target_linear_weight: [C, H'];
// mask: the rank of [...], each size equal or 1.
MASKED_LOSS_API at::Tensor linear_kl(const at::Tensor& input, const at::Tensor& linear_weight,
                                     const at::Tensor& target_input, const at::Tensor& target_linear_weight,
                                     const std::optional<at::Tensor>& mask = std::nullopt,
                                     const LinearKLOptions& options = {});

}  // namespace masked_loss
