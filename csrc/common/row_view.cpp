#include "row_view.h"

#include <ATen/ops/ne.h>
#include <ATen/ops/zeros.h>
#include <masked_loss/masks.h>

#include <algorithm>
#include <limits>

#include "strides.h"

namespace masked_loss {

template <class A>
RowView<A>::RowView(const RowArguments& rows_of) : arguments(rows_of), sizes(row_sizes(rows_of)), view{} {
  constexpr auto type = std::is_same_v<A, double> ? at::kDouble : at::kFloat;
  const bool probabilities = arguments.probabilities;
  target = probabilities ? at::zeros({}, arguments.target.options().dtype(at::kLong)) : arguments.target;
  std::array<at::DimVector, 4> strides;
  view.target = target.const_data_ptr();
  view.target_bytes = static_cast<int>(target.itemsize());
  strides[0] = row_strides(target);
  if (arguments.mask) mask = *arguments.mask;
  check_mask_values(arguments.op, "mask", arguments.mask);
  check_mask_values(arguments.op, "class_mask", arguments.class_mask);
  // Of no class there are no probabilities.
  if (probabilities && *arguments.classes == 0) mask = at::zeros({}, target.options().dtype(at::kBool));
  const auto ids = arguments.ignore_index;
  if (ids.size() <= kMaxIgnored) {
    std::copy(ids.begin(), ids.end(), view.ignored);
    view.ignored_count = static_cast<int>(ids.size());
  } else {  // more than fit in the arguments of a kernel
    const auto counts = mask_from_ids(target, ids);
    mask = mask.defined() ? mask.ne(0).logical_and(counts) : counts;
  }
  if (mask.defined()) {
    view.mask = mask.const_data_ptr();
    view.mask_bytes = static_cast<int>(mask.itemsize());
    strides[1] = row_strides(mask);
  }
  if (arguments.sample_weight) {
    sample_weight = arguments.sample_weight->to(type);
    view.sample_weight = sample_weight.const_data_ptr<A>();
    strides[2] = row_strides(sample_weight);
  }
  if (arguments.weight) {
    weight = arguments.weight->to(type).contiguous();
    // Class probabilities have it in their loss, but not in the divisor of a mean.
    if (!probabilities) view.weight = weight.const_data_ptr<A>();
  }
  // Without a number of classes only negative targets are known to be wrong.
  view.classes = arguments.classes ? arguments.classes->expect_int() : std::numeric_limits<std::int64_t>::max();
  if (arguments.class_mask) {
    class_mask = byte_mask(*arguments.class_mask);
    const bool shared = class_mask.dim() == 1 && !sizes.empty();
    class_mask_dim = shared ? 0 : arguments.dim;
    if (!shared) class_mask_strides = row_strides(class_mask, class_mask_dim);
    view.class_mask = static_cast<const std::uint8_t*>(class_mask.const_data_ptr());
    view.class_mask_stride = class_mask.stride(class_mask_dim);
    view.class_mask_size = class_mask.size(class_mask_dim);
    strides[3] = class_mask_strides;
  }
  rows = make_rows<4>(sizes, strides);
}

template struct RowView<float>;
template struct RowView<double>;

}  // namespace masked_loss
