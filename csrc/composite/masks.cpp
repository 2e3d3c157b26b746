#include "composite/masks.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/where.h>
#include <torch/library.h>

#include <algorithm>

#include "common/checks.h"

namespace masked_loss {

namespace {

struct Run {
  std::int64_t first, last;
};

// Neighbouring ids as one, of ids in order: special tokens often lie side by side.
std::vector<Run> runs_of(at::IntArrayRef ids) {
  std::vector<Run> runs;
  for (const auto id : ids) {
    if (!runs.empty() && (id == runs.back().last || id - 1 == runs.back().last)) {
      runs.back().last = id;
    } else {
      runs.push_back({id, id});
    }
  }
  return runs;
}

}  // namespace

Tensor none_of(const Tensor& tokens, at::IntArrayRef ids) {
  constexpr std::size_t few = 8;
  const auto wide = tokens.to(at::kLong);  // an id that a narrow dtype cannot hold would wrap
  auto sorted = ids.vec();
  std::sort(sorted.begin(), sorted.end());
  const auto runs = runs_of(sorted);
  if (runs.empty()) return at::ones_like(tokens, tokens.options().dtype(at::kBool));
  if (runs.size() > few && is_readable(wide)) {
    // A search instead of a pass over the tokens for each id. Elsewhere the ids would be a copy from the host, which a
    // CUDA graph and a compiler refuse.
    const auto table = at::tensor(sorted, at::kLong);
    const auto found = at::searchsorted(table, wide).clamp_max(static_cast<std::int64_t>(sorted.size()) - 1);
    return table.take(found).ne(wide);
  }
  Tensor result;
  for (const auto& [first, last] : runs) {
    const auto outside = first == last ? wide.ne(first) : wide.lt(first).logical_or(wide.gt(last));
    result = result.defined() ? result.logical_and(outside) : outside;
  }
  return result;
}

Tensor not_after(const c10::SymInt& queries, const c10::SymInt& keys, const at::TensorOptions& options) {
  const auto integers = options.dtype(at::kLong);
  return at::arange(keys, integers).le(at::arange(queries, integers).unsqueeze(-1));
}

Tensor kept_elements(const Tensor& input, const OptionalTensor& mask) {
  return mask ? mask->ne(0).expand_symint(input.sym_sizes()) : Tensor();
}

Tensor kept_or(const Tensor& keep, const Tensor& tensor, double otherwise) {
  return keep.defined() ? at::where(keep, tensor, at::full_like(tensor, otherwise)) : tensor;
}

namespace {

Tensor sequence_mask(const Tensor& lengths, c10::SymInt maxlen, std::string_view padding_side) {
  constexpr auto op = "sequence_mask";
  check_integers(op, "lengths", lengths);
  check_not_negative(op, "maxlen", maxlen);
  TORCH_CHECK_VALUE(padding_side == "right" || padding_side == "left", op,
                    ": expected padding_side to be 'right' or 'left', got '", padding_side, "'");
  const auto position = at::arange(maxlen, lengths.options().dtype(at::kLong));
  const auto length = lengths.to(at::kLong).unsqueeze(-1);
  return padding_side == "right" ? position.lt(length) : (maxlen - position).le(length);
}

Tensor causal_mask(c10::SymInt query_len, std::optional<c10::SymInt> key_len, std::optional<at::Device> device) {
  constexpr auto op = "causal_mask";
  const auto keys = key_len.value_or(query_len);
  check_not_negative(op, "query_len", query_len);
  check_not_negative(op, "key_len", keys);
  return not_after(query_len, keys, at::TensorOptions().device(device));
}

Tensor mask_from_ids(const Tensor& tokens, at::IntArrayRef ids) {
  check_integers("mask_from_ids", "tokens", tokens);
  return none_of(tokens, ids);
}

void implement(torch::Library& m) {
  impl<SequenceMask, sequence_mask>(m);
  impl<CausalMask, causal_mask>(m);
  impl<MaskFromIds, mask_from_ids>(m);
}

}  // namespace

TORCH_LIBRARY_IMPL(masked_loss, CompositeImplicitAutograd, m) { implement(m); }

// functorch does not decompose ops of other libraries by itself.
TORCH_LIBRARY_IMPL(masked_loss, FuncTorchBatched, m) { implement(m); }

}  // namespace masked_loss
