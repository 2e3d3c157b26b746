#include "linear_engine.h"

#include <ATen/TensorIndexing.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/div.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/index.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/remainder.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>

namespace masked_loss {
namespace {

constexpr std::int64_t kWorkspace = std::int64_t{512} << 20;  // bytes
constexpr std::int64_t kFewestRows = 1024;                    // fewer would starve the products
constexpr std::int64_t kMultiple = 128;                       // of rows, or of classes
constexpr std::int64_t kWidened = 4096;                       // classes of a weight that are converted at once

std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// As many equal parts of at most `most` as it takes, of which each but the last is a multiple.
std::int64_t balanced(std::int64_t whole, std::int64_t most, std::int64_t multiple) {
  const auto parts = divide_up(whole, std::min(std::max<std::int64_t>(most, 1), whole));
  return parts == 1 ? whole : std::min(whole, divide_up(divide_up(whole, parts), multiple) * multiple);
}

// Whether the CPU multiplies bfloat16 faster than float; where it does not, torch emulates it, many times slower.
bool multiplies_bfloat16() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

// Calls body(first, number) for the parts of [0, whole).
template <class Body>
void for_parts(std::int64_t whole, std::int64_t part, const Body& body) {
  for (std::int64_t first = 0; first < whole; first += part) body(first, std::min(part, whole - first));
}

// One call: its tensors, and the products between them.
class Linear {
 public:
  Linear(const LinearBackend& backend, const Tensor& input, const Tensor& linear_weight, const Tensor& target,
         const OptionalTensor& mask, const LinearOptions& options)
      : backend_(backend),
        arguments_(check_linear(input, linear_weight, target, mask, options)),
        wanted_(options),
        options_(options.loss),
        type_(input.scalar_type()),
        wide_(accumulation_type(type_)),
        classes_(linear_weight.size(0)),
        hidden_(linear_weight.size(1)),
        count_(target.numel()),
        sizes_(target.sizes()),
        input_(input.reshape({count_, hidden_})),
        weight_(linear_weight),
        like_(input.options().dtype(wide_)) {
    if (type_ == wide_) {
      way_ = Way::Direct;
    } else if (input.is_cuda()) {
      way_ = Way::Widening;
    } else {
      way_ = type_ == at::kBFloat16 && multiplies_bfloat16() ? Way::HalfGradients : Way::Widened;
    }
    kept_ = backend.keep(arguments_, options_, wide_);
    if (options_.weight) class_weight_ = options_.weight->to(wide_).contiguous();
    if (options_.linear_bias) bias_ = options_.linear_bias->to(wide_);
    const auto& class_mask = options_.class_mask;
    // One of size 1 along the classes masks whole rows, which the plan has left out.
    if (class_mask && class_mask->size(-1) == classes_) class_mask_ = byte_mask(*class_mask);
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor> by_rows() {
    start_gradients();
    const auto rows = rows_at_once();
    std::vector<Tensor> losses;
    Workspace space(*this, kept_.count() == 0 ? 0 : rows, classes_);
    for_parts(kept_.count(), rows, [&](std::int64_t first, std::int64_t n) {
      const auto hidden = hidden_of(first, n);
      auto block = block_of(first, n, 0, classes_, space);
      make_logits(block.logits, hidden, 0);
      soften(block.logits);
      if (!wants_gradients()) block.gradient = Tensor();
      losses.push_back(backend_.losses(block));
      if (!wants_gradients()) return;
      const auto gradient = harden(block, space);
      const bool whole = n == kept_.count();
      if (wanted_.weight_grad) add_weight_gradient(gradient, hidden, 0, first == 0, whole);
      add_bias_gradient(gradient, 0);
      if (wanted_.input_grad) {
        auto sum = input_gradient_sum(first, n);
        add_input_gradient(sum, gradient, 0, true);
        scatter_input_gradient(sum, first, n);
      }
    });
    const auto loss =
        losses.empty() ? at::zeros({}, like_) : backend_.sum(losses.size() == 1 ? losses[0] : at::cat(losses));
    return std::tuple_cat(std::tuple{loss}, gradients());
  }

  std::tuple<Tensor, Tensor, Tensor> rows_forward() {
    const auto count = kept_.count();
    auto loss = at::zeros({count_}, like_), entropy = at::zeros({count_}, like_);
    auto saved = at::zeros({count_, kLinearState}, like_);
    saved.select(1, 1).fill_(1);
    Tensor losses = at::zeros({0}, like_);
    if (count > 0) {
      const auto states = backend_.new_states(count, like_);
      const auto hidden = hidden_of(0, count);
      const auto width = classes_at_once();
      Workspace space(*this, count, width);
      for_parts(classes_, width, [&](std::int64_t first, std::int64_t n) {
        const auto block = block_of(0, count, first, n, space);
        make_logits(block.logits, hidden, first);
        soften(block.logits);
        backend_.visit(block, states);
      });
      const auto [each, entropies, each_saved] = backend_.conclude(rows_of(0, count), target_weight(), states);
      losses = each;
      loss.index_copy_(0, kept_.rows, each);
      entropy.index_copy_(0, kept_.rows, entropies);
      saved.index_copy_(0, kept_.rows, each_saved);
    }
    auto states_sizes = at::DimVector(sizes_);
    states_sizes.push_back(kLinearState);
    loss = options_.reduction == Reduction::None ? loss.view(sizes_) : backend_.sum(losses);
    return {loss, entropy.view(sizes_), saved.view(states_sizes)};
  }

  LinearGradients rows_backward(const Tensor& grad, const OptionalTensor& entropy_grad, const Tensor& states) {
    start_gradients();
    const auto count = kept_.count();
    if (count == 0) return gradients();
    const auto gathered = [&](const Tensor& tensor) {
      return tensor.to(wide_).expand(sizes_).reshape({count_}).index_select(0, kept_.rows);
    };
    kept_.coefficient = kept_.coefficient * gathered(grad);
    const auto of_entropy = entropy_grad ? gathered(*entropy_grad) : Tensor();
    const auto saved = states.to(wide_).reshape({count_, kLinearState}).index_select(0, kept_.rows);
    const auto hidden = hidden_of(0, count);
    const auto weight = target_weight();
    const auto width = classes_at_once();
    auto sum = wanted_.input_grad ? input_gradient_sum(0, count) : Tensor();
    Workspace space(*this, count, width);
    for_parts(classes_, width, [&](std::int64_t first, std::int64_t n) {
      const auto block = block_of(0, count, first, n, space);
      make_logits(block.logits, hidden, first);
      soften(block.logits);
      backend_.write(block, weight, saved, of_entropy);
      const auto gradient = harden(block, space);
      if (wanted_.weight_grad) add_weight_gradient(gradient, hidden, first, true, true);
      add_bias_gradient(gradient, first);
      if (wanted_.input_grad) add_input_gradient(sum, gradient, first, first == 0);
    });
    if (wanted_.input_grad) scatter_input_gradient(sum, 0, count);
    return gradients();
  }

 private:
  // How products of halves give sums in float.
  enum class Way {
    Direct,         // there are no halves
    Widening,       // the device's products of halves give floats
    HalfGradients,  // logits from converted operands; gradients, which are rounded anyway, as halves
    Widened,        // everything from converted operands
  };

  struct Hidden {
    Tensor narrow, wide;  // in the input's dtype, and in the accumulation dtype where that is multiplied
  };

  // What a chunk of logits, of any number of rows and classes up to so many, is held in.
  struct Workspace {
    Workspace(const Linear& of, std::int64_t rows, std::int64_t classes) {
      const auto elements = rows * classes;
      logits = of.backend_.empty({elements}, of.like_);
      if (!of.wants_gradients()) return;
      gradient = of.options_.softcap ? of.backend_.empty({elements}, of.like_) : logits;
      rounded =
          of.gradient_type() == of.wide_ ? gradient : of.backend_.empty({elements}, of.like_.dtype(of.gradient_type()));
    }

    static Tensor as(const Tensor& memory, std::int64_t rows, std::int64_t classes) {
      return memory.defined() ? memory.narrow(0, 0, rows * classes).view({rows, classes}) : memory;
    }

    Tensor logits, gradient, rounded;
  };

  bool wants_gradients() const { return wanted_.input_grad || wanted_.weight_grad || wanted_.bias_grad; }
  at::ScalarType gradient_type() const { return way_ == Way::Widened ? wide_ : type_; }
  bool softens() const { return options_.softcap || options_.temperature != 1; }

  std::int64_t rows_at_once() const {
    const auto count = std::max<std::int64_t>(kept_.count(), 1);
    if (options_.chunk_size) return balanced(count, *options_.chunk_size, 1);
    const std::int64_t wide = elementSize(wide_), rounded = gradient_type() == wide_ ? 0 : elementSize(type_);
    const auto row = std::max<std::int64_t>(classes_, 1) * (wide * (options_.softcap ? 2 : 1) + rounded);
    return balanced(count, std::max(kFewestRows, kWorkspace / row), kMultiple);
  }

  // Of all rows, in a workspace as large.
  std::int64_t classes_at_once() const {
    const auto elements = rows_at_once() * classes_;
    return balanced(classes_, elements / kept_.count(), options_.chunk_size ? 1 : kMultiple);
  }

  Hidden hidden_of(std::int64_t first, std::int64_t n) const {
    Hidden hidden;
    hidden.narrow = kept_.all ? input_.narrow(0, first, n) : input_.index_select(0, kept_.rows.narrow(0, first, n));
    if (kept_.valid.defined()) {
      const auto valid = kept_.valid.narrow(0, first, n).unsqueeze(-1);
      hidden.narrow = at::where(valid, hidden.narrow, at::zeros_like(hidden.narrow));
    }
    hidden.wide = way_ == Way::HalfGradients || way_ == Way::Widened ? hidden.narrow.to(wide_) : hidden.narrow;
    return hidden;
  }

  // Of rows and all classes, without logits.
  LinearBlock rows_of(std::int64_t first, std::int64_t n) const {
    LinearBlock block{};
    block.target = kept_.target.narrow(0, first, n);
    block.coefficient = kept_.coefficient.narrow(0, first, n);
    if (kept_.valid.defined()) block.valid = kept_.valid.narrow(0, first, n);
    block.label_smoothing = options_.label_smoothing;
    block.z_loss = options_.z_loss;
    return block;
  }

  LinearBlock block_of(std::int64_t first, std::int64_t n, std::int64_t first_class, std::int64_t classes,
                       const Workspace& space) const {
    auto block = rows_of(first, n);
    block.logits = Workspace::as(space.logits, n, classes);
    block.gradient = Workspace::as(space.gradient, n, classes);
    block.first = first_class;
    if (class_weight_.defined()) block.weight = class_weight_.narrow(0, first_class, classes);
    if (class_mask_.defined()) {
      const auto of_classes = class_mask_.narrow(-1, first_class, classes);
      block.class_mask = class_mask_.dim() == 1 ? of_classes.contiguous() : mask_of_rows(of_classes, first, n);
    }
    return block;
  }

  // [n, classes] of a mask whose sizes are those of the rows or 1.
  Tensor mask_of_rows(const Tensor& mask, std::int64_t first, std::int64_t n) const {
    auto rest = kept_.rows.narrow(0, first, n);
    c10::List<OptionalTensor> indices;
    indices.resize(sizes_.size());
    for (auto d = static_cast<std::int64_t>(sizes_.size()) - 1; d >= 0; --d) {
      const auto index = at::remainder(rest, sizes_[d]);
      indices.set(d, mask.size(d) == 1 ? at::zeros_like(index) : index);
      rest = at::div(rest, sizes_[d], "floor");
    }
    return at::index(mask, indices).contiguous();
  }

  // [K], undefined where all weigh 1.
  Tensor target_weight() const {
    return class_weight_.defined() ? class_weight_.index_select(0, kept_.target.clamp(0)) : Tensor();
  }

  // Converts the classes [first, first + n) of the weight, a part at a time: body(of the part, part).
  template <class Body>
  void widened(std::int64_t first, std::int64_t n, const Body& body) {
    if (!widened_.defined()) widened_ = backend_.empty({std::min(kWidened, classes_), hidden_}, like_);
    for_parts(n, kWidened, [&](std::int64_t begin, std::int64_t part) {
      const auto wide = widened_.narrow(0, 0, part).copy_(weight_.narrow(0, first + begin, part));
      body(begin, wide);
    });
  }

  // logits [R, n] of the classes from `first` on
  void make_logits(Tensor logits, const Hidden& hidden, std::int64_t first) {
    const auto n = logits.size(1);
    const auto bias = bias_.defined() ? bias_.narrow(0, first, n) : Tensor();
    const auto product = [&](Tensor out, const Tensor& weight, std::int64_t begin) {
      if (!bias.defined()) {
        at::mm_out(out, hidden.wide, weight.t());
      } else {
        at::addmm_out(out, bias.narrow(0, begin, weight.size(0)), hidden.wide, weight.t());
      }
    };
    switch (way_) {
      case Way::Direct: return product(logits, weight_.narrow(0, first, n), 0);
      case Way::Widening: {
        const auto weight = weight_.narrow(0, first, n).t();
        if (!bias.defined()) {
          at::mm_out(logits, hidden.narrow, weight, wide_);
        } else {
          logits.copy_(bias.expand_as(logits));
          at::addmm_out(logits, logits, hidden.narrow, weight, wide_);
        }
        return;
      }
      default:
        return widened(first, n, [&](std::int64_t begin, const Tensor& weight) {
          product(logits.narrow(1, begin, weight.size(0)), weight, begin);
        });
    }
  }

  void soften(const Tensor& logits) const {
    if (softens()) backend_.soften(logits, options_.softcap.value_or(0), options_.temperature);
  }

  // The gradient of the product, in the dtype that the next products take.
  Tensor harden(const LinearBlock& block, const Workspace& space) const {
    const auto rounded = Workspace::as(space.rounded, block.logits.size(0), block.logits.size(1));
    if (softens() || rounded.scalar_type() != wide_) {
      backend_.harden(rounded, block.gradient, block.logits, options_.softcap.value_or(0), options_.temperature);
    }
    return rounded;
  }

  void start_gradients() {
    if (wanted_.input_grad) {
      // Masked rows get what nobody else writes.
      input_gradient_ = kept_.all ? backend_.empty({count_, hidden_}, input_.options())
                                  : at::zeros({count_, hidden_}, input_.options());
    }
    const bool none = kept_.count() == 0;
    if (wanted_.weight_grad) {
      weight_gradient_ = none ? at::zeros({classes_, hidden_}, input_.options())
                              : backend_.empty({classes_, hidden_}, input_.options());
    }
    if (wanted_.bias_grad) bias_gradient_ = at::zeros({classes_}, like_);
  }

  LinearGradients gradients() {
    const auto none = [&] { return at::empty({0}, input_.options()); };  // outputs of an op have memory of their own
    if (weight_sum_.defined()) weight_gradient_.copy_(weight_sum_);
    auto sizes = at::DimVector(sizes_);
    sizes.push_back(hidden_);
    return {wanted_.input_grad ? input_gradient_.view(sizes) : none(), wanted_.weight_grad ? weight_gradient_ : none(),
            wanted_.bias_grad ? bias_gradient_.to(type_) : none()};
  }

  // out (+)= a b, in the accumulation dtype
  void add_product(Tensor& out, const Tensor& a, const Tensor& b, bool first) const {
    if (a.scalar_type() == wide_) {
      first ? at::mm_out(out, a, b) : at::addmm_out(out, out, a, b);
    } else if (way_ == Way::Widening) {
      first ? at::mm_out(out, a, b, wide_) : at::addmm_out(out, out, a, b, wide_);
    } else {
      first ? out.copy_(at::mm(a, b)) : out.add_(at::mm(a, b));
    }
  }

  // Of the classes from `first_class` on; `whole`: no other rows add to them.
  void add_weight_gradient(const Tensor& gradient, const Hidden& hidden, std::int64_t first_class, bool first_rows,
                           bool whole) {
    const auto& rows = gradient.scalar_type() == wide_ ? hidden.wide : hidden.narrow;
    if (whole && gradient.scalar_type() == type_) {  // one product, which rounds once
      auto out = weight_gradient_.narrow(0, first_class, gradient.size(1));
      at::mm_out(out, gradient.t(), rows);
      return;
    }
    if (!whole && type_ != wide_ && !weight_sum_.defined()) weight_sum_ = backend_.empty({classes_, hidden_}, like_);
    for_parts(gradient.size(1), kWidened, [&](std::int64_t begin, std::int64_t n) {
      const auto part = gradient.narrow(1, begin, n).t();
      if (whole) {
        weight_gradient_.narrow(0, first_class + begin, n).copy_(at::mm(part, rows));
      } else {
        auto sum = (type_ == wide_ ? weight_gradient_ : weight_sum_).narrow(0, first_class + begin, n);
        add_product(sum, part, rows, first_rows);
      }
    });
  }

  void add_bias_gradient(const Tensor& gradient, std::int64_t first) {
    if (wanted_.bias_grad) bias_gradient_.narrow(0, first, gradient.size(1)).add_(gradient.sum(0, false, wide_));
  }

  // Where the input's gradient of some kept rows is added up: itself where that is possible.
  Tensor input_gradient_sum(std::int64_t first, std::int64_t n) const {
    if (kept_.all && type_ == wide_) return input_gradient_.narrow(0, first, n);
    return backend_.empty({n, hidden_}, like_);
  }

  void add_input_gradient(Tensor& sum, const Tensor& gradient, std::int64_t first_class, bool first) {
    if (way_ != Way::Widened) {
      return add_product(sum, gradient, weight_.narrow(0, first_class, gradient.size(1)), first);
    }
    widened(first_class, gradient.size(1), [&](std::int64_t begin, const Tensor& weight) {
      add_product(sum, gradient.narrow(1, begin, weight.size(0)), weight, first && begin == 0);
    });
  }

  // By plain stores: no row is there twice.
  void scatter_input_gradient(const Tensor& sum, std::int64_t first, std::int64_t n) {
    if (kept_.all && type_ == wide_) return;
    auto rows = sum.to(type_);
    if (kept_.valid.defined()) {
      rows = at::where(kept_.valid.narrow(0, first, n).unsqueeze(-1), rows, at::zeros_like(rows));
    }
    if (kept_.all) {
      input_gradient_.narrow(0, first, n).copy_(rows);
    } else {
      input_gradient_.index_copy_(0, kept_.rows.narrow(0, first, n), rows);
    }
  }

  const LinearBackend& backend_;
  const RowArguments arguments_;
  const LinearOptions& wanted_;
  const LinearCrossEntropyOptions& options_;
  const at::ScalarType type_, wide_;
  const std::int64_t classes_, hidden_, count_;
  const at::IntArrayRef sizes_;  // of the rows
  const Tensor input_;           // [N, H]
  const Tensor weight_;          // [C, H]
  const at::TensorOptions like_;
  Way way_;
  LinearKept kept_;
  Tensor class_weight_, bias_, class_mask_;
  Tensor widened_;  // a part of the weight
  Tensor input_gradient_, weight_gradient_, bias_gradient_;
  Tensor weight_sum_;  // in the accumulation dtype, where several chunks add to it
};

}  // namespace

Rows<4> rows_of(const LinearBlock& block) {
  Rows<4> rows{};
  const auto classes = block.logits.size(1);
  rows.count = rows.sizes[0] = block.logits.size(0);
  rows.dims = 1;
  rows.strides[0][0] = rows.strides[1][0] = classes;
  rows.strides[2][0] = block.class_mask.defined() && block.class_mask.dim() == 2 ? classes : 0;
  rows.strides[3][0] = 0;
  return rows;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_forward_grad(const LinearBackend& backend, const Tensor& input,
                                                               const Tensor& linear_weight, const Tensor& target,
                                                               const OptionalTensor& mask,
                                                               const LinearOptions& options) {
  return Linear(backend, input, linear_weight, target, mask, options).by_rows();
}

std::tuple<Tensor, Tensor, Tensor> linear_rows_forward(const LinearBackend& backend, const Tensor& input,
                                                       const Tensor& linear_weight, const Tensor& target,
                                                       const OptionalTensor& mask, const LinearOptions& given) {
  auto options = given;  // no gradients are made here
  options.input_grad = options.weight_grad = options.bias_grad = false;
  return Linear(backend, input, linear_weight, target, mask, options).rows_forward();
}

LinearGradients linear_rows_backward(const LinearBackend& backend, const Tensor& grad,
                                     const OptionalTensor& entropy_grad, const Tensor& input,
                                     const Tensor& linear_weight, const Tensor& target, const Tensor& states,
                                     const OptionalTensor& mask, const LinearOptions& options) {
  return Linear(backend, input, linear_weight, target, mask, options).rows_backward(grad, entropy_grad, states);
}

}  // namespace masked_loss
