#pragma once

#include <ATen/core/Tensor.h>
#include <masked_loss/export.h>

#include <cstdint>
#include <optional>
#include <vector>

// torch's reductions of the elements that `mask` keeps (true = keep), whose shape broadcasts to the input's from the
// last dimension on. Where nothing is kept they are 0, with a zero gradient.
namespace masked_loss {

struct ReductionOptions {
  std::vector<std::int64_t> dim = {};  // none: all
  bool keepdim = false;
};

// The input's shape without `dim`, as those below; integers are added as int64.
MASKED_LOSS_API at::Tensor masked_sum(const at::Tensor& input, const std::optional<at::Tensor>& mask = std::nullopt,
                                      const ReductionOptions& options = {});

MASKED_LOSS_API at::Tensor masked_mean(const at::Tensor& input, const std::optional<at::Tensor>& mask = std::nullopt,
                                       const ReductionOptions& options = {});

struct VarianceOptions {
  std::vector<std::int64_t> dim = {};
  bool keepdim = false;
  double correction = 1;  // the divisor is the number of kept elements less this
};

MASKED_LOSS_API at::Tensor masked_var(const at::Tensor& input, const std::optional<at::Tensor>& mask = std::nullopt,
                                      const VarianceOptions& options = {});

MASKED_LOSS_API at::Tensor masked_std(const at::Tensor& input, const std::optional<at::Tensor>& mask = std::nullopt,
                                      const VarianceOptions& options = {});

// (x - mean) / sqrt(var + 1e-8) over `dim` (none: all), the input's shape; 0 where masked.
MASKED_LOSS_API at::Tensor masked_whiten(const at::Tensor& input, const std::optional<at::Tensor>& mask = std::nullopt,
                                         at::IntArrayRef dim = {});

}  // namespace masked_loss
