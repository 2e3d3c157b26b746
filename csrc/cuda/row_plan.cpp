#include "cuda/row_plan.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/strides.h"

namespace masked_loss::cuda {
namespace {

Tensor empty(std::int64_t size, at::ScalarType type, const Tensor& like) {
  return at::empty({size}, like.options().dtype(type));
}

Tensor empty_chunks(std::int64_t rows, const Tensor& like) {
  return empty(std::max<std::int64_t>(1, plan_chunks(rows)) * static_cast<std::int64_t>(sizeof(PlanChunk)), at::kByte,
               like);
}

PlanChunk* data(const Tensor& chunks) { return reinterpret_cast<PlanChunk*>(chunks.data_ptr<std::uint8_t>()); }

template <class A>
RowPlanWork<A> reading(const RowView<A>& from, const Tensor& chunks) {
  RowPlanWork<A> work{};
  work.view = from.view;
  work.rows = from.rows;
  work.chunks = data(chunks);
  return work;
}

// Looks at the chunks on the host.
template <class A>
void check_chunks(const RowView<A>& from, const Tensor& chunks) {
  const auto on_host = chunks.cpu();
  const auto rows = from.rows.count;
  for (std::int64_t c = 0; c < plan_chunks(rows); ++c) {
    const auto first = data(on_host)[c].first;
    if (first == rows) continue;
    throw_out_of_range(from.arguments, first, from.target.reshape({-1})[first].template item<std::int64_t>(),
                       from.view.classes);
  }
}

template <class A>
constexpr at::ScalarType type_of() {
  return std::is_same_v<A, double> ? at::kDouble : at::kFloat;
}

}  // namespace

template <class A>
RowPlan<A> make_row_plan(const RowView<A>& from, const RowPlanWishes& wishes, const Device& device) {
  const auto& target = from.target;
  const auto rows = from.rows.count;
  const auto chunks = empty_chunks(rows, target);
  RowPlan<A> plan{empty(rows, at::kLong, target), empty(rows, type_of<A>(), target), {}, {}};
  auto work = reading(from, chunks);
  work.index = plan.index.template mutable_data_ptr<std::int64_t>();
  work.coefficient = plan.coefficient.template mutable_data_ptr<A>();
  if (wishes.order) {
    plan.order = empty(rows, at::kLong, target);
    plan.kept = empty(1, at::kLong, target);
    work.order = plan.order.template mutable_data_ptr<std::int64_t>();
    work.kept = plan.kept.template mutable_data_ptr<std::int64_t>();
  }
  if (wishes.loss.defined()) work.loss = wishes.loss.template mutable_data_ptr<A>();
  if (wishes.softmax.defined()) work.softmax = reinterpret_cast<Softmax<A>*>(wishes.softmax.mutable_data_ptr());
  if (wishes.upstream) {
    work.upstream = wishes.upstream->template const_data_ptr<A>();
    work.upstream_rows = make_rows<1>(from.sizes, {row_strides(*wishes.upstream)});
  }
  Tensor normalizer, sequence_weight, sequence_chunks;
  if (wishes.reduction == Reduction::Mean || wishes.reduction == Reduction::SequenceMean) {
    work.divisor = Divisor::Weights;
    if (wishes.normalizer) {
      normalizer = wishes.normalizer->to(at::kDouble);
      work.divisor = Divisor::Normalizer;
      work.normalizer = normalizer.const_data_ptr<double>();
    }
  }
  if (wishes.reduction == Reduction::SequenceMean && rows > 0) {
    work.sequences = from.sizes.empty() ? 1 : from.sizes[0];
    work.sequence_length = rows / work.sequences;
    work.by_length = Quotient(work.sequence_length);
    sequence_weight = empty(work.sequences, at::kDouble, target);
    sequence_chunks = empty(plan_chunks(work.sequences), at::kLong, target);
    work.sequence_weight = sequence_weight.mutable_data_ptr<double>();
    work.sequence_chunks = sequence_chunks.mutable_data_ptr<std::int64_t>();
  }
  plan_rows(work, device.stream);
  if (checks_values() && !is_capturing()) {
    if (normalizer.defined()) check_normalizer_value(from.arguments.op, normalizer.template item<double>());
    if (rows > 0) check_chunks(from, chunks);
  }
  return plan;
}

template <class A>
Tensor sum_of_weights(const RowView<A>& from, const Device& device) {
  const auto chunks = empty_chunks(from.rows.count, from.target);
  const auto work = reading(from, chunks);
  read_rows(work, device.stream);
  if (from.rows.count > 0 && checks_values() && !is_capturing()) check_chunks(from, chunks);
  Tensor sum = at::empty({}, from.target.options().dtype(type_of<A>()));
  sum_weights(work.chunks, plan_chunks(from.rows.count), sum.template mutable_data_ptr<A>(), device.stream);
  return sum;
}

void check_rows(const RowView<float>& from, const Device& device) {
  if (from.rows.count == 0) return;
  const auto chunks = empty_chunks(from.rows.count, from.target);
  read_rows(reading(from, chunks), device.stream);
  check_chunks(from, chunks);
}

template <class A>
Tensor sum_of_losses(const Tensor& losses, const Device& device) {
  const auto partials = empty(plan_chunks(losses.numel()), at::kDouble, losses);
  Tensor sum = at::empty({}, losses.options());
  sum_losses(losses.const_data_ptr<A>(), losses.numel(), partials.mutable_data_ptr<double>(),
             sum.template mutable_data_ptr<A>(), device.stream);
  return sum;
}

#define INSTANTIATE(A)                                                                       \
  template RowPlan<A> make_row_plan(const RowView<A>&, const RowPlanWishes&, const Device&); \
  template Tensor sum_of_weights(const RowView<A>&, const Device&);                          \
  template Tensor sum_of_losses<A>(const Tensor&, const Device&);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

namespace {

void check_mask(const Tensor& mask, std::string_view op, std::string_view name) {
  if (checks_values() && !is_capturing()) check_readable_mask(mask.cpu(), op, name);
}

}  // namespace

MASKED_LOSS_CUDA_IMPL(m) { impl<CheckMask, check_mask>(m); }

}  // namespace masked_loss::cuda
