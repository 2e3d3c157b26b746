#pragma once

#include "checks.h"

namespace masked_loss {

// What the checks of the families are made of. `op` and `name` are for the message.

void check_layout(const char* op, const char* name, const Tensor& tensor);
void check_beside(const char* op, const char* name, const Tensor& tensor, const char* other, const Tensor& there);
// What the kernels read is checked by check_mask_values.
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
// Of a result that may be asked for in another dtype.
void check_dtype(const char* op, std::optional<at::ScalarType> dtype);
void check_normalizer(const char* op, const OptionalTensor& normalizer, Reduction reduction, const Tensor& beside);

// Dimensions as numbers that are not negative; none: all. A 0-d tensor has one, as in torch.
at::DimVector wrapped_dims(const char* op, at::IntArrayRef dim, std::int64_t rank);

// Of an element, in a message.
at::DimVector position_of(std::int64_t element, at::IntArrayRef shape);

}  // namespace masked_loss
