#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/CompileTimeFunctionPointer.h>

#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace masked_loss {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// An argument that may not be there, among tensors: undefined where it is not.
inline Tensor or_undefined(const OptionalTensor& tensor) { return tensor.value_or(Tensor()); }
inline OptionalTensor or_nullopt(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

// An op of the library as a type: a struct with `name`, and `overload` if it has one, that inherits Op or
// OpWithOptions.
template <class Signature_>
struct Op {
  using Signature = Signature_;
  static constexpr auto overload = "";

  template <class Handle, class... Arguments>
  static auto call(const Handle& op, Arguments&&... arguments) {
    return op.call(std::forward<Arguments>(arguments)...);
  }
};

// The type that a member of an options struct has as an argument of an op.
template <class T>
struct DispatcherType {
  using type = const T&;
};
template <class T>
  requires std::is_arithmetic_v<T>
struct DispatcherType<T> {
  using type = T;
};
template <class T>
  requires std::is_enum_v<T>
struct DispatcherType<T> {
  using type = std::int64_t;
};
template <class T>
struct DispatcherType<std::vector<T>> {
  using type = at::ArrayRef<T>;
};
template <class T>
using dispatcher_type = typename DispatcherType<T>::type;

template <class T>
T from_dispatcher(dispatcher_type<T> value) {
  if constexpr (requires { value.vec(); }) {
    return value.vec();
  } else {
    return static_cast<T>(value);
  }
}

template <class Options, class Result, class Members, class... Lead>
struct OpOfMembers;

template <class Options_, class Result, class... Member, class... Lead>
struct OpOfMembers<Options_, Result, std::tuple<const Member&...>, Lead...>
    : Op<Result(Lead..., dispatcher_type<Member>...)> {
  using Options = Options_;

  // `function`, which takes the options as a struct, as a kernel of the op.
  template <auto function>
  static Result kernel(Lead... lead, dispatcher_type<Member>... member) {
    return function(lead..., Options{from_dispatcher<Member>(member)...});
  }

  template <class Handle>
  static Result call(const Handle& op, Lead... lead, const Options& options) {
    return std::apply(
        [&](const Member&... member) { return op.call(lead..., static_cast<dispatcher_type<Member>>(member)...); },
        fields(options));
  }
};

// An op whose arguments are `Lead...` and then the members of `Options`, in the order of fields(const Options&).
template <class Options, class Result, class... Lead>
using OpWithOptions = OpOfMembers<Options, Result, decltype(fields(std::declval<const Options&>())), Lead...>;

// The handle of an op, for the dispatcher.
template <class Op>
auto find() {
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow((std::string("masked_loss::") + Op::name).c_str(), Op::overload)
      .template typed<typename Op::Signature>();
}

// Calls an op by way of the dispatcher.
template <class Op, class... Arguments>
auto call(Arguments&&... arguments) {
  static const auto op = find<Op>();
  return Op::call(op, std::forward<Arguments>(arguments)...);
}

// Registers `function` as a kernel of an op; that of an op with options takes them as a struct.
template <class Op, auto function, class Library>
  requires requires { typename Op::Options; }
void impl(Library& m) {
  m.impl(Op::name, TORCH_FN((Op::template kernel<function>)));
}
template <class Op, typename Op::Signature* function, class Library>
void impl(Library& m) {
  m.impl((std::string(Op::name) + (*Op::overload == 0 ? "" : ".") + Op::overload).c_str(), TORCH_FN(function));
}

}  // namespace masked_loss
