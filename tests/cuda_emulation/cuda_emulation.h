// CUDA's names for kernels that emulation.h executes on the CPU. csrc/cuda/device.cuh includes it where nvcc would have
// brought them itself.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_functions.h>

#include <cmath>

#include "emulation.h"

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __shared__ static_assert(false, "use shared<T, Name>() or dynamic_shared<T>()");
#define __launch_bounds__(...)
#define __grid_constant__

using std::max;
using std::min;
constexpr int warpSize = 32;

// Macros, as CUDA's library, which may be there too, has functions of these names.
#define cudaGetLastError emulation::get_last_error
#define cudaGetErrorString emulation::get_error_string
#define cudaGetDevice emulation::get_device
#define cudaFuncGetAttributes emulation::get_attributes
#define cudaFuncSetAttribute emulation::set_attribute
#define cudaOccupancyMaxActiveClusters emulation::max_active_clusters
#define cudaLaunchKernelEx emulation::launch

// Where a function is called from, for messages.
#define EMULATION_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(EMULATION_SITE) { emulation::block_barrier(false, {"__syncthreads", 0, file, line}); }
inline int __syncthreads_count(int predicate, EMULATION_SITE) {
  return int(emulation::block_barrier(predicate != 0, {"__syncthreads_count", 0, file, line}));
}
inline int __syncthreads_or(int predicate, EMULATION_SITE) {
  return emulation::block_barrier(predicate != 0, {"__syncthreads_or", 0, file, line}) != 0;
}
inline int __syncthreads_and(int predicate, EMULATION_SITE) {
  return emulation::block_barrier(predicate == 0, {"__syncthreads_and", 0, file, line}) == 0;
}

inline void __syncwarp(unsigned mask = 0xffffffff, EMULATION_SITE) {
  emulation::exchange<emulation::Ordered>(0, emulation::self().lane, {"__syncwarp", mask, file, line});
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, EMULATION_SITE) {
  const unsigned lane = emulation::self().lane;
  return emulation::exchange(value, lane / width * width + unsigned(source) % width, {"__shfl_sync", mask, file, line});
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, EMULATION_SITE) {
  const unsigned lane = emulation::self().lane, source = lane ^ unsigned(lanes);
  return emulation::exchange(value, source < lane / width * width + width ? source : lane,
                             {"__shfl_xor_sync", mask, file, line});
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes, int width = 32, EMULATION_SITE) {
  const unsigned lane = emulation::self().lane;
  return emulation::exchange(value, lane % width + lanes < unsigned(width) ? lane + lanes : lane,
                             {"__shfl_down_sync", mask, file, line});
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned lanes, int width = 32, EMULATION_SITE) {
  const unsigned lane = emulation::self().lane;
  return emulation::exchange(value, lane % width >= lanes ? lane - lanes : lane, {"__shfl_up_sync", mask, file, line});
}

inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATION_SITE) {
  unsigned votes;
  emulation::exchange(predicate, emulation::self().lane, {"__ballot_sync", mask, file, line}, &votes);
  return votes;
}
inline int __any_sync(unsigned mask, int predicate, EMULATION_SITE) {
  unsigned votes;
  emulation::exchange(predicate, emulation::self().lane, {"__any_sync", mask, file, line}, &votes);
  return votes != 0;
}
inline int __all_sync(unsigned mask, int predicate, EMULATION_SITE) {
  unsigned votes;
  emulation::exchange(predicate, emulation::self().lane, {"__all_sync", mask, file, line}, &votes);
  return votes == mask;
}

inline int __reduce_max_sync(unsigned mask, int value, EMULATION_SITE) {
  return emulation::reduce(value, {"__reduce_max_sync", mask, file, line}, [](int a, int b) { return std::max(a, b); });
}

#define EMULATION_LOAD(name)                                                    \
  template <class T>                                                            \
  T name(const T* address, EMULATION_SITE) {                                    \
    emulation::check_alignment(address, emulation::Site{#name, 0, file, line}); \
    T value;                                                                    \
    std::memcpy(&value, address, sizeof value);                                 \
    return value;                                                               \
  }
#define EMULATION_STORE(name)                                                   \
  template <class T>                                                            \
  void name(T* address, std::common_type_t<T> value, EMULATION_SITE) {          \
    emulation::check_alignment(address, emulation::Site{#name, 0, file, line}); \
    std::memcpy(address, &value, sizeof value);                                 \
  }
EMULATION_LOAD(__ldg)
EMULATION_LOAD(__ldca)
EMULATION_LOAD(__ldcg)
EMULATION_LOAD(__ldcs)
EMULATION_LOAD(__ldcv)
EMULATION_LOAD(__ldlu)
EMULATION_STORE(__stcg)
EMULATION_STORE(__stcs)
EMULATION_STORE(__stwb)
EMULATION_STORE(__stwt)

// Of integers alone: what floating-point atomics add up to depends on the order of the threads.
#define EMULATION_ATOMIC(name, builtin)                                       \
  template <class T>                                                          \
  T name(T* address, std::common_type_t<T> value) {                           \
    static_assert(std::is_integral_v<T>, #name " of floating-point numbers"); \
    return builtin(address, value, __ATOMIC_ACQ_REL);                         \
  }
EMULATION_ATOMIC(atomicAdd, __atomic_fetch_add)
EMULATION_ATOMIC(atomicSub, __atomic_fetch_sub)
EMULATION_ATOMIC(atomicAnd, __atomic_fetch_and)
EMULATION_ATOMIC(atomicOr, __atomic_fetch_or)
EMULATION_ATOMIC(atomicXor, __atomic_fetch_xor)
EMULATION_ATOMIC(atomicExch, __atomic_exchange_n)

template <class T>
T atomicCAS(T* address, std::common_type_t<T> expected, std::common_type_t<T> value) {
  __atomic_compare_exchange_n(address, &expected, value, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
  return expected;
}
template <class T>
T atomicMax(T* address, std::common_type_t<T> value) {
  T old = __atomic_load_n(address, __ATOMIC_ACQUIRE);
  while (old < value && atomicCAS(address, old, value) != old) old = __atomic_load_n(address, __ATOMIC_ACQUIRE);
  return old;
}
template <class T>
T atomicMin(T* address, std::common_type_t<T> value) {
  T old = __atomic_load_n(address, __ATOMIC_ACQUIRE);
  while (old > value && atomicCAS(address, old, value) != old) old = __atomic_load_n(address, __ATOMIC_ACQUIRE);
  return old;
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) {}

// Macros, as the C library has functions of these names that it does not export.
#define __expf(x) expf(x)
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __powf(x, y) powf(x, y)
#define __fdividef(x, y) ((x) / (y))
inline float __frcp_rn(float x) { return 1 / x; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }

template <class To, class From>
To emulation_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline unsigned __float_as_uint(float x) { return emulation_bits<unsigned>(x); }
inline int __float_as_int(float x) { return emulation_bits<int>(x); }
inline float __uint_as_float(unsigned x) { return emulation_bits<float>(x); }
inline float __int_as_float(int x) { return emulation_bits<float>(x); }
inline long long __double_as_longlong(double x) { return emulation_bits<long long>(x); }
inline double __longlong_as_double(long long x) { return emulation_bits<double>(x); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (x >> i & 1) << (31 - i);
  return reversed;
}

namespace cooperative_groups {

struct cluster_group {
  static unsigned num_blocks() { return emulation::machine.shape.cluster_blocks; }
  static unsigned block_rank() { return blockIdx.x % num_blocks(); }

  static void sync(EMULATION_SITE) {
    using namespace emulation;
    Cluster& cluster = *self().block->cluster;
    gather<Ordered>(cluster.barrier, cluster.blocks.size() * self().block->threads.size(),
                    {"cluster.sync", 0, file, line}, [](auto&) { machine.reshuffle(); });
  }

  // The same variable of another block.
  template <class T>
  static T* map_shared_rank(T* address, unsigned rank, EMULATION_SITE) {
    using namespace emulation;
    const Site site{"map_shared_rank", 0, file, line};
    const Block& block = *self().block;
    if (rank >= num_blocks()) machine.fail(site, "asks for a block beyond the cluster");
    const Block& other = *block.cluster->blocks[rank];
    if (other.running == 0) machine.fail(site, "asks for a block that has returned");
    const auto* there = reinterpret_cast<const char*>(address);
    const auto in = [&](const char* memory, std::size_t bytes) { return there >= memory && there < memory + bytes; };
    if (in(block.statics.get(), Machine::static_capacity)) {
      return reinterpret_cast<T*>(other.statics.get() + (there - block.statics.get()));
    }
    if (in(block.dynamic.get(), machine.shape.shared_bytes)) {
      return reinterpret_cast<T*>(other.dynamic.get() + (there - block.dynamic.get()));
    }
    machine.fail(site, "has an address outside of shared memory");
  }
};

inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
