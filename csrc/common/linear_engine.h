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

// All classes of some rows, by two heads, in the accumulation dtype and contiguous.
struct LinearPair {
  Tensor logits, target_logits;      // [R, C]
  Tensor gradient, target_gradient;  // [R, C]: may be the logits; undefined where none is wanted
  Tensor class_mask;                 // uint8 [R, C] or [C]; or undefined
  Tensor index;                      // [R]: below 0 where a row is not there after all
  Tensor coefficient;                // [R]
  Divergence kind;
  double beta;
};

// Rows of a block, one after the other: offsets of logits, gradient and class mask.
Rows<4> rows_of(const LinearBlock& block);

template <class A>
A* data_of(const Tensor& tensor) {
  return tensor.defined() ? tensor.template mutable_data_ptr<A>() : nullptr;
}

inline const std::uint8_t* mask_of(const Tensor& class_mask) {
  return class_mask.defined() ? static_cast<const std::uint8_t*>(class_mask.const_data_ptr()) : nullptr;
}

template <class A>
LinearRow<A>* states_of(const Tensor& states) {
  return reinterpret_cast<LinearRow<A>*>(states.mutable_data_ptr<std::uint8_t>());
}

// A block of all classes for the kernels of cross entropy; losses and plan are still to be set.
template <class A>
CrossEntropyWork<A, A> make_cross_entropy_work(const LinearBlock& block) {
  CrossEntropyWork<A, A> work{};
  work.rows = rows_of(block);
  work.classes = block.logits.size(1);
  work.logits = block.logits.template const_data_ptr<A>();
  work.gradient = block.gradient.defined() ? block.gradient.template mutable_data_ptr<A>() : nullptr;
  work.logits_stride = work.gradient_stride = work.class_mask_stride = work.probabilities_stride = 1;
  work.class_mask = mask_of(block.class_mask);
  work.weight = data_of<A>(block.weight);
  work.label_smoothing = static_cast<A>(block.label_smoothing);
  work.z_loss = static_cast<A>(block.z_loss);
  return work;
}

// A block for its own kernels.
template <class A>
LinearWork<A> make_linear_work(const LinearBlock& block) {
  LinearWork<A> work{};
  work.rows = rows_of(block);
  work.classes = block.logits.size(1);
  work.first = block.first;
  work.logits = data_of<A>(block.logits);
  work.gradient = data_of<A>(block.gradient);
  work.class_mask = mask_of(block.class_mask);
  work.weight = data_of<A>(block.weight);
  work.target = data_of<std::int64_t>(block.target);
  work.label_smoothing = static_cast<A>(block.label_smoothing);
  work.z_loss = static_cast<A>(block.z_loss);
  return work;
}

// The same to add it to states.
template <class A>
LinearWork<A> make_linear_work(const LinearBlock& block, const Tensor& states) {
  auto work = make_linear_work<A>(block);
  work.state = states_of<A>(states);
  return work;
}

// The same to write its gradient, as LinearBackend::write.
template <class A>
LinearWork<A> make_linear_work(const LinearBlock& block, const Tensor& weight, const Tensor& saved,
                               const Tensor& entropy_grad) {
  auto work = make_linear_work<A>(block);
  work.saved = reinterpret_cast<const LinearSaved<A>*>(data_of<A>(saved));
  work.coefficient = data_of<A>(block.coefficient);
  work.entropy_grad = data_of<A>(entropy_grad);
  work.target_weight = data_of<A>(weight);
  return work;
}

template <class A>
LinearConclusion<A> make_conclusion(const LinearBlock& rows, const Tensor& weight, const Tensor& states,
                                    const Tensor& loss, const Tensor& entropy, const Tensor& saved) {
  static_assert(sizeof(LinearSaved<A>) == kLinearState * sizeof(A));
  return {states_of<A>(states),
          data_of<std::int64_t>(rows.target),
          data_of<A>(rows.coefficient),
          data_of<A>(weight),
          static_cast<A>(rows.label_smoothing),
          static_cast<A>(rows.z_loss),
          data_of<A>(loss),
          data_of<A>(entropy),
          reinterpret_cast<LinearSaved<A>*>(data_of<A>(saved))};
}

template <class A>
DivergenceWork<A> make_divergence_work(const LinearPair& pair, const Tensor& loss) {
  const bool dense = pair.class_mask.defined() && pair.class_mask.dim() == 2;
  return {.rows = pair.logits.size(0),
          .classes = pair.logits.size(1),
          .logits = data_of<A>(pair.logits),
          .target_logits = data_of<A>(pair.target_logits),
          .gradient = data_of<A>(pair.gradient),
          .target_gradient = data_of<A>(pair.target_gradient),
          .class_mask =
              pair.class_mask.defined() ? static_cast<const std::uint8_t*>(pair.class_mask.const_data_ptr()) : nullptr,
          .class_mask_stride = dense ? pair.logits.size(1) : 0,
          .index = pair.index.const_data_ptr<std::int64_t>(),
          .coefficient = pair.coefficient.template const_data_ptr<A>(),
          .loss = data_of<A>(loss),
          .beta = static_cast<A>(pair.beta)};
}

// Calls body(number of the accumulation dtype).
template <class Body>
void dispatch_wide(at::ScalarType type, const Body& body) {
  type == at::kDouble ? body(double{}) : body(float{});
}

// What a backend does with rows; matrix products are torch's.
class LinearBackend {
 public:
  virtual ~LinearBackend() = default;

  // `wide` is the accumulation dtype.
  virtual LinearKept keep(const RowArguments& rows, Reduction reduction, const OptionalTensor& normalizer,
                          std::optional<std::int64_t> max_kept, at::ScalarType wide) const = 0;

  // Uninitialised memory for something large.
  virtual Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) const = 0;

  virtual Tensor sum(const Tensor& losses) const = 0;  // 0-d

  // Of a block of all classes: the losses of its rows, and the gradient.
  virtual Tensor losses(const LinearBlock& block) const = 0;

  // Adds the classes of a block to the states of its rows, which begin with the first block.
  virtual void visit(const LinearBlock& block, const Tensor& states) const = 0;
  // Of rows that have been seen: loss [K], entropy [K] and what a backward pass needs, [K, kLinearState]. `weight` [K]
  // is that of the targets, or undefined.
  virtual std::tuple<Tensor, Tensor, Tensor> conclude(const LinearBlock& rows, const Tensor& weight,
                                                      const Tensor& states) const = 0;
  // Writes the gradient of a block, whose coefficients have what arrives from upstream; so has `entropy_grad` [K],
  // which may be undefined.
  virtual void write(const LinearBlock& block, const Tensor& weight, const Tensor& saved,
                     const Tensor& entropy_grad) const = 0;

  // The divergences of rows, and the gradients that are defined. What the logits of masked classes are is lost.
  virtual Tensor divergence(const LinearPair& pair) const = 0;

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

// `grad`: what arrives at the result, or at each row of it.
LinearKLResults linear_kl_gradients(const LinearBackend& backend, const Tensor& input, const Tensor& linear_weight,
                                    const Tensor& target_input, const Tensor& target_linear_weight,
                                    const OptionalTensor& mask, const OptionalTensor& grad, const LinearKLCall& of);

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

  static LinearKLResults kl(const Tensor& input, const Tensor& linear_weight, const Tensor& target_input,
                            const Tensor& target_linear_weight, const OptionalTensor& mask, const OptionalTensor& grad,
                            const LinearKLCall& of) {
    return linear_kl_gradients(Backend(input), input, linear_weight, target_input, target_linear_weight, mask, grad,
                               of);
  }

  template <class Library>
  static void implement(Library& m) {
    impl<LinearKLGradients, kl>(m);
    impl<LinearForwardGrad, forward_grad>(m);
    impl<LinearRowsForward, rows_forward>(m);
    impl<LinearRowsBackward, rows_backward>(m);
  }
};

}  // namespace masked_loss
