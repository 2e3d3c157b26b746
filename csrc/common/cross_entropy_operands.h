#pragma once

#include "cross_entropy.h"
#include "cross_entropy_ops.h"
#include "row_view.h"
#include "strides.h"

namespace masked_loss {

// The tensors of a call as the kernels of any device see them, T being the device's type for the input's dtype. What
// it points to is owned by the tensors and by `rows`; plan and results are still to be set.
template <class T>
CrossEntropyWork<T, Accumulation<T>> make_cross_entropy_work(const RowView<Accumulation<T>>& rows, const Tensor& input,
                                                             const CrossEntropyOptions& options,
                                                             const Tensor* gradient) {
  const auto dim = rows.arguments.dim;
  CrossEntropyWork<T, Accumulation<T>> work{};
  std::array<at::DimVector, 4> strides{row_strides(input, dim), {}, {}, {}};
  work.classes = input.size(dim);
  work.logits = static_cast<const T*>(input.const_data_ptr());
  work.logits_stride = class_stride(input, dim);
  work.gradient_stride = work.class_mask_stride = work.probabilities_stride = 1;
  if (gradient != nullptr) {
    work.gradient = static_cast<T*>(gradient->mutable_data_ptr());
    work.gradient_stride = class_stride(*gradient, dim);
    strides[1] = row_strides(*gradient, dim);
  }
  // A class mask of size 1 along dim masks whole rows; the plan has handled it.
  if (rows.class_mask.defined() && rows.class_mask.size(rows.class_mask_dim) == work.classes) {
    work.class_mask = static_cast<const std::uint8_t*>(rows.class_mask.const_data_ptr());
    work.class_mask_stride = class_stride(rows.class_mask, rows.class_mask_dim);
    strides[2] = rows.class_mask_strides;
  }
  if (rows.arguments.probabilities) {
    const auto& target = rows.arguments.target;
    work.probabilities = static_cast<const T*>(target.const_data_ptr());
    work.probabilities_stride = class_stride(target, dim);
    strides[3] = row_strides(target, dim);
  }
  work.weight = rows.weight.defined() ? rows.weight.template const_data_ptr<Accumulation<T>>() : nullptr;
  work.rows = make_rows<4>(rows.sizes, strides);
  work.label_smoothing = static_cast<Accumulation<T>>(options.label_smoothing);
  work.z_loss = static_cast<Accumulation<T>>(options.z_loss);
  return work;
}

inline at::DimVector softmax_sizes(const RowArguments& rows) {
  auto sizes = row_sizes(rows);
  sizes.push_back(2);
  return sizes;
}

// Of a tensor of those sizes; null where it is undefined.
template <class A>
Softmax<A>* softmax_of(const Tensor& states) {
  static_assert(sizeof(Softmax<A>) == 2 * sizeof(A));
  return states.defined() ? reinterpret_cast<Softmax<A>*>(states.data_ptr<A>()) : nullptr;
}

// A backend's ops from the function that they have in common: (input, target, mask, options, mode, where the softmax
// goes or null, where the gradient goes or null) -> the loss in the accumulation dtype.
template <auto forward>
struct CrossEntropyOps {
  // The public op, below autograd: nobody needs the softmax.
  static Tensor loss(const Tensor& input, const Tensor& target, const OptionalTensor& mask,
                     const CrossEntropyOptions& options) {
    const auto [logits, targets] = in_one_dtype(input, target, options.dtype);
    return converted(forward(logits, targets, mask, options, CrossEntropyMode::Forward, nullptr, nullptr),
                     cross_entropy_result_type(input, target, options));
  }

  static std::tuple<Tensor, Tensor> loss_and_softmax(const Tensor& input, const Tensor& target,
                                                     const OptionalTensor& mask, const CrossEntropyOptions& options) {
    Tensor softmax;
    auto loss = forward(input, target, mask, options, CrossEntropyMode::Forward, &softmax, nullptr);
    return {loss, softmax};
  }

  static std::tuple<Tensor, Tensor> loss_and_gradient(const Tensor& input, const Tensor& target,
                                                      const OptionalTensor& mask, const CrossEntropyOptions& options) {
    Tensor gradient;
    auto loss = forward(input, target, mask, options, CrossEntropyMode::ForwardGrad, nullptr, &gradient);
    return {loss, gradient};
  }

  template <class Library>
  static void implement(Library& m) {
    impl<CrossEntropy, loss>(m);
    impl<CrossEntropyForward, loss_and_softmax>(m);
    impl<CrossEntropyForwardGrad, loss_and_gradient>(m);
  }
};

}  // namespace masked_loss
