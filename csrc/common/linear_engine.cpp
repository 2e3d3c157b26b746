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

// Which gradients are wanted of a head's operands.
struct Wanted {
  bool input = false, weight = false, bias = false;
  explicit operator bool() const { return input || weight || bias; }
};

// Hidden states, of which some rows are kept, and the weights that make logits of them: the products, and what they add
// to the gradients.
class Head {
 public:
  struct Hidden {
    Tensor narrow, wide;  // in the input's dtype, and in the accumulation dtype where that is multiplied
  };

  // What a chunk of logits, of any number of rows and classes up to so many, is held in.
  class Workspace {
   public:
    Workspace(const Head& of, std::int64_t rows, std::int64_t classes) {
      const auto elements = rows * classes;
      logits_ = of.backend_.empty({elements}, of.like_);
      if (!of.wanted_) return;
      gradient_ = of.softcap_ == 0 ? logits_ : of.backend_.empty({elements}, of.like_);
      rounded_ = of.gradient_type() == of.wide_ ? gradient_
                                                : of.backend_.empty({elements}, of.like_.dtype(of.gradient_type()));
    }

    Tensor logits(std::int64_t rows, std::int64_t classes) const { return as(logits_, rows, classes); }
    Tensor gradient(std::int64_t rows, std::int64_t classes) const { return as(gradient_, rows, classes); }
    Tensor rounded(std::int64_t rows, std::int64_t classes) const { return as(rounded_, rows, classes); }

   private:
    static Tensor as(const Tensor& memory, std::int64_t rows, std::int64_t classes) {
      return memory.defined() ? memory.narrow(0, 0, rows * classes).view({rows, classes}) : memory;
    }

    Tensor logits_, gradient_, rounded_;
  };

  Head(const LinearBackend& backend, const LinearKept& kept, const Tensor& input, const Tensor& linear_weight,
       const OptionalTensor& bias, std::optional<double> softcap, double temperature, Wanted wanted)
      : backend_(backend),
        kept_(kept),
        softcap_(softcap.value_or(0)),
        temperature_(temperature),
        wanted_(wanted),
        type_(input.scalar_type()),
        wide_(accumulation_type(type_)),
        classes_(linear_weight.size(0)),
        hidden_(linear_weight.size(1)),
        sizes_(input.sizes()),
        input_(input.reshape({c10::multiply_integers(sizes_.slice(0, sizes_.size() - 1)), hidden_})),
        weight_(linear_weight),
        like_(input.options().dtype(wide_)) {
    if (type_ == wide_) {
      way_ = Way::Direct;
    } else if (input.is_cuda()) {
      way_ = Way::Widening;
    } else {
      way_ = type_ == at::kBFloat16 && multiplies_bfloat16() ? Way::HalfGradients : Way::Widened;
    }
    if (bias) bias_ = bias->to(wide_);
  }

  const Wanted& wanted() const { return wanted_; }
  std::int64_t classes() const { return classes_; }
  const at::TensorOptions& like() const { return like_; }  // of the logits

  // Of a workspace, for each row.
  std::int64_t row_bytes() const {
    const std::int64_t wide = elementSize(wide_), rounded = gradient_type() == wide_ ? 0 : elementSize(type_);
    return std::max<std::int64_t>(classes_, 1) * (wide * (softcap_ == 0 ? 1 : 2) + rounded);
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

  // logits [R, n] of the classes from `first` on
  void make_logits(Tensor logits, const Hidden& hidden, std::int64_t first) {
    multiply(logits, hidden, first);
    if (softens()) backend_.soften(logits, softcap_, temperature_);
  }

  void start_gradients() {
    const auto count = input_.size(0);
    if (wanted_.input) {
      // Masked rows get what nobody else writes.
      input_gradient_ = kept_.all ? backend_.empty({count, hidden_}, input_.options())
                                  : at::zeros({count, hidden_}, input_.options());
    }
    if (wanted_.weight) {
      weight_gradient_ = kept_.count() == 0 ? at::zeros({classes_, hidden_}, input_.options())
                                            : backend_.empty({classes_, hidden_}, input_.options());
    }
    if (wanted_.bias) bias_gradient_ = at::zeros({classes_}, like_);
  }

  // The gradient of the product from that of the logits, in the dtype that the next products take.
  Tensor harden(const Tensor& gradient, const Tensor& logits, const Workspace& space) const {
    const auto rounded = space.rounded(logits.size(0), logits.size(1));
    if (softens() || rounded.scalar_type() != wide_) {
      backend_.harden(rounded, gradient, logits, softcap_, temperature_);
    }
    return rounded;
  }

  // Adds what a chunk of rows with all of their classes, of which it has the gradient, makes of those of the operands.
  void add_rows(const Tensor& gradient, const Hidden& hidden, std::int64_t first) {
    const auto n = gradient.size(0);
    if (wanted_.weight) add_weight_gradient(gradient, hidden, 0, first == 0, n == kept_.count());
    add_bias_gradient(gradient, 0);
    if (!wanted_.input) return;
    auto sum = input_gradient_sum(first, n);
    add_input_gradient(sum, gradient, 0, true);
    scatter_input_gradient(sum, first, n);
  }

  // The same of a block of classes, from `first` on, with all kept rows. `input_sum` is input_gradient_sum().
  void add_classes(const Tensor& gradient, const Hidden& hidden, std::int64_t first, Tensor& input_sum) {
    if (wanted_.weight) add_weight_gradient(gradient, hidden, first, true, true);
    add_bias_gradient(gradient, first);
    if (wanted_.input) add_input_gradient(input_sum, gradient, first, first == 0);
  }

  // Where the input's gradient of some kept rows is added up: itself where that is possible.
  Tensor input_gradient_sum(std::int64_t first, std::int64_t n) const {
    if (!wanted_.input) return {};
    if (kept_.all && type_ == wide_) return input_gradient_.narrow(0, first, n);
    return backend_.empty({n, hidden_}, like_);
  }

  // By plain stores: no row is there twice.
  void scatter_input_gradient(const Tensor& sum, std::int64_t first, std::int64_t n) {
    if (!wanted_.input || (kept_.all && type_ == wide_)) return;
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

  LinearGradients gradients() {
    const auto none = [&] { return at::empty({0}, input_.options()); };  // outputs of an op have memory of their own
    if (weight_sum_.defined()) weight_gradient_.copy_(weight_sum_);
    return {wanted_.input ? input_gradient_.view(sizes_) : none(), wanted_.weight ? weight_gradient_ : none(),
            wanted_.bias ? bias_gradient_.to(type_) : none()};
  }

 private:
  // How products of halves give sums in float.
  enum class Way {
    Direct,         // there are no halves
    Widening,       // the device's products of halves give floats
    HalfGradients,  // logits from converted operands; gradients, which are rounded anyway, as halves
    Widened,        // everything from converted operands
  };

  at::ScalarType gradient_type() const { return way_ == Way::Widened ? wide_ : type_; }
  bool softens() const { return softcap_ != 0 || temperature_ != 1; }

  // Converts the classes [first, first + n) of the weight, a part at a time: body(of the part, part).
  template <class Body>
  void widened(std::int64_t first, std::int64_t n, const Body& body) {
    if (!widened_.defined()) widened_ = backend_.empty({std::min(kWidened, classes_), hidden_}, like_);
    for_parts(n, kWidened, [&](std::int64_t begin, std::int64_t part) {
      const auto wide = widened_.narrow(0, 0, part).copy_(weight_.narrow(0, first + begin, part));
      body(begin, wide);
    });
  }

  void multiply(Tensor logits, const Hidden& hidden, std::int64_t first) {
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
    if (wanted_.bias) bias_gradient_.narrow(0, first, gradient.size(1)).add_(gradient.sum(0, false, wide_));
  }

  void add_input_gradient(Tensor& sum, const Tensor& gradient, std::int64_t first_class, bool first) {
    if (way_ != Way::Widened) {
      return add_product(sum, gradient, weight_.narrow(0, first_class, gradient.size(1)), first);
    }
    widened(first_class, gradient.size(1), [&](std::int64_t begin, const Tensor& weight) {
      add_product(sum, gradient.narrow(1, begin, weight.size(0)), weight, first && begin == 0);
    });
  }

  const LinearBackend& backend_;
  const LinearKept& kept_;
  const double softcap_;  // 0: none
  const double temperature_;
  const Wanted wanted_;
  const at::ScalarType type_, wide_;
  const std::int64_t classes_, hidden_;
  const at::IntArrayRef sizes_;
  const Tensor input_;   // [N, H]
  const Tensor weight_;  // [C, H]
  const at::TensorOptions like_;
  Way way_;
  Tensor bias_;
  Tensor widened_;  // a part of the weight
  Tensor input_gradient_, weight_gradient_, bias_gradient_;
  Tensor weight_sum_;  // in the accumulation dtype, where several chunks add to it
};

// How many of `count` kept rows of so many bytes are held at once.
std::int64_t rows_at_once(std::int64_t count, std::int64_t row_bytes, std::optional<std::int64_t> chunk_size) {
  count = std::max<std::int64_t>(count, 1);
  if (chunk_size) return balanced(count, *chunk_size, 1);
  return balanced(count, std::max(kFewestRows, kWorkspace / row_bytes), kMultiple);
}

// Calls body(first row, number of rows) chunk by chunk and returns the sum of the losses that it gives, or all of them
// if there is no reduction.
template <class Body>
Tensor chunked_losses(const LinearBackend& backend, std::int64_t count, std::int64_t rows, Reduction reduction,
                      const at::TensorOptions& like, const Body& body) {
  std::vector<Tensor> losses;
  for_parts(count, rows, [&](std::int64_t first, std::int64_t n) { losses.push_back(body(first, n)); });
  if (losses.empty()) return reduction == Reduction::None ? at::zeros({0}, like) : at::zeros({}, like);
  const auto all = losses.size() == 1 ? losses[0] : at::cat(losses);
  return reduction == Reduction::None ? all : backend.sum(all);
}

// Of kept rows -> of all rows, zeros where they are masked.
Tensor spread(const Tensor& kept_values, const LinearKept& kept, at::IntArrayRef sizes, Tensor all) {
  if (kept.count() > 0) all.index_copy_(0, kept.rows, kept_values);
  auto shape = at::DimVector(sizes);
  shape.append(kept_values.sizes().begin() + 1, kept_values.sizes().end());
  return all.view(shape);
}

// What arrives at each row from upstream -> at the kept ones.
Tensor gathered(const Tensor& grad, const LinearKept& kept, at::IntArrayRef sizes, at::ScalarType wide) {
  return grad.to(wide).expand(sizes).reshape({c10::multiply_integers(sizes)}).index_select(0, kept.rows);
}

// [n, classes] of a class mask whose sizes are those of the rows or 1, of some kept rows.
Tensor mask_of_rows(const Tensor& mask, const Tensor& rows, at::IntArrayRef sizes) {
  auto rest = rows;
  c10::List<OptionalTensor> indices;
  indices.resize(sizes.size());
  for (auto d = static_cast<std::int64_t>(sizes.size()) - 1; d >= 0; --d) {
    const auto index = at::remainder(rest, sizes[d]);
    indices.set(d, mask.size(d) == 1 ? at::zeros_like(index) : index);
    rest = at::div(rest, sizes[d], "floor");
  }
  return at::index(mask, indices).contiguous();
}

// One that masks whole rows, which the plan has left out, is none of the classes.
Tensor class_mask_of(const OptionalTensor& class_mask, std::int64_t classes) {
  return class_mask && class_mask->size(-1) == classes ? byte_mask(*class_mask) : Tensor();
}

// uint8 [n, classes] or [classes], of some kept rows and classes; undefined where there is none.
Tensor class_mask_in(const Tensor& class_mask, const LinearKept& kept, at::IntArrayRef sizes, std::int64_t first,
                     std::int64_t n, std::int64_t first_class, std::int64_t classes) {
  if (!class_mask.defined()) return class_mask;
  const auto of_classes = class_mask.narrow(-1, first_class, classes);
  return class_mask.dim() == 1 ? of_classes.contiguous()
                               : mask_of_rows(of_classes, kept.rows.narrow(0, first, n), sizes);
}

// Cross entropies, log-probabilities and entropies of one head.
class Linear {
 public:
  Linear(const LinearBackend& backend, const Tensor& input, const Tensor& linear_weight, const Tensor& target,
         const OptionalTensor& mask, const LinearOptions& options)
      : backend_(backend),
        options_(options.loss),
        sizes_(target.sizes()),
        wide_(accumulation_type(input.scalar_type())),
        kept_(backend.keep(check_linear(input, linear_weight, target, mask, options), options_.reduction,
                           options_.normalizer, options_.max_kept, wide_)),
        head_(backend, kept_, input, linear_weight, options_.linear_bias, options_.softcap, options_.temperature,
              {options.input_grad, options.weight_grad, options.bias_grad}),
        class_mask_(class_mask_of(options_.class_mask, head_.classes())) {
    if (options_.weight) class_weight_ = options_.weight->to(wide_).contiguous();
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor> by_rows() {
    head_.start_gradients();
    const auto rows = rows_at_once();
    const Head::Workspace space(head_, kept_.count() == 0 ? 0 : rows, head_.classes());
    const auto loss = chunked_losses(
        backend_, kept_.count(), rows, options_.reduction, head_.like(), [&](std::int64_t first, std::int64_t n) {
          const auto hidden = head_.hidden_of(first, n);
          const auto block = block_of(first, n, 0, head_.classes(), space);
          head_.make_logits(block.logits, hidden, 0);
          const auto losses = backend_.losses(block);
          if (head_.wanted()) head_.add_rows(head_.harden(block.gradient, block.logits, space), hidden, first);
          return losses;
        });
    return std::tuple_cat(std::tuple{loss}, head_.gradients());
  }

  std::tuple<Tensor, Tensor, Tensor> rows_forward() {
    const auto count = kept_.count(), all = c10::multiply_integers(sizes_);
    const auto& like = head_.like();
    Tensor loss = at::zeros({0}, like), entropy = loss, saved = at::zeros({0, kLinearState}, like);
    if (count > 0) {
      const auto size = wide_ == at::kDouble ? sizeof(LinearRow<double>) : sizeof(LinearRow<float>);
      const auto states = at::empty({count, static_cast<std::int64_t>(size)}, like.dtype(at::kByte));
      for_classes([&](const LinearBlock& block, const auto&, const auto&) { backend_.visit(block, states); });
      std::tie(loss, entropy, saved) = backend_.conclude(rows_of(0, count), target_weight(), states);
    }
    auto masked_rows = at::zeros({all, kLinearState}, like);
    masked_rows.select(1, 1).fill_(1);
    return {options_.reduction == Reduction::None ? spread(loss, kept_, sizes_, at::zeros({all}, like))
                                                  : backend_.sum(loss),
            spread(entropy, kept_, sizes_, at::zeros({all}, like)), spread(saved, kept_, sizes_, masked_rows)};
  }

  LinearGradients rows_backward(const Tensor& grad, const OptionalTensor& entropy_grad, const Tensor& states) {
    head_.start_gradients();
    const auto count = kept_.count();
    if (count == 0) return head_.gradients();
    kept_.coefficient = kept_.coefficient * gathered(grad, kept_, sizes_, wide_);
    const auto of_entropy = entropy_grad ? gathered(*entropy_grad, kept_, sizes_, wide_) : Tensor();
    const auto saved = states.to(wide_).reshape({-1, kLinearState}).index_select(0, kept_.rows);
    const auto weight = target_weight();
    auto input_sum = head_.input_gradient_sum(0, count);
    for_classes([&](const LinearBlock& block, const Head::Hidden& hidden, const Head::Workspace& space) {
      backend_.write(block, weight, saved, of_entropy);
      head_.add_classes(head_.harden(block.gradient, block.logits, space), hidden, block.first, input_sum);
    });
    head_.scatter_input_gradient(input_sum, 0, count);
    return head_.gradients();
  }

 private:
  std::int64_t rows_at_once() const {
    return masked_loss::rows_at_once(kept_.count(), head_.row_bytes(), options_.chunk_size);
  }

  // Calls body(block, hidden, space) for blocks of classes, each of all kept rows, in a workspace as large as that of
  // some rows with all classes.
  template <class Body>
  void for_classes(const Body& body) {
    const auto count = kept_.count(), classes = head_.classes();
    const auto width = balanced(classes, rows_at_once() * classes / count, options_.chunk_size ? 1 : kMultiple);
    const auto hidden = head_.hidden_of(0, count);
    const Head::Workspace space(head_, count, width);
    for_parts(classes, width, [&](std::int64_t first, std::int64_t n) {
      const auto block = block_of(0, count, first, n, space);
      head_.make_logits(block.logits, hidden, first);
      body(block, hidden, space);
    });
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
                       const Head::Workspace& space) const {
    auto block = rows_of(first, n);
    block.logits = space.logits(n, classes);
    block.gradient = space.gradient(n, classes);
    block.first = first_class;
    if (class_weight_.defined()) block.weight = class_weight_.narrow(0, first_class, classes);
    block.class_mask = class_mask_in(class_mask_, kept_, sizes_, first, n, first_class, classes);
    return block;
  }

  // [K], undefined where all weigh 1.
  Tensor target_weight() const {
    return class_weight_.defined() ? class_weight_.index_select(0, kept_.target.clamp(0)) : Tensor();
  }

  const LinearBackend& backend_;
  const LinearCrossEntropyOptions& options_;
  const at::IntArrayRef sizes_;  // of the rows
  const at::ScalarType wide_;
  LinearKept kept_;
  Head head_;
  Tensor class_weight_, class_mask_;
};

// Divergences between what two heads say: chunks of rows with all classes, of which both logits are at hand.
class LinearPairs {
 public:
  LinearPairs(const LinearBackend& backend, const Tensor& input, const Tensor& linear_weight,
              const Tensor& target_input, const Tensor& target_linear_weight, const OptionalTensor& mask,
              const LinearKLCall& of)
      : backend_(backend),
        options_(of.kl),
        sizes_(input.sizes().slice(0, input.dim() - 1)),
        wide_(accumulation_type(input.scalar_type())),
        index_(linear_kl_index(input)),
        kept_(backend.keep(
            check_linear_kl(input, linear_weight, target_input, target_linear_weight, index_, mask, options_),
            options_.reduction, options_.normalizer, options_.max_kept, wide_)),
        head_(backend, kept_, input, linear_weight, options_.linear_bias, options_.softcap, options_.temperature,
              {of.wants(0), of.wants(1), of.wants(2)}),
        target_head_(backend, kept_, target_input, target_linear_weight, options_.target_linear_bias, options_.softcap,
                     options_.temperature, {of.wants(3), of.wants(4), of.wants(5)}),
        class_mask_(class_mask_of(options_.class_mask, head_.classes())) {}

  LinearKLResults operator()(const OptionalTensor& grad) {
    head_.start_gradients();
    target_head_.start_gradients();
    const auto count = kept_.count(), classes = head_.classes();
    if (grad) kept_.coefficient = kept_.coefficient * gathered(*grad, kept_, sizes_, wide_);
    const auto rows = rows_at_once(count, head_.row_bytes() + target_head_.row_bytes(), options_.chunk_size);
    const auto held = count == 0 ? 0 : rows;
    const Head::Workspace space(head_, held, classes), target_space(target_head_, held, classes);
    auto loss = chunked_losses(
        backend_, count, rows, options_.reduction, head_.like(), [&](std::int64_t first, std::int64_t n) {
          const auto hidden = head_.hidden_of(first, n), target_hidden = target_head_.hidden_of(first, n);
          const LinearPair pair{space.logits(n, classes),
                                target_space.logits(n, classes),
                                space.gradient(n, classes),
                                target_space.gradient(n, classes),
                                class_mask_in(class_mask_, kept_, sizes_, first, n, 0, classes),
                                kept_.target.narrow(0, first, n),
                                kept_.coefficient.narrow(0, first, n),
                                options_.kind,
                                options_.beta};
          head_.make_logits(pair.logits, hidden, 0);
          target_head_.make_logits(pair.target_logits, target_hidden, 0);
          const auto losses = backend_.divergence(pair);
          const auto add = [&](Head& head, const Tensor& gradient, const Tensor& logits, const auto& of, auto& in) {
            if (head.wanted()) head.add_rows(head.harden(gradient, logits, in), of, first);
          };
          add(head_, pair.gradient, pair.logits, hidden, space);
          add(target_head_, pair.target_gradient, pair.target_logits, target_hidden, target_space);
          return losses;
        });
    if (options_.reduction == Reduction::None) {
      loss = spread(loss, kept_, sizes_, at::zeros({c10::multiply_integers(sizes_)}, head_.like()));
    }
    return std::tuple_cat(std::tuple{loss}, head_.gradients(), target_head_.gradients());
  }

 private:
  const LinearBackend& backend_;
  const LinearKLOptions& options_;
  const at::IntArrayRef sizes_;  // of the rows
  const at::ScalarType wide_;
  const Tensor index_;
  LinearKept kept_;
  Head head_, target_head_;
  Tensor class_mask_;
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

LinearKLResults linear_kl_gradients(const LinearBackend& backend, const Tensor& input, const Tensor& linear_weight,
                                    const Tensor& target_input, const Tensor& target_linear_weight,
                                    const OptionalTensor& mask, const OptionalTensor& grad, const LinearKLCall& of) {
  return LinearPairs(backend, input, linear_weight, target_input, target_linear_weight, mask, of)(grad);
}

}  // namespace masked_loss
