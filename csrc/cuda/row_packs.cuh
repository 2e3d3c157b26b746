// What kernels over rows of classes share: rows as packs, what groups of threads reduce, and the size of a grid.
#pragma once

#include <algorithm>

#include "cuda/device.cuh"

namespace masked_loss::cuda {

// Elements side by side that a group of threads takes: 16-byte packs from where `aligned` is, and up to two times 7
// single elements before and after them.
template <class T>
struct RowPacks {
  int size, head, packs;

  RowPacks() = default;
  __device__ __forceinline__ RowPacks(const T* aligned, int of)
      : size(of), head(min(of, elements_to_alignment(aligned))), packs((of - head) / Pack<T>::size) {}

  // The single element that a thread takes, or -1.
  __device__ __forceinline__ int single(int lane) const {
    const int tail = head + packs * Pack<T>::size;
    if (lane < head) return lane;
    return lane >= 16 && lane - 16 < size - tail ? tail + lane - 16 : -1;
  }
  __device__ __forceinline__ int element(int pack) const { return head + pack * Pack<T>::size; }
};

// Of a group of kLanes threads: a warp, or a whole block.
template <int kLanes, class Warp, class V>
__device__ __forceinline__ V reduce_group(const V& value) {
  if constexpr (kLanes == 32) {
    return Warp{}(value);
  } else {
    return reduce_block(value, Warp{});
  }
}

// Of the `lanes` threads of a row, which stand `rows` threads apart in a block of up to 512. All come here.
template <class V, class Merge>
__device__ __forceinline__ V reduce_apart(V value, int lanes, int rows, const Merge& merge) {
  auto& values = shared<V[512], struct LaneParts>();
  values[threadIdx.x] = value;
  __syncthreads();
  const int row = threadIdx.x % rows;
  value = values[row];
  for (int l = 1; l < lanes; ++l) value = merge(value, values[l * rows + row]);
  __syncthreads();  // before the next rows write
  return value;
}

// Blocks that take one row after the other, each by so many `slices`.
inline unsigned grid(std::int64_t blocks_needed, int multiprocessors, int threads, int slices = 1) {
  // Some waves of blocks: rows cost alike, but blocks of other work may be in the way of some.
  const std::int64_t most = std::max<std::int64_t>(slices, std::int64_t(multiprocessors) * 8 * 1024 / threads);
  return static_cast<unsigned>(std::max<std::int64_t>(1, std::min(blocks_needed, most / slices * slices)));
}

}  // namespace masked_loss::cuda
