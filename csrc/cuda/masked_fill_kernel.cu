#include "cuda/masked_fill_kernel.h"

#include <algorithm>

#include "cuda/device.cuh"

namespace masked_loss::cuda {
namespace {

constexpr int kThreads = 256;

template <class T>
__device__ T fill_value(const MaskedFillWork& work) {
  T value;
  memcpy(&value, work.device_value == nullptr ? work.value : work.device_value, sizeof(T));
  return value;
}

// kLanes threads take as many packs of a line, each of them one: what is under way are the packs of many threads. In
// place whole packs are written too, what is kept as it was: part of a sector would be read and merged by the memory.
template <class T, bool in_place, int kLanes>
__global__ void __launch_bounds__(kThreads) fill_lines(MaskedFillWork work, std::int64_t parts, Quotient by_parts) {
  constexpr int n = Pack<T>::size;
  constexpr unsigned every = (1u << n) - 1;
  const T value = fill_value<T>(work);
  const int lane = threadIdx.x % kLanes;
  const auto item = (std::int64_t(blockIdx.x) * kThreads + threadIdx.x) / kLanes;
  if (item >= work.lines.count * parts) return;
  const auto line_index = by_parts(item), part = item - line_index * parts;
  const auto offsets = work.lines.offsets(line_index);
  T* out = static_cast<T*>(work.out) + offsets[0];
  const T* in = in_place ? out : static_cast<const T*>(work.in) + offsets[1];
  const unsigned char* mask = work.mask + offsets[2];
  const unsigned line = work.shared_mask && *mask != 0 ? every : 0;
  if (in_place && work.shared_mask && line == 0) return;
  const auto head = min(work.length, std::int64_t(elements_to_alignment(out)));
  const auto packs = (work.length - head) / n, p = part * kLanes + lane, i = head + p * n;
  if (p < packs) {
    Pack<T> pack{};
    if (line == 0) pack = load_pack(in + i, in_place || is_aligned(in + head));
    const unsigned filled = work.shared_mask ? line : load_mask_bits<n>(mask + i);
#pragma unroll
    for (int j = 0; j < n; ++j) {
      if (filled >> j & 1) pack.values[j] = value;
    }
    if (!in_place || filled != 0) store_streaming(out + i, pack);
  }
  // The elements before and after the packs, by the threads of the first part.
  const auto tail = head + packs * n;
  const auto single = lane < head ? lane : tail + lane - head;
  if (part != 0 || single >= work.length) return;
  const bool fills = mask[work.shared_mask ? 0 : single] != 0;
  if (fills) out[single] = value;
  if (!in_place && !fills) out[single] = in[single];
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
  if (work.length == 1) {
    const auto blocks = std::min(divide_up(work.lines.count, kThreads), std::int64_t(multiprocessors) * 32);
    return launch(fill_elements<T, in_place>, {unsigned(blocks), kThreads}, stream, work);
  }
  const auto lines = [&](auto lanes, auto kernel) {
    const auto parts = std::max<std::int64_t>(1, divide_up(work.length, Pack<T>::size * lanes));
    const auto blocks = divide_up(work.lines.count * parts, kThreads / lanes);
    launch(kernel, {unsigned(blocks), kThreads}, stream, work, parts, Quotient(parts));
  };
  if (work.length <= 32 * Pack<T>::size) {
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
