// The vocabulary of the kernels. Besides it they use CUDA's own names: with nvcc those of the GPU, without it those of
// an emulation that runs the same sources on the CPU.
#pragma once

#ifdef __CUDACC__
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#include "cuda_emulation.h"
#endif

#include <atomic>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "common/host_device.h"
#include "common/softmax.h"

namespace masked_loss::cuda {

// The variable of a block that goes by this type and name.
template <class T, class Name>
__device__ __forceinline__ T& shared() {
#ifdef __CUDACC__
  __shared__ T variable;
  return variable;
#else
  return emulation::shared_variable<T, Name>();
#endif
}

// The shared memory that a launch asks for.
__device__ __forceinline__ void* dynamic_shared() {
#ifdef __CUDACC__
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
#else
  return emulation::dynamic_shared();
#endif
}

// Of the host: an error is thrown, and does not stay behind for the next one who asks.
inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(std::string("masked_loss: ") + what + ": " + cudaGetErrorString(error));
}

struct Launch {
  dim3 blocks;
  dim3 threads;
  std::size_t shared_bytes = 0;  // dynamic
  unsigned cluster_blocks = 1;
};

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Launch& shape, cudaStream_t stream, Arguments&&... arguments) {
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {shape.cluster_blocks, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = shape.blocks;
  config.blockDim = shape.threads;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = shape.cluster_blocks > 1 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, Parameters(std::forward<Arguments>(arguments))...),
        "a CUDA kernel was not launched");
}

// Of the host: how many clusters of this shape the current device holds at once.
template <class... Parameters>
int resident_clusters(void (*kernel)(Parameters...), const Launch& shape) {
  const auto* function = reinterpret_cast<const void*>(kernel);
  check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shape.shared_bytes)),
        "a CUDA kernel gets no shared memory");
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {shape.cluster_blocks, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = shape.blocks;
  config.blockDim = shape.threads;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.attrs = &cluster;
  config.numAttrs = 1;
  int clusters = 0;
  check(cudaOccupancyMaxActiveClusters(&clusters, function, &config), "a CUDA kernel does not fit");
  return clusters > 0 ? clusters : 1;
}

// Of the host: what the kernel is compiled for, as 90 for compute_90. The current device may be newer, where it
// compiled the kernel itself from the PTX of an older one: code that `#if __CUDA_ARCH__` leaves out is not there then.
template <auto kernel>
int ptx_version() {
  static std::atomic<int> known[128];  // of each device; 0 where it has not been asked for
  int device = 0;
  check(cudaGetDevice(&device), "the CUDA device is not known");
  const auto ask = [] {
    cudaFuncAttributes attributes{};
    check(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)), "a CUDA kernel was not found");
    return attributes.ptxVersion;
  };
  if (device >= static_cast<int>(std::size(known))) return ask();
  int version = known[device].load(std::memory_order_relaxed);
  if (version == 0) known[device].store(version = ask(), std::memory_order_relaxed);
  return version;
}

// Of the host.
inline std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

constexpr unsigned kWholeWarp = 0xffffffff;

// Calls f(T, A) for each dtype T of the kernels and the one that it is computed in.
#define MASKED_LOSS_EACH_DTYPE(f) f(float, float) f(double, double) f(__nv_bfloat16, float) f(__half, float)

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T narrow(Accumulation<T> x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16(x);
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half(x);
  } else {
    return x;
  }
}

// Of numbers that are not above 0: float by the special-function unit, to 2 units in the last place near 0.
__device__ __forceinline__ float fast_exp(float x) { return __expf(x); }
__device__ __forceinline__ double fast_exp(double x) { return exp(x); }

// 2^x, in the same way.
__device__ __forceinline__ float fast_exp2(float x) {
#ifdef __CUDACC__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

// Drops NaN, which the sum of the exponentials keeps.
__device__ __forceinline__ float greater(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double greater(double a, double b) { return fmax(a, b); }

// 16 bytes that move at once.
template <class T>
struct alignas(16) Pack {
  static constexpr int size = 16 / sizeof(T);
  T values[size];
};

// As many accumulated values as a pack has, rounded; of half types two by one instruction.
template <class T>
__device__ __forceinline__ Pack<T> narrow_pack(const Accumulation<T>* values) {
  Pack<T> pack;
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int j = 0; j < Pack<T>::size; j += 2) {
      if constexpr (std::is_same_v<T, __half>) {
        const __half2 pair = __floats2half2_rn(values[j], values[j + 1]);
        memcpy(pack.values + j, &pair, sizeof(pair));
      } else {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(values[j], values[j + 1]);
        memcpy(pack.values + j, &pair, sizeof(pair));
      }
    }
  } else {
#pragma unroll
    for (int j = 0; j < Pack<T>::size; ++j) pack.values[j] = values[j];
  }
  return pack;
}

// The greatest of a pack's values and `max`, of half types two at a time.
template <class T>
__device__ __forceinline__ Accumulation<T> greatest(const Pack<T>& pack, Accumulation<T> max) {
  if constexpr (sizeof(T) == 2) {
    using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
    Pair pairs[4];
    memcpy(pairs, &pack, sizeof(pack));
    const Pair pair = __hmax2(__hmax2(pairs[0], pairs[1]), __hmax2(pairs[2], pairs[3]));
    return greater(greater(widen(pair.x), widen(pair.y)), max);
  } else {
#pragma unroll
    for (const T value : pack.values) max = greater(max, value);
    return max;
  }
}

// Makes the compiler hold the pack itself from here on, and not its elements as the floats that it had made of them.
template <class T>
__device__ __forceinline__ void hold([[maybe_unused]] Pack<T>& pack) {
#ifdef __CUDACC__
  uint4 bits;
  memcpy(&bits, &pack, sizeof(bits));
  asm volatile("" : "+r"(bits.x), "+r"(bits.y), "+r"(bits.z), "+r"(bits.w));
  memcpy(&pack, &bits, sizeof(bits));
#endif
}

template <class T>
__device__ __forceinline__ bool is_aligned(const T* address) {
  return reinterpret_cast<std::uintptr_t>(address) % 16 == 0;
}

// Elements up to the next address that is a multiple of 16.
template <class T>
__device__ __forceinline__ int elements_to_alignment(const T* address) {
  return static_cast<int>((16 - reinterpret_cast<std::uintptr_t>(address) % 16) % 16 / sizeof(T));
}

// Streamed: it is not needed in a cache again.
template <class T>
__device__ __forceinline__ Pack<T> load_streaming(const T* address) {
  const uint4 bits = __ldcs(reinterpret_cast<const uint4*>(address));
  Pack<T> pack;
  memcpy(&pack, &bits, sizeof(pack));
  return pack;
}

template <class T>
__device__ __forceinline__ void store_streaming(T* address, const Pack<T>& pack) {
  uint4 bits;
  memcpy(&bits, &pack, sizeof(bits));
  __stcs(reinterpret_cast<uint4*>(address), bits);
}

// The same where it is needed again.
template <class T>
__device__ __forceinline__ Pack<T> load_cached(const T* address) {
  const uint4 bits = *reinterpret_cast<const uint4*>(address);
  Pack<T> pack;
  memcpy(&pack, &bits, sizeof(pack));
  return pack;
}

// The same from any address.
template <class T>
__device__ __forceinline__ Pack<T> load_pack(const T* address, bool aligned) {
  if (aligned) return load_streaming(address);
  Pack<T> pack;
#pragma unroll
  for (int j = 0; j < Pack<T>::size; ++j) pack.values[j] = address[j];
  return pack;
}

// A bit an element: the mask of a pack.
template <int n>
__device__ __forceinline__ unsigned mask_bits(const unsigned char* mask) {
  unsigned bits = 0;
#pragma unroll
  for (int j = 0; j < n; ++j) bits |= unsigned(mask[j] != 0) << j;
  return bits;
}

// The same of one word.
template <int n>
using MaskWord = std::conditional_t<n == 16, uint4, std::conditional_t<n == 8, uint2, unsigned>>;

// The highest bit of each byte that is not 0.
__device__ __forceinline__ unsigned nonzero_bytes(unsigned bytes) {
  return (((bytes & 0x7f7f7f7f) + 0x7f7f7f7f) | bytes) & 0x80808080;
}

__device__ __forceinline__ unsigned mask_bits(unsigned bytes) { return (nonzero_bytes(bytes) >> 7) * 0x01020408 >> 24; }
__device__ __forceinline__ unsigned mask_bits(uint2 bytes) { return mask_bits(bytes.x) | mask_bits(bytes.y) << 4; }
__device__ __forceinline__ unsigned mask_bits(uint4 bytes) {
  return mask_bits(uint2{bytes.x, bytes.y}) | mask_bits(uint2{bytes.z, bytes.w}) << 8;
}

// By one load, where the address allows.
template <int n>
__device__ __forceinline__ unsigned load_mask_bits(const unsigned char* mask) {
  if constexpr (n >= 4) {
    if (reinterpret_cast<std::uintptr_t>(mask) % n == 0) {
      return mask_bits(__ldcs(reinterpret_cast<const MaskWord<n>*>(mask)));
    }
  }
  return mask_bits<n>(mask);
}

// The value of the thread whose number differs in the bit `step`.
template <class T>
__device__ __forceinline__ T exchange(const T& value, int step) {
  static_assert(sizeof(T) % 4 == 0);
  unsigned words[sizeof(T) / 4];
  memcpy(words, &value, sizeof(T));
#pragma unroll
  for (unsigned& word : words) word = __shfl_xor_sync(kWholeWarp, word, step);
  T other;
  memcpy(&other, words, sizeof(T));
  return other;
}

// Of the `lanes` threads (a power of two up to 32) that stand together in a warp. All of them get the result, and to
// the bit the same one: both sides of an exchange merge in the same order.
template <class T, class Merge>
__device__ __forceinline__ T reduce_lanes(T value, int lanes, const Merge& merge) {
  for (int step = lanes / 2; step > 0; step /= 2) {
    const T other = exchange(value, step);
    value = (threadIdx.x & step) == 0 ? merge(value, other) : merge(other, value);
  }
  return value;
}

// Of a block's threads, which all come here and all get the result; warp(value) reduces those of a warp.
template <class T, class Warp>
__device__ __forceinline__ T reduce_block(T value, const Warp& warp, const T& empty = {}) {
  auto& partials = shared<T[32], Warp>();
  const unsigned lane = threadIdx.x % 32;
  value = warp(value);
  if (lane == 0) partials[threadIdx.x / 32] = value;
  __syncthreads();
  value = warp(lane < blockDim.x / 32 ? partials[lane] : empty);
  __syncthreads();  // before the next reduction writes
  return value;
}

// The greatest of a warp's numbers; drops NaN. Their order is that of integers, but for the negative ones among
// themselves.
__device__ __forceinline__ float greatest_of_warp(float x) {
  const auto turned = [](int bits) { return bits ^ (bits >> 31 & 0x7fffffff); };
  const float number = x == x ? x : -std::numeric_limits<float>::infinity();
  return __int_as_float(turned(__reduce_max_sync(kWholeWarp, turned(__float_as_int(number)))));
}

struct WarpSum {
  template <class T>
  __device__ __forceinline__ T operator()(T value) const {
    return reduce_lanes(value, 32, [](T a, T b) { return a + b; });
  }
};

// As common's merge over all lanes, with one exponential a thread.
template <class A>
__device__ __forceinline__ Softmax<A> reduce_softmax(Softmax<A> value, int lanes) {
  const A max = reduce_lanes(value.max, lanes, [](A a, A b) { return greater(a, b); });
  const A sum = value.sum * fast_exp(value.max - max);
  return {max, reduce_lanes(sum, lanes, [](A a, A b) { return a + b; })};
}

struct WarpSoftmax {
  template <class A>
  __device__ __forceinline__ Softmax<A> operator()(Softmax<A> value) const {
    return reduce_softmax(value, 32);
  }
};

}  // namespace masked_loss::cuda
