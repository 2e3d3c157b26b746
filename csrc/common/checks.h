#pragma once

#include <masked_loss/reduction.h>

#include "ops.h"

namespace masked_loss {

// What the checks of the families are made of, on shapes that may be symbolic and never on values unless it is said.
// `op` and `name` are for the message.

void check_layout(const char* op, const char* name, const Tensor& tensor);
void check_device(const char* op, const char* name, const Tensor& tensor, const char* other, const Tensor& there);
// Its values are checked by check_mask_values, where kernels read them.
void check_mask_dtype(const char* op, const char* name, const Tensor& mask, const char* hint);
void check_weight_dtype(const char* op, const char* name, const Tensor& weight, const char* hint);
// Of a mask or a weight: `tensor` has the rank of `shape`, and each size equals it or is 1.
void check_broadcast(const char* op, const char* name, const Tensor& tensor, c10::SymIntArrayRef shape, const char* of);
// From the last dimension back, each size of `name` is 1 or that of `of`; with `both`, either may be 1.
void check_trailing(const char* op, const char* name, const char* of, c10::SymIntArrayRef ours,
                    c10::SymIntArrayRef theirs, bool both = false);
// An argument without a derivative: an error, as in torch, and never a silent zero.
void check_no_grad(const char* op, const char* name, const OptionalTensor& tensor);
void check_floating(const char* op, const char* name, const Tensor& tensor);
void check_integers(const char* op, const char* name, const Tensor& tensor);
void check_not_negative(const char* op, const char* name, const c10::SymInt& value);
// Of a result that may be asked for in another dtype.
void check_dtype(const char* op, std::optional<at::ScalarType> dtype);
void check_normalizer(const char* op, const OptionalTensor& normalizer, Reduction reduction, const Tensor& input);
void check_normalizer_value(const char* op, double normalizer);

// The wrapped dimensions, all of them if `dim` is empty. A 0-d tensor has one, as in torch.
at::DimVector wrapped_dims(const char* op, at::IntArrayRef dim, std::int64_t rank);
at::DimVector every_dim(std::int64_t rank);  // 0, 1, ... rank - 1

// Of an element, in a message.
at::DimVector position_of(std::int64_t element, at::IntArrayRef shape);

// Whether values can be looked at without a wait: memory of the CPU, and not that of a fake, functional or wrapped
// tensor.
bool is_readable(const Tensor& tensor);

// MASKED_LOSS_CHECK=1 in the environment, which is read once: values are checked on devices too, where they have to be
// waited for.
bool checks_values();

// (mask, op, name): the error of an integer mask that holds something else than 0 and 1.
struct CheckMask : Op<void(const Tensor&, std::string_view, std::string_view)> {
  static constexpr auto name = "_check_mask";
};

// An integer mask holds 0 and 1 alone, where its values are read: on the CPU, and with MASKED_LOSS_CHECK=1 elsewhere. A
// bool mask is not looked at: its bytes may be any. By an op, whose kernels the dispatcher finds beneath any wrapper.
void check_mask_values(const char* op, const char* name, const OptionalTensor& mask);
void check_readable_mask(const Tensor& mask, std::string_view op, std::string_view name);  // that kernel on the CPU

// One byte an element, which is what kernels read: it keeps where it is not 0. Not as bool, whose bytes a compiler
// takes for 0 and 1, while a view of other memory may hold any.
Tensor byte_mask(const Tensor& mask);

// float for half types, else the input's own.
at::ScalarType accumulation_type(at::ScalarType type);

// The dtype of a result that is computed in another one: `dtype` where the call asks for one, float for half types
// under autocast. Asked once, above the dispatcher's backend keys: a compiled graph runs with autocast off.
at::ScalarType result_type(const Tensor& input, at::ScalarType computed, std::optional<at::ScalarType> dtype = {});

// `tensor` in that dtype. Below autograd an op must not return its input, which Tensor::to does where there is nothing
// to convert.
inline Tensor converted(const Tensor& tensor, at::ScalarType type) {
  return tensor.scalar_type() == type ? tensor : tensor.to(type);
}

}  // namespace masked_loss
