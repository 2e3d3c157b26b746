// Copies between global and shared memory that run beside the threads, and the barriers that tell of them: the bulk
// copy engine of compute capability 9.0 and newer. A kernel for older devices must not come here.
#pragma once

#include "cuda/device.cuh"

namespace masked_loss::cuda {

#ifdef __CUDACC__
__device__ __forceinline__ unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define MASKED_LOSS_PTX(...) asm volatile(__VA_ARGS__)
#else
#define MASKED_LOSS_PTX(...) __trap()
#endif
#else
#define MASKED_LOSS_SITE(name) \
  emulation::Site { name, 0, __builtin_FILE(), __builtin_LINE() }
#endif

// In shared memory. A phase completes when all arrivals and all bytes that they announced have come; then the next one
// begins. Phases are told apart by one bit: who waits may be one phase behind, not more.
class Barrier {
 public:
  // By one thread; then fence_barriers(), and a barrier of the block or cluster before anybody comes here.
  __device__ __forceinline__ void init(unsigned arrivals) {
#ifdef __CUDACC__
    MASKED_LOSS_PTX("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(this)), "r"(arrivals) : "memory");
#else
    emulation::make_mbarrier(this, arrivals, MASKED_LOSS_SITE("Barrier::init"));
#endif
  }

  __device__ __forceinline__ void arrive() {
#ifdef __CUDACC__
    MASKED_LOSS_PTX("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(this)) : "memory");
#else
    emulation::arrive_at_mbarrier(this, 0, MASKED_LOSS_SITE("Barrier::arrive"));
#endif
  }

  // Arrives, and announces bytes that are copied into this block's memory.
  __device__ __forceinline__ void arrive_and_expect(unsigned bytes) {
#ifdef __CUDACC__
    MASKED_LOSS_PTX("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(this)),
                    "r"(bytes) : "memory");
#else
    emulation::arrive_at_mbarrier(this, bytes, MASKED_LOSS_SITE("Barrier::arrive_and_expect"));
#endif
  }

  // For the phase of this parity, the first one having 0, to complete.
  __device__ __forceinline__ void wait(unsigned parity) {
#ifdef __CUDACC__
    MASKED_LOSS_PTX(
        "{\n"
        ".reg .pred done;\n"
        "WAIT:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra DONE;\n"
        "bra WAIT;\n"
        "DONE:\n"
        "}" ::"r"(shared_address(this)),
        "r"(parity) : "memory");
#else
    emulation::wait_for_mbarrier(this, parity, MASKED_LOSS_SITE("Barrier::wait"));
#endif
  }

 private:
  std::uint64_t state_;
};

// After init, so that the copy engine and other blocks see it.
__device__ __forceinline__ void fence_barriers() {
#ifdef __CUDACC__
  MASKED_LOSS_PTX("fence.mbarrier_init.release.cluster;" :: : "memory");
#endif
}

// Into shared memory; both addresses and the number of bytes are multiples of 16, the latter not 0.
__device__ __forceinline__ void bulk_load(void* to, const void* from, unsigned bytes, Barrier& barrier) {
#ifdef __CUDACC__
  MASKED_LOSS_PTX("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                      shared_address(to)),
                  "l"(from), "r"(bytes), "r"(shared_address(&barrier)) : "memory");
#else
  emulation::bulk_load(to, from, bytes, &barrier, MASKED_LOSS_SITE("bulk_load"));
#endif
}

// Into the second-level cache, in the same way.
__device__ __forceinline__ void bulk_prefetch(const void* from, unsigned bytes) {
#ifdef __CUDACC__
  MASKED_LOSS_PTX("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
#else
  emulation::bulk_prefetch(from, bytes, MASKED_LOSS_SITE("bulk_prefetch"));
#endif
}

// Out of shared memory, in the same way. It is read some time before wait_for_bulk_stores() returns.
__device__ __forceinline__ void bulk_store(void* to, const void* from, unsigned bytes) {
#ifdef __CUDACC__
  MASKED_LOSS_PTX("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(shared_address(from)),
                  "r"(bytes) : "memory");
#else
  emulation::bulk_store(to, from, bytes, MASKED_LOSS_SITE("bulk_store"));
#endif
}

// The stores of this thread since the last call become a group.
__device__ __forceinline__ void commit_bulk_stores() {
#ifdef __CUDACC__
  MASKED_LOSS_PTX("cp.async.bulk.commit_group;" :: : "memory");
#else
  emulation::commit_bulk_stores();
#endif
}

// Until the memory of all but the latest `groups` groups of this thread has been read.
template <int groups>
__device__ __forceinline__ void wait_for_bulk_stores() {
#ifdef __CUDACC__
  MASKED_LOSS_PTX("cp.async.bulk.wait_group.read %0;" ::"n"(groups) : "memory");
#else
  emulation::wait_for_bulk_stores(groups);
#endif
}

// A pack in shared memory that a bulk store will read, after a fence of the thread that has written it.
template <class T>
__device__ __forceinline__ void write_for_bulk_store(Pack<T>* to, const Pack<T>& pack) {
  *to = pack;
#ifndef __CUDACC__
  emulation::note_write(to, sizeof(pack));
#endif
}
__device__ __forceinline__ void fence_for_bulk_stores() {
#ifdef __CUDACC__
  MASKED_LOSS_PTX("fence.proxy.async.shared::cta;" :: : "memory");
#else
  emulation::fence_for_bulk_stores();
#endif
}

// The block's number in its cluster, and how many there are.
__device__ __forceinline__ unsigned cluster_rank() {
#ifdef __CUDACC__
  unsigned rank = 0;
  MASKED_LOSS_PTX("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return cooperative_groups::this_cluster().block_rank();
#endif
}
__device__ __forceinline__ unsigned cluster_blocks() {
#ifdef __CUDACC__
  unsigned blocks = 1;
  MASKED_LOSS_PTX("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
  return blocks;
#else
  return cooperative_groups::this_cluster().num_blocks();
#endif
}
__device__ __forceinline__ void sync_cluster() {
#ifdef __CUDACC__
  MASKED_LOSS_PTX("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" :: : "memory");
#else
  cooperative_groups::this_cluster().sync();
#endif
}

// Eight bytes into the same variable of another block of the cluster, whose barrier, likewise, has announced them.
__device__ __forceinline__ void store_async(std::uint64_t* variable, std::uint64_t bits, Barrier& barrier,
                                            unsigned rank) {
#ifdef __CUDACC__
  MASKED_LOSS_PTX(
      "{\n"
      ".reg .b32 to, barrier;\n"
      "mapa.shared::cluster.u32 to, %0, %3;\n"
      "mapa.shared::cluster.u32 barrier, %2, %3;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.b64 [to], %1, [barrier];\n"
      "}" ::"r"(shared_address(variable)),
      "l"(bits), "r"(shared_address(&barrier)), "r"(rank) : "memory");
#else
  const auto cluster = cooperative_groups::this_cluster();
  emulation::store_async(cluster.map_shared_rank(variable, rank), bits, cluster.map_shared_rank(&barrier, rank),
                         emulation::self().block->cluster->blocks[rank], MASKED_LOSS_SITE("store_async"));
#endif
}

// The same of a variable of more words.
template <class T>
__device__ __forceinline__ void store_words_async(T* variable, const T& value, Barrier& barrier, unsigned rank) {
  static_assert(sizeof(T) % 8 == 0);
  std::uint64_t words[sizeof(T) / 8];
  memcpy(words, &value, sizeof(T));
#pragma unroll
  for (unsigned i = 0; i < sizeof(T) / 8; ++i) {
    store_async(reinterpret_cast<std::uint64_t*>(variable) + i, words[i], barrier, rank);
  }
}

// Of so many threads of the block, whole warps; numbers from 1 to 15 tell barriers apart.
__device__ __forceinline__ void sync_threads(int number, int threads) {
#ifdef __CUDACC__
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
#else
  emulation::named_barrier(unsigned(number), unsigned(threads), MASKED_LOSS_SITE("sync_threads"));
#endif
}

}  // namespace masked_loss::cuda
