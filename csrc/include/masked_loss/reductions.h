#pragma once

#include <ATen/core/Tensor.h>
#include <masked_loss/export.h>

#include <cstdint>
#include <optional>
#include <vector>

// Reductions over the elements that `mask` keeps (true = keep); 0 with a zero gradient if all are masked. mask has the
// input's rank, each size equal or 1. Sums are accumulated in float (double for double).
namespace masked_loss {

struct ReductionOptions {
  std::vector<std::int64_t> dim = {};  // empty: all
  bool keepdim = false;
  std::optional<at::ScalarType> dtype = {};  // of the result; by default the input's
};

// The sum, of the input's shape without `dim`. Integers and bool are added as int64.
MASKED_LOSS_API at::Tensor masked_sum(const at::Tensor& input, const std::optional<at::Tensor>& mask = std::nullopt,
                                      const ReductionOptions& options = {});

// The mean, of the input's shape without `dim`. That of integers and bool has torch's default dtype.
MASKED_LOSS_API at::Tensor masked_mean(const at::Tensor& input, const std::optional<at::Tensor>& mask = std::nullopt,
                                       const ReductionOptions& options = {});

struct VarianceOptions {
  std::vector<std::int64_t> dim = {};
  bool keepdim = false;
  double correction = 1;  // degrees of freedom: the divisor is the number of unmasked elements minus it
  std::optional<at::ScalarType> dtype = {};
};

// The variance, of the input's shape without `dim`.
MASKED_LOSS_API at::Tensor masked_var(const at::Tensor& input, const std::optional<at::Tensor>& mask = std::nullopt,
                                      const VarianceOptions& options = {});

// The standard deviation, of the input's shape without `dim`.
MASKED_LOSS_API at::Tensor masked_std(const at::Tensor& input, const std::optional<at::Tensor>& mask = std::nullopt,
                                      const VarianceOptions& options = {});

struct WhitenOptions {
  std::vector<std::int64_t> dim = {};  // empty: all
  std::optional<at::ScalarType> dtype = {};
};

// (x - mean) / sqrt(var + 1e-8) with mean and variance over `dim`; the input's shape, 0 where masked.
MASKED_LOSS_API at::Tensor masked_whiten(const at::Tensor& input, const std::optional<at::Tensor>& mask = std::nullopt,
                                         const WhitenOptions& options = {});

}  // namespace masked_loss
