#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace masked_loss {

// How a member of an options struct travels through the dispatcher.
template <class T>
struct Wire {
  using type = const T&;
};
template <class T>
  requires std::is_arithmetic_v<T>
struct Wire<T> {
  using type = T;
};
template <class T>
  requires std::is_enum_v<T>
struct Wire<T> {
  using type = std::int64_t;
};
template <class T>
struct Wire<std::vector<T>> {
  using type = at::ArrayRef<T>;
};

template <class T>
T unwire(typename Wire<T>::type value) {
  if constexpr (requires { value.vec(); }) {
    return value.vec();
  } else {
    return static_cast<T>(value);
  }
}

template <class Options, class Result, class Members, class... Lead>
struct Flat;

// An op whose arguments are `Lead...` and then the members of `Options`, in their order.
template <class Options, class Result, class... Member, class... Lead>
struct Flat<Options, Result, std::tuple<Member&...>, Lead...> {
  using Signature = Result(Lead..., typename Wire<std::remove_const_t<Member>>::type...);
  using Handle = c10::TypedOperatorHandle<Signature>;

  template <auto function>
  static Result kernel(Lead... lead, typename Wire<std::remove_const_t<Member>>::type... member) {
    return function(lead..., Options{unwire<std::remove_const_t<Member>>(member)...});
  }

  static Handle find(const char* name) {
    return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").template typed<Signature>();
  }

  static Result call(const Handle& op, Lead... lead, const Options& options) {
    return std::apply(
        [&](auto&... member) {
          return op.call(lead..., static_cast<typename Wire<std::remove_const_t<Member>>::type>(member)...);
        },
        fields(options));
  }
};

template <class Options, class Result, class... Lead>
using Carry = Flat<Options, Result, decltype(fields(std::declval<const Options&>())), Lead...>;

}  // namespace masked_loss
