#pragma once

#include "linear.h"
#include "linear_ops.h"

namespace masked_loss {

// The rows that count, gathered from all of them, and what the plan of a backend says of each.
struct LinearKept {
  Tensor rows;         // int64 [K], no row twice
  Tensor target;       // int64 [K]
  Tensor coefficient;  // [K], in the accumulation dtype
  Tensor valid;        // bool [K]: false where the number of kept rows was not known and there are fewer; or undefined
  bool all = false;    // whether `rows` are all rows in their order

  std::int64_t count() const { return rows.size(0); }
};

// Some classes of some rows, in the accumulation dtype and contiguous.
struct LinearBlock {
  Tensor logits;       // [R, n]
  Tensor gradient;     // [R, n]: may be the logits; undefined where none is wanted
  Tensor class_mask;   // uint8 [R, n] or [n]; or undefined
  Tensor weight;       // [n]; or undefined
  std::int64_t first;  // the class that it begins with
  Tensor target;       // [R], as the two below
  Tensor coefficient;
  Tensor valid;
  double label_smoothing, z_loss;
};

// Rows of a block, one after the other: offsets of logits, gradient and class mask.
Rows<4> rows_of(const LinearBlock& block);

// A block of all classes for the kernels of cross entropy; losses and plan are still to be set.
template <class A>
CrossEntropyWork<A, A> make_cross_entropy_work(const LinearBlock& block) {
  CrossEntropyWork<A, A> work{};
  work.rows = rows_of(block);
  work.classes = block.logits.size(1);
  work.logits = block.logits.template const_data_ptr<A>();
  work.gradient = block.gradient.defined() ? block.gradient.template mutable_data_ptr<A>() : nullptr;
  work.logits_stride = work.gradient_stride = work.class_mask_stride = work.probabilities_stride = 1;
  if (block.class_mask.defined()) {
    work.class_mask = static_cast<const std::uint8_t*>(block.class_mask.const_data_ptr());
  }
  work.weight = block.weight.defined() ? block.weight.template const_data_ptr<A>() : nullptr;
  work.label_smoothing = static_cast<A>(block.label_smoothing);
  work.z_loss = static_cast<A>(block.z_loss);
  return work;
}

// What a backend does with rows; matrix products are torch's.
class LinearBackend {
 public:
  virtual ~LinearBackend() = default;

  // `wide` is the accumulation dtype.
  virtual LinearKept keep(const RowArguments& rows, const LinearCrossEntropyOptions& options,
                          at::ScalarType wide) const = 0;

  // Uninitialised memory for something large.
  virtual Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) const = 0;

  virtual Tensor sum(const Tensor& losses) const = 0;  // 0-d

  // Of a block of all classes: the losses of its rows, and the gradient.
  virtual Tensor losses(const LinearBlock& block) const = 0;

  // The states of `rows` rows of which nothing has been seen.
  virtual Tensor new_states(std::int64_t rows, const at::TensorOptions& options) const = 0;
  // Adds the classes of a block to the states of its rows.
  virtual void visit(const LinearBlock& block, const Tensor& states) const = 0;
  // Of rows that have been seen: loss [K], entropy [K] and what a backward pass needs, [K, kLinearState]. `weight` [K]
  // is that of the targets, or undefined.
  virtual std::tuple<Tensor, Tensor, Tensor> conclude(const LinearBlock& rows, const Tensor& weight,
                                                      const Tensor& states) const = 0;
  // Writes the gradient of a block, whose coefficients have what arrives from upstream; so has `entropy_grad` [K],
  // which may be undefined.
  virtual void write(const LinearBlock& block, const Tensor& weight, const Tensor& saved,
                     const Tensor& entropy_grad) const = 0;

  // softcap (0: none) and temperature of logits, in place.
  virtual void soften(const Tensor& logits, double softcap, double temperature) const = 0;
  // The gradient of what was softened times the derivative of that, in the dtype of `to`, which may be the gradient.
  virtual void harden(const Tensor& to, const Tensor& gradient, const Tensor& logits, double softcap,
                      double temperature) const = 0;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_forward_grad(const LinearBackend& backend, const Tensor& input,
                                                               const Tensor& linear_weight, const Tensor& target,
                                                               const OptionalTensor& mask,
                                                               const LinearOptions& options);
std::tuple<Tensor, Tensor, Tensor> linear_rows_forward(const LinearBackend& backend, const Tensor& input,
                                                       const Tensor& linear_weight, const Tensor& target,
                                                       const OptionalTensor& mask, const LinearOptions& options);
LinearGradients linear_rows_backward(const LinearBackend& backend, const Tensor& grad,
                                     const OptionalTensor& entropy_grad, const Tensor& input,
                                     const Tensor& linear_weight, const Tensor& target, const Tensor& states,
                                     const OptionalTensor& mask, const LinearOptions& options);

// The inner ops of a backend.
template <class Backend>
struct LinearOps {
  static std::tuple<Tensor, Tensor, Tensor, Tensor> forward_grad(const Tensor& input, const Tensor& linear_weight,
                                                                 const Tensor& target, const OptionalTensor& mask,
                                                                 const LinearOptions& options) {
    return linear_forward_grad(Backend(input), input, linear_weight, target, mask, options);
  }
  static std::tuple<Tensor, Tensor, Tensor> rows_forward(const Tensor& input, const Tensor& linear_weight,
                                                         const Tensor& target, const OptionalTensor& mask,
                                                         const LinearOptions& options) {
    return linear_rows_forward(Backend(input), input, linear_weight, target, mask, options);
  }
  static LinearGradients rows_backward(const Tensor& grad, const OptionalTensor& entropy_grad, const Tensor& input,
                                       const Tensor& linear_weight, const Tensor& target, const Tensor& states,
                                       const OptionalTensor& mask, const LinearOptions& options) {
    return linear_rows_backward(Backend(input), grad, entropy_grad, input, linear_weight, target, states, mask,
                                options);
  }

  template <class Library>
  static void implement(Library& m) {
    impl<LinearForwardGrad, forward_grad>(m);
    impl<LinearRowsForward, rows_forward>(m);
    impl<LinearRowsBackward, rows_backward>(m);
  }
};

}  // namespace masked_loss
