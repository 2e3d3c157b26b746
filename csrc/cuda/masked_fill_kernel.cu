#include "cuda/masked_fill_kernel.h"

#include <algorithm>

#include "cuda/device.cuh"

namespace masked_loss::cuda {
namespace {

constexpr int kThreads = 256;

// Packs that a thread has under way; of bytes, with 16 mask bits each, registers hold fewer.
template <class T>
constexpr int kPacks = sizeof(T) == 1 ? 2 : 4;

template <class T>
__device__ T fill_value(const MaskedFillWork& work) {
  T value;
  memcpy(&value, work.device_value == nullptr ? work.value : work.device_value, sizeof(T));
  return value;
}

// kLanes threads take kLanes * kPacks packs of a line, and then those of another.
template <class T, bool in_place, int kLanes>
__global__ void __launch_bounds__(kThreads) fill_lines(MaskedFillWork work, std::int64_t parts, Quotient by_parts) {
  constexpr int n = Pack<T>::size, packs_each = kPacks<T>;
  constexpr unsigned every = (1u << n) - 1;
  const T value = fill_value<T>(work);
  Pack<T> filled;
#pragma unroll
  for (T& element : filled.values) element = value;
  const int lane = threadIdx.x % kLanes;
  const auto group = (std::int64_t(blockIdx.x) * kThreads + threadIdx.x) / kLanes;
  const auto groups = std::int64_t(gridDim.x) * (kThreads / kLanes);
  for (auto item = group; item < work.lines.count * parts; item += groups) {
    const auto line_index = by_parts(item), part = item - line_index * parts;
    const auto offsets = work.lines.offsets(line_index);
    T* out = static_cast<T*>(work.out) + offsets[0];
    const T* in = in_place ? nullptr : static_cast<const T*>(work.in) + offsets[1];
    const unsigned char* mask = work.mask + offsets[2];
    const auto head = min(work.length, std::int64_t(elements_to_alignment(out)));
    const auto packs = (work.length - head) / n, first = part * (kLanes * packs_each) + lane;
    const bool aligned = !in_place && is_aligned(in + head);
    const unsigned line = work.shared_mask ? (*mask != 0 ? every : 0) : 0;
    if (in_place && work.shared_mask && line == 0) continue;

    unsigned masks[packs_each];
    Pack<T> tile[packs_each];
#pragma unroll
    for (int k = 0; k < packs_each; ++k) {
      const auto p = first + k * kLanes, i = head + p * n;
      masks[k] = line;
      if (p >= packs) continue;
      if (!work.shared_mask) masks[k] = load_mask_bits<n>(mask + i);
      if (!in_place && !(work.shared_mask && line != 0)) tile[k] = load_pack(in + i, aligned);
    }
#pragma unroll
    for (int k = 0; k < packs_each; ++k) {
      const auto p = first + k * kLanes;
      if (p >= packs) continue;
      T* to = out + head + p * n;
      if (masks[k] == every) {
        store_streaming(to, filled);
      } else if constexpr (in_place) {
        for (int j = 0; j < n; ++j) {
          if (masks[k] >> j & 1) to[j] = value;
        }
      } else {
#pragma unroll
        for (int j = 0; j < n; ++j) {
          if (masks[k] >> j & 1) tile[k].values[j] = value;
        }
        store_streaming(to, tile[k]);
      }
    }
    // The elements before and after the packs, by the threads of the first part.
    const auto tail = head + packs * n;
    const auto single = lane < head ? lane : tail + lane - head;
    if (part != 0 || single >= work.length) continue;
    const bool fills = mask[work.shared_mask ? 0 : single] != 0;
    if (fills) out[single] = value;
    if (!in_place && !fills) out[single] = in[single];
  }
}

template <class T, bool in_place>
__global__ void __launch_bounds__(kThreads) fill_elements(MaskedFillWork work) {
  const T value = fill_value<T>(work);
  const auto threads = std::int64_t(gridDim.x) * kThreads;
  for (auto i = std::int64_t(blockIdx.x) * kThreads + threadIdx.x; i < work.lines.count; i += threads) {
    const auto offsets = work.lines.offsets(i);
    const bool fills = work.mask[offsets[2]] != 0;
    T* out = static_cast<T*>(work.out) + offsets[0];
    if (fills) *out = value;
    if (!in_place && !fills) *out = static_cast<const T*>(work.in)[offsets[1]];
  }
}

template <class T, bool in_place>
void run(const MaskedFillWork& work, int multiprocessors, cudaStream_t stream) {
  const auto grid = [&](std::int64_t blocks) {
    return static_cast<unsigned>(std::min(blocks, std::int64_t(multiprocessors) * 32));
  };
  if (work.length == 1) {
    return launch(fill_elements<T, in_place>, {grid(divide_up(work.lines.count, kThreads)), kThreads}, stream, work);
  }
  const auto lines = [&](auto lanes, auto kernel) {
    const auto parts = std::max<std::int64_t>(1, divide_up(work.length, Pack<T>::size * lanes * kPacks<T>));
    launch(kernel, {grid(divide_up(work.lines.count * parts, kThreads / lanes)), kThreads}, stream, work, parts,
           Quotient(parts));
  };
  if (work.length * sizeof(T) <= 32 * kPacks<T> * 16) {
    lines(32, fill_lines<T, in_place, 32>);
  } else {
    lines(kThreads, fill_lines<T, in_place, kThreads>);
  }
}

template <class T>
void run(const MaskedFillWork& work, int multiprocessors, cudaStream_t stream) {
  work.in == nullptr ? run<T, true>(work, multiprocessors, stream) : run<T, false>(work, multiprocessors, stream);
}

}  // namespace

void masked_fill(const MaskedFillWork& work, int multiprocessors, cudaStream_t stream) {
  if (work.lines.count == 0) return;
  switch (work.element_bytes) {
    case 1: return run<std::uint8_t>(work, multiprocessors, stream);
    case 2: return run<std::uint16_t>(work, multiprocessors, stream);
    case 4: return run<std::uint32_t>(work, multiprocessors, stream);
    case 8: return run<std::uint64_t>(work, multiprocessors, stream);
    default: return run<uint4>(work, multiprocessors, stream);
  }
}

}  // namespace masked_loss::cuda
