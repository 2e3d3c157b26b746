#include <ATen/Dispatch.h>
#include <ATen/TensorIterator.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <vector>

#include "common/accumulation.h"
#include "common/huge_pages.h"
#include "common/masked_fill.h"
#include "common/reductions_operands.h"
#include "cpu/parallel.h"
#include "cpu/reductions_kernel.h"

namespace masked_loss::cpu {
namespace {

// Elements that one task reduces; fixed, so that the result does not depend on the number of threads.
constexpr std::int64_t kChunk = 1 << 16;
constexpr std::int64_t kEnoughTasks = 64;

template <class Body>
void dispatch(at::ScalarType type, const Body& body) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, type, "reductions", [&] { body(scalar_t{}); });
}

const ReductionsKernels& kernels() {
  static const auto& picked = MASKED_LOSS_PICK(reductions_kernels);
  return picked;
}

using Results = std::vector<Moments>;

Moments merge(const Moments& a, const Moments& b, int order) {
  return order == 1 ? masked_loss::merge<1>(a, b) : masked_loss::merge<2>(a, b);
}

// The reduced elements of a result lie in lines: short ones share a task, and long ones are split into several.
template <class T>
void reduce_lines(const MomentsWork<T>& work, int order, Results& results) {
  const auto& kernel = kernels().of<T>();
  const auto rows = work.kept.count, length = work.reduced.count;
  const auto parts = std::max<std::int64_t>(1, divide_up(length, kChunk));
  const auto together = std::max<std::int64_t>(1, kChunk / std::max<std::int64_t>(1, length));
  Results partial(rows * parts);
  run_tasks(divide_up(rows * parts, together), [&] {
    return [&](std::int64_t task) {
      for (auto i = task * together; i < std::min(rows * parts, (task + 1) * together); ++i) {
        const auto begin = i % parts * kChunk;
        partial[i] = kernel.line(work, order, i / parts, begin, std::min(length, begin + kChunk));
      }
    };
  });
  for (std::int64_t i = 0; i < rows * parts; ++i) results[i / parts] = merge(results[i / parts], partial[i], order);
}

// Results whose elements lie beside one another are lanes.
template <class T>
void reduce_lanes(const MomentsWork<T>& work, int order, Results& results) {
  const auto& kernel = kernels().of<T>();
  const auto inner = work.kept.sizes[work.kept.dims - 1], runs = work.kept.count / inner;
  const auto blocks = divide_up(inner, kMomentLanes), length = work.reduced.count;
  const auto rows_together = std::max<std::int64_t>(1, 4 * kChunk / std::min(inner, kMomentLanes));
  const auto parts = runs * blocks >= kEnoughTasks ? 1 : std::max<std::int64_t>(1, divide_up(length, rows_together));
  const auto per_part = divide_up(length, parts);
  Results partial(parts * work.kept.count);
  run_tasks(runs * blocks * parts, [&] {
    return [&](std::int64_t task) {
      const auto part = task % parts, block = task / parts % blocks, run = task / parts / blocks;
      const auto lane = block * kMomentLanes, row = run * inner + lane;
      kernel.lanes(work, order, row, std::min(kMomentLanes, inner - lane), part * per_part,
                   std::min(length, (part + 1) * per_part), partial.data() + part * work.kept.count + row);
    };
  });
  for (std::int64_t part = 0; part < parts; ++part) {
    for (std::int64_t row = 0; row < work.kept.count; ++row) {
      results[row] = merge(results[row], partial[part * work.kept.count + row], order);
    }
  }
}

template <class T>
bool by_lanes(const MomentsWork<T>& work) {
  constexpr std::int64_t few = 8;
  const auto last = work.kept.dims - 1, reduced = work.reduced.dims - 1;
  if (last < 0 || reduced < 0 || work.reduced.strides[0][reduced] == 1) return false;
  return work.kept.strides[0][last] == 1 && work.kept.sizes[last] >= few;
}

std::tuple<Tensor, Tensor, Tensor> masked_moments(const Tensor& given, const OptionalTensor& given_mask,
                                                  std::int64_t order, at::IntArrayRef dim) {
  const auto dims = check_moments(given, given_mask, order, dim);
  const auto options = given.options().dtype(accumulation_type(given.scalar_type()));
  const auto sizes = reduced_sizes(at::DimVector(given.sizes()), dims);
  const auto first = at::empty(sizes, options),
             second = order == 1 ? at::empty({0}, options) : at::empty(sizes, options);
  const auto count = at::empty(sizes, options.dtype(at::kLong));
  const auto input = given.dim() == 0 ? given.unsqueeze(0) : given;
  const auto mask = given_mask ? byte_mask(*given_mask).expand(input.sizes()) : Tensor();
  Results results(count.numel());
  dispatch(input.scalar_type(), [&](auto t) {
    using T = decltype(t);
    using A = Accumulation<T>;
    const auto work = make_moments_work<T>(input, mask, dims);
    if (input.numel() > 0) (by_lanes(work) ? reduce_lanes<T> : reduce_lines<T>)(work, order, results);
    auto* firsts = first.template mutable_data_ptr<A>();
    auto* seconds = order == 1 ? nullptr : second.template mutable_data_ptr<A>();
    auto* counts = count.template mutable_data_ptr<std::int64_t>();
    for (std::size_t i = 0; i < results.size(); ++i) {
      counts[i] = results[i].count;
      firsts[i] = static_cast<A>(results[i].first);
      if (seconds != nullptr) seconds[i] = static_cast<A>(results[i].second);
    }
  });
  return {first, second, count};
}

Tensor masked_spread(const Tensor& scale, const OptionalTensor& input, const OptionalTensor& mean,
                     const OptionalTensor& offset, const OptionalTensor& mask, c10::SymIntArrayRef symbolic_sizes,
                     at::ScalarType type) {
  check_spread(scale, input, mean, offset, mask, symbolic_sizes, type);
  const auto sizes = C10_AS_INTARRAYREF_SLOW(symbolic_sizes);
  auto result = empty_output(sizes, type);
  const auto accumulation = accumulation_type(type);
  at::TensorIteratorConfig config;
  config.set_check_mem_overlap(false).check_all_same_dtype(false).resize_outputs(false).add_output(result);
  int operands = 0;
  const auto add = [&](const OptionalTensor& tensor, at::ScalarType to) {
    if (!tensor) return 0;  // where the result is
    config.add_owned_const_input(to == at::kBool ? byte_mask(*tensor) : tensor->to(to));
    return ++operands;
  };
  const int of_scale = add(scale, accumulation), of_input = add(input, type), of_mean = add(mean, accumulation),
            of_offset = add(offset, accumulation), of_mask = add(mask, at::kBool);
  auto iterator = config.build();
  const bool past_cache = static_cast<std::int64_t>(result.nbytes()) >= kPastCache;
  dispatch(type, [&](auto t) {
    const auto& kernel = kernels().template of<decltype(t)>();
    iterator.for_each([&](char** data, const std::int64_t* strides, std::int64_t n, std::int64_t lines) {
      for (std::int64_t i = 0; i < lines; ++i) {
        const auto line = [&](int k) { return data[k] + i * strides[operands + 1 + k]; };
        const auto given = [&](int k) -> const char* { return k == 0 ? nullptr : line(k); };
        kernel.spread({line(0), line(of_scale), given(of_input), given(of_mean), given(of_offset), given(of_mask),
                       strides[0], strides[of_scale], strides[of_input], strides[of_mean], strides[of_offset],
                       strides[of_mask], n, past_cache});
      }
    });
  });
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(masked_loss, CPU, m) {
  m.impl("_masked_moments", masked_moments);
  m.impl("_masked_spread", masked_spread);
}

}  // namespace masked_loss::cpu
