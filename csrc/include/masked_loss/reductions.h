#pragma once

#include <ATen/core/Tensor.h>
#include <masked_loss/export.h>

#include <cstdint>
#include <optional>
#include <vector>

// torch's reductions of the elements that `mask` keeps (true = keep), which has the input's rank, with each size equal
// or 1. Where nothing is kept they are 0, with a zero gradient. They are computed in float (double for double) and
// converted once to their dtype, which is the input's where the options do not say.
namespace masked_loss {

struct ReductionOptions {
  std::vector<std::int64_t> dim = {};  // none: all
  bool keepdim = false;
  std::optional<at::ScalarType> dtype = {};
};

// The input's shape without `dim`, as those below; integers are added as int64.
MASKED_LOSS_API at::Tensor masked_sum(const at::Tensor& input, const std::optional<at::Tensor>& mask = std::nullopt,
                                      const ReductionOptions& options = {});

// Integers and bool too, whose mean has the default dtype.
MASKED_LOSS_API at::Tensor masked_mean(const at::Tensor& input, const std::optional<at::Tensor>& mask = std::nullopt,
                                       const ReductionOptions& options = {});

struct VarianceOptions {
  std::vector<std::int64_t> dim = {};
  bool keepdim = false;
  double correction = 1;  // the divisor is the number of kept elements less this
  std::optional<at::ScalarType> dtype = {};
};

MASKED_LOSS_API at::Tensor masked_var(const at::Tensor& input, const std::optional<at::Tensor>& mask = std::nullopt,
                                      const VarianceOptions& options = {});

MASKED_LOSS_API at::Tensor masked_std(const at::Tensor& input, const std::optional<at::Tensor>& mask = std::nullopt,
                                      const VarianceOptions& options = {});

struct WhitenOptions {
  std::vector<std::int64_t> dim = {};  // none: all
  std::optional<at::ScalarType> dtype = {};
};

// (x - mean) / sqrt(var + 1e-8) over `dim`, the input's shape; 0 where masked.
MASKED_LOSS_API at::Tensor masked_whiten(const at::Tensor& input, const std::optional<at::Tensor>& mask = std::nullopt,
                                         const WhitenOptions& options = {});

}  // namespace masked_loss
