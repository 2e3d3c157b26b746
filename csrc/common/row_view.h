#pragma once

#include "checks.h"
#include "row_plan.h"
#include "rows.h"

namespace masked_loss {

// What decides which rows count, and for how much: the arguments that cross_entropy, loss_normalizer and check_targets
// have in common. Refers to what it was made from, which must outlive it. `dim` counts among the dimensions of the
// input and is not negative.
struct RowArguments {
  const char* op;
  const Tensor& target;
  const OptionalTensor& mask;
  const OptionalTensor& weight;
  const OptionalTensor& sample_weight;
  const OptionalTensor& class_mask;
  at::IntArrayRef ignore_index;
  std::int64_t dim;
  std::optional<c10::SymInt> classes;  // where known
  bool probabilities = false;          // the target holds those of the classes instead of an index
  const char* target_name = "target";
};

// Of the options that a loss of any kind has.
template <class Options>
RowArguments row_arguments(const char* op, const Tensor& target, const OptionalTensor& mask, const Options& options,
                           std::int64_t dim, std::optional<c10::SymInt> classes) {
  return {op,
          target,
          mask,
          options.weight,
          options.sample_weight,
          options.class_mask,
          options.ignore_index,
          dim,
          std::move(classes)};
}

// The target's shape, without `dim` where it holds probabilities.
at::DimVector row_sizes(const RowArguments& rows);
c10::SymDimVector sym_row_sizes(const RowArguments& rows);

[[noreturn]] void throw_out_of_range(const RowArguments& arguments, std::int64_t row, std::int64_t index,
                                     std::int64_t classes);

// The arguments that decide about rows, as the kernels of any device read them, whatever their strides. A is the dtype
// of the weights, float or double. Refers to the arguments, and owns what had to be converted.
template <class A>
struct RowView {
  explicit RowView(const RowArguments& arguments);

  const RowArguments& arguments;
  const at::DimVector sizes;  // of the rows
  RowRule<A> view;
  Rows<4> rows;  // offsets of target, mask, sample weight and class mask

  Tensor target;  // the class indices; one that all rows share with class probabilities
  Tensor mask, sample_weight, weight, class_mask;  // undefined: not given; the class mask has bytes
  std::int64_t class_mask_dim = 0;                 // of the classes in it
  at::DimVector class_mask_strides;                // of its rows; none for a mask [C], which all of them share
};

}  // namespace masked_loss
