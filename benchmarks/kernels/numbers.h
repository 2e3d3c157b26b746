// What programs without torch need to call the launchers: dtypes as numbers, rows, and values that suit each formula.
// The kernels' tests use it too.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>
#include <vector>

#include "common/pointwise.h"
#include "common/rows.h"

namespace masked_loss::cuda {

inline double number(double x) { return x; }
inline double number(__nv_bfloat16 x) { return __bfloat162float(x); }
inline double number(__half x) { return __half2float(x); }

template <class T>
T element(double x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16(float(x));
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half(float(x));
  } else {
    return T(x);
  }
}

template <class T>
constexpr double kRounding = std::is_same_v<T, double>          ? 1e-13
                             : std::is_same_v<T, float>         ? 2e-6
                             : std::is_same_v<T, __nv_bfloat16> ? 1.0 / 256
                                                                : 1.0 / 2048;

// One or two dimensions of rows, with the strides of each operand; an operand without strides stays at 0.
template <int Operands>
Rows<Operands> make_rows(std::vector<std::int64_t> sizes, std::vector<std::vector<std::int64_t>> strides) {
  Rows<Operands> rows;
  rows.dims = int(sizes.size());
  for (int d = 0; d < rows.dims; ++d) {
    rows.count *= sizes[d];
    rows.sizes[d] = sizes[d];
    if (sizes[d] > 0) rows.by_size[d] = Quotient(sizes[d]);
    for (int k = 0; k < Operands; ++k) rows.strides[k][d] = strides[k].empty() ? 0 : strides[k][d];
  }
  return rows;
}

// What a formula is tried with.
template <class Formula>
struct FormulaValues {
  double input_from = -3, input_to = 3, target_from = -3, target_to = 3;
  double numbers[kPointwiseNumbers] = {0.7, 1.5};

  FormulaValues() {
    if constexpr (std::is_same_v<Formula, formula::BinaryCrossEntropy>) input_from = 0.01, input_to = 0.99;
    if constexpr (std::is_same_v<Formula, formula::KlDiv> || std::is_same_v<Formula, formula::PoissonNll> ||
                  !Formula::broadcasts_target) {
      target_from = 0, target_to = 1;
    }
    if constexpr (std::is_same_v<Formula, formula::PoissonNll>) input_from = 0.1;
    if constexpr (std::is_same_v<Formula, formula::GaussianNll>) numbers[0] = 1, numbers[1] = 0.3;
  }
};

}  // namespace masked_loss::cuda
