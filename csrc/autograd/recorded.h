#pragma once

#include <ATen/SavedTensorHooks.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/clone.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/graph_task.h>

#include "common/checks.h"
#include "common/cross_entropy_ops.h"
#include "common/paths.h"
#include "composite/cross_entropy.h"

// What the custom autograd functions have in common. Each takes the tensors that it has gradients for by themselves,
// and the rest of its call in a struct, which autograd does not look into.
namespace masked_loss::autograd {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// A node of the graph. torch's asks for its name in each backward pass, and would demangle it from a C++ type.
template <class Function>
struct RecordedNode : torch::autograd::CppNode<Function> {
  std::string name() const override { return std::string("masked_loss::") + Function::name; }
};

// torch's Function for Path::Recorded alone: some input requires grad, none has a tangent, and no output is an input or
// a view of one. `T` has a `name`, which is shown as a tensor's grad_fn.
template <class T>
struct Function : torch::autograd::Function<T> {
  static constexpr bool is_traceable = true;

  template <class... Arguments>
  static auto apply(const Arguments&... arguments) {
    const auto node = make<RecordedNode<T>>();
    variable_list inputs;
    inputs.reserve(sizeof...(arguments));
    node->is_variable_input_.reserve(sizeof...(arguments));
    torch::autograd::extract_vars(node->is_variable_input_, inputs, arguments...);
    node->set_ctx_grad_fn(node);
    node->set_next_edges(torch::autograd::collect_next_edges(inputs));
    const auto outputs = [&] {
      const at::NoGradGuard no_grad;
      return T::forward(&node->ctx_, arguments...);
    }();
    record(node, outputs);
    node->save_variables_to_ctx();
    return outputs;
  }

 private:
  // In a smart pointer, of a kind that depends on torch's version.
  template <class Node>
  static auto make() {
    if constexpr (std::is_base_of_v<c10::intrusive_ptr_target, Node>) {
      return c10::make_intrusive<Node>();
    } else {
      return std::shared_ptr<Node>(new Node, [](Node* node) { deleteNode(node); });
    }
  }

  template <class Node>
  static void record(const Node& node, const Tensor& output) {
    torch::autograd::set_history(output, node);
    node->output_info_.emplace_back(output);
  }
  template <class Node>
  static void record(const Node& node, const variable_list& outputs) {
    for (const auto& output : outputs) record(node, output);
  }
};

// What a backward pass needs of a call: tensors, and the options.
template <class Options>
struct SavedCall {
  variable_list tensors;
  Options options;
};

// Saves a call: its tensors and those among the members of `options` as autograd's saved variables, the other members
// in one list. Of that a vector is its size and its elements: compiled autograd has no type for an empty list in a
// list, and no hash for a tuple.
template <class Options>
void save_call(AutogradContext* ctx, variable_list tensors, const Options& options) {
  constexpr auto members = std::tuple_size_v<decltype(fields(options))>;
  c10::impl::GenericList numbers(c10::AnyType::get());
  numbers.reserve(members + 1);
  tensors.reserve(tensors.size() + members);
  ctx->saved_data.reserve(4);
  const auto save = [&]<class Member>(const Member& member) {
    if constexpr (std::is_same_v<Member, OptionalTensor>) {
      tensors.push_back(or_undefined(member));
    } else if constexpr (std::is_enum_v<Member>) {
      numbers.push_back(static_cast<std::int64_t>(member));
    } else if constexpr (requires { member.begin(); }) {
      numbers.push_back(static_cast<std::int64_t>(member.size()));
      for (const auto& element : member) numbers.push_back(element);
    } else {
      numbers.push_back(member);
    }
  };
  std::apply([&](const auto&... member) { (save(member), ...); }, fields(options));
  ctx->save_for_backward(std::move(tensors));
  ctx->saved_data["options"] = std::move(numbers);
}

template <class Options>
SavedCall<Options> load_call(AutogradContext* ctx) {
  SavedCall<Options> saved{ctx->get_saved_variables(), {}};
  const auto numbers = ctx->saved_data["options"].toList();
  const auto load = [&]<class... Member>(std::tuple<const Member&...>*) {
    std::size_t number = 0, tensor = saved.tensors.size() - (0 + ... + std::is_same_v<Member, OptionalTensor>);
    const auto next = [&]<class M>(M*) -> M {
      if constexpr (std::is_same_v<M, OptionalTensor>) {
        return or_nullopt(saved.tensors[tensor++]);
      } else if constexpr (std::is_enum_v<M>) {
        return static_cast<M>(numbers.get(number++).toInt());
      } else if constexpr (requires(M member) { member.begin(); }) {
        M vector(numbers.get(number++).toInt());
        for (auto& element : vector) element = numbers.get(number++).to<typename M::value_type>();
        return vector;
      } else {
        return numbers.get(number++).to<M>();
      }
    };
    saved.options = Options{next(static_cast<Member*>(nullptr))...};
  };
  load(static_cast<decltype(fields(saved.options))*>(nullptr));
  return saved;
}

// Whether hooks take what is saved. They may keep a tensor itself, and nobody tells them when it is changed in place.
inline bool has_hooks() { return at::SavedTensorDefaultHooks::get_hooks().has_value(); }

// Whether the forward pass makes the gradient, while each element is at hand: that of a scalar. The losses of 'none'
// wait for theirs, and so does float16, whose small gradients would be lost before a loss scale could save them.
inline bool makes_gradient(const Tensor& input, Reduction reduction) {
  return reduction != Reduction::None && input.scalar_type() != at::kHalf;
}

// A gradient that the forward pass has made and saved, times the upstream one. `shared`: hooks had it in their hands,
// and may have given the same tensor to others.
inline Tensor scaled_gradient(Tensor gradient, const Tensor& grad, bool shared) {
  if (is_batched(grad)) return composite_scale_gradient(gradient, grad);
  // A graph that is kept may be run again: what it has saved must stay.
  if (shared || torch::autograd::get_current_graph_task_keep_graph()) gradient = gradient.clone();
  const at::AutoDispatchBelowADInplaceOrView below;
  call<ScaleGradient_>(gradient, grad);
  return gradient;
}

// A tensor that is read only where a backward pass is differentiated, kept beside the saved variables: any backward
// pass unpacks those, all at once, and refuses the ones that were changed in place.
inline void save_unread(AutogradContext* ctx, const Tensor& tensor) {
  ctx->saved_data["unread"] = tensor;
  ctx->saved_data["version"] = static_cast<std::int64_t>(tensor._version());  // by itself, where compilers lift it
}

inline Tensor load_unread(AutogradContext* ctx, const char* op) {
  const auto tensor = ctx->saved_data["unread"].toTensor();
  const auto saved = ctx->saved_data["version"].toInt(), now = static_cast<std::int64_t>(tensor._version());
  TORCH_CHECK(saved == now, op, ": expected input as it was in the forward pass, which a second derivative needs, got ",
              "one that has been modified by an inplace operation since: it is at version ", now, " instead of ",
              saved);
  return tensor;
}

// After a backward pass, as the saved variables are.
inline void release_unread(AutogradContext* ctx) {
  if (!torch::autograd::get_current_graph_task_keep_graph()) ctx->saved_data.erase("unread");
}

// Inner ops have no derivative of their own.
template <class Library>
void implement_inner(Library& m, std::initializer_list<const char*> ops) {
  for (const auto* op : ops) m.impl(op, torch::autograd::autogradNotImplementedFallback());
}

}  // namespace masked_loss::autograd
