#include <ATen/Dispatch.h>
#include <ATen/TensorIterator.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <vector>

#include "common/host_device.h"
#include "common/reductions_operands.h"
#include "cpu/huge_pages.h"
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

Moments merge(const Moments& a, const Moments& b, int order) {
  return order == 2 ? masked_loss::merge<2>(a, b) : masked_loss::merge<1>(a, b);
}

// Where the results of the kept rows go.
template <class A>
struct Destination {
  MomentsResult<A> result;
  int order;

  void give(std::int64_t row, const Moments& moments) const {
    const auto first = static_cast<A>(moments.first);
    result.first[row] = order == 1 && moments.count > 0 ? first / static_cast<A>(moments.count) : first;
    if (order > 0) result.count[row] = moments.count;
    if (order == 2) result.second[row] = static_cast<A>(moments.second);
  }

  // Of parts [part][row] that are merged in their order.
  void give_merged(const std::vector<Moments>& partial, std::int64_t parts, std::int64_t rows) const {
    for (std::int64_t row = 0; row < rows; ++row) {
      Moments merged;
      for (std::int64_t part = 0; part < parts; ++part) merged = merge(merged, partial[part * rows + row], order);
      give(row, merged);
    }
  }
};

// The reduced elements of a result lie in lines: short ones share a task, and long ones are split into several.
template <class T, class A>
void reduce_lines(const MomentsWork<T>& work, const Destination<A>& to) {
  const auto& kernel = kernels().of<T>();
  const auto rows = work.kept.count, length = work.reduced.count;
  const auto parts = divide_up(length, kChunk), together = std::max<std::int64_t>(1, kChunk / length);
  std::vector<Moments> partial(parts > 1 ? rows * parts : 0);
  run_tasks(divide_up(rows * parts, together), [&] {
    return [&](std::int64_t task) {
      for (auto i = task * together; i < std::min(rows * parts, (task + 1) * together); ++i) {
        const auto row = i / parts, part = i % parts, begin = part * kChunk;
        const auto moments = kernel.line(work, to.order, row, begin, std::min(length, begin + kChunk));
        if (parts > 1) {
          partial[part * rows + row] = moments;
        } else {
          to.give(row, moments);
        }
      }
    };
  });
  if (parts > 1) to.give_merged(partial, parts, rows);
}

// Results whose elements are contiguous are lanes: short runs of them share a task, and where there are few
// results, their elements are split.
template <class T, class A>
void reduce_lanes(const MomentsWork<T>& work, const Destination<A>& to) {
  const auto& kernel = kernels().of<T>();
  const auto rows = work.kept.count, inner = work.kept.sizes[work.kept.dims - 1], length = work.reduced.count;
  const auto blocks = divide_up(inner, kMomentLanes), across = std::min(inner, kMomentLanes);
  const auto runs = rows / inner * blocks;
  const auto parts = std::clamp<std::int64_t>(divide_up(length * across, 4 * kChunk), 1, divide_up(kEnoughTasks, runs));
  const auto per_part = divide_up(length, parts), together = std::max<std::int64_t>(1, kChunk / (across * per_part));
  std::vector<Moments> partial(parts > 1 ? rows * parts : 0);
  run_tasks(divide_up(runs * parts, together), [&] {
    return [&, moments = std::vector<Moments>(across)](std::int64_t task) mutable {
      for (auto i = task * together; i < std::min(runs * parts, (task + 1) * together); ++i) {
        const auto part = i % parts, block = i / parts % blocks, lane = block * kMomentLanes;
        const auto row = i / parts / blocks * inner + lane, count = std::min(kMomentLanes, inner - lane);
        kernel.lanes(work, to.order, row, count, part * per_part, std::min(length, (part + 1) * per_part),
                     moments.data());
        if (parts > 1) {
          std::copy_n(moments.begin(), count, partial.begin() + part * rows + row);
        } else {
          for (std::int64_t w = 0; w < count; ++w) to.give(row + w, moments[w]);
        }
      }
    };
  });
  if (parts > 1) to.give_merged(partial, parts, rows);
}

// Results of a few elements each, wherever they lie, are lanes of tiles.
template <class T, class A>
void reduce_tiles(const MomentsWork<T>& work, const Destination<A>& to) {
  const auto& kernel = kernels().of<T>();
  const auto rows = work.kept.count, tile = moment_tile(work.reduced.count);
  const auto together = std::max<std::int64_t>(1, kChunk / (tile * work.reduced.count));
  run_tasks(divide_up(rows, tile * together), [&] {
    return [&, moments = std::vector<Moments>(tile)](std::int64_t task) mutable {
      const auto end = std::min(rows, (task + 1) * together * tile);
      for (auto row = task * together * tile; row < end; row += tile) {
        const auto count = std::min(tile, end - row);
        kernel.tile(work, to.order, row, count, moments.data());
        for (std::int64_t w = 0; w < count; ++w) to.give(row + w, moments[w]);
      }
    };
  });
}

template <class T, class A>
void reduce(const MomentsWork<T>& work, const Destination<A>& to) {
  constexpr std::int64_t few = 8;  // lanes
  const auto last = work.kept.dims - 1, reduced = work.reduced.dims - 1;
  const bool contiguous = last >= 0 && work.kept.strides[0][last] == 1 && reduced >= 0 &&
                          work.reduced.strides[0][reduced] != 1 && work.kept.sizes[last] >= few;
  const bool fills_lanes = contiguous && work.kept.sizes[last] >= kMomentTileElements;
  // Along a line vectors take less from half of that on.
  const bool is_line = reduced >= 0 && work.reduced.strides[0][reduced] == 1;
  if (work.reduced.count <= kMomentTileElements / (is_line ? 2 : 1) && !fills_lanes) return reduce_tiles(work, to);
  contiguous ? reduce_lanes(work, to) : reduce_lines(work, to);
}

std::tuple<Tensor, Tensor, Tensor> masked_moments(const Tensor& given, const OptionalTensor& given_mask,
                                                  std::int64_t order, at::IntArrayRef dim) {
  const auto dims = check_moments(given, given_mask, order, dim);
  check_mask_values("_masked_moments", "mask", given_mask);
  const auto moments = empty_moments(given, order, dims);
  const auto input = given.dim() == 0 ? given.unsqueeze(0) : given;
  const auto mask = given_mask ? byte_mask(*given_mask).expand(input.sizes()) : Tensor();
  dispatch(input.scalar_type(), [&](auto t) {
    using T = decltype(t);
    using A = Accumulation<T>;
    const Destination<A> to{moments_result<A>(moments, order), static_cast<int>(order)};
    const auto work = make_moments_work<T>(input, mask, dims);
    if (input.numel() > 0) return reduce(work, to);
    for (std::int64_t row = 0; row < work.kept.count; ++row) to.give(row, {});
  });
  return moments;
}

Tensor masked_affine(const Tensor& scale, const OptionalTensor& input, const OptionalTensor& mean,
                     const OptionalTensor& offset, const OptionalTensor& mask, c10::SymIntArrayRef symbolic_sizes,
                     at::ScalarType type) {
  check_affine(scale, input, mean, offset, mask, symbolic_sizes, type);
  const auto sizes = C10_AS_INTARRAYREF_SLOW(symbolic_sizes);
  auto result = empty_output(sizes, type);
  const auto accumulation = accumulation_type(type);
  const auto read_as = affine_input_type(input, type);
  at::TensorIteratorConfig config;
  config.set_check_mem_overlap(false).check_all_same_dtype(false).resize_outputs(false).add_output(result);
  int operands = 0;
  const auto add = [&](const OptionalTensor& tensor, at::ScalarType to) {
    if (!tensor) return 0;  // where the result is
    config.add_owned_const_input(to == at::kBool ? byte_mask(*tensor) : tensor->to(to));
    return ++operands;
  };
  const int of_scale = add(scale, accumulation), of_input = add(input, read_as), of_mean = add(mean, accumulation),
            of_offset = add(offset, accumulation), of_mask = add(mask, at::kBool);
  auto iterator = config.build();
  const bool past_cache = static_cast<std::int64_t>(result.nbytes()) >= kPastCache;
  dispatch(read_as, [&](auto t) {
    const auto& kernels_of_type = kernels().template of<decltype(t)>();
    const auto affine = read_as == type ? kernels_of_type.affine : kernels_of_type.affine_wide;
    iterator.for_each([&](char** data, const std::int64_t* strides, std::int64_t n, std::int64_t lines) {
      for (std::int64_t i = 0; i < lines; ++i) {
        const auto line = [&](int k) { return data[k] + i * strides[operands + 1 + k]; };
        const auto given = [&](int k) -> const char* { return k == 0 ? nullptr : line(k); };
        affine({line(0), line(of_scale), given(of_input), given(of_mean), given(of_offset), given(of_mask), strides[0],
                strides[of_scale], strides[of_input], strides[of_mean], strides[of_offset], strides[of_mask], n,
                past_cache});
      }
    });
  });
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(masked_loss, CPU, m) {
  impl<MaskedMoments, masked_moments>(m);
  impl<MaskedAffine, masked_affine>(m);
}

}  // namespace masked_loss::cpu
