// Long rows of contiguous classes, in a ring of shared memory: a persistent block, or a cluster of blocks that share
// each row, takes one row after the other. One thread has chunks of the next rows copied into the ring and those that
// have been overwritten copied out; groups of warps take the rows in turn, so that one computes while another waits for
// what its row adds up to.
//
// A program has, beside its dtype T, a RingShape kShape, and kWrites, whether it overwrites rows:
//
//   State                      what a part of a row adds up to, 8 bytes; State() is that of none
//   count, classes             of the rows, at most, and of each of them
//   end()                      how many rows there are to visit, which the host need not know; row(position) names them
//   bool keeps(row)            rows that are not kept are zeros, or not touched by a program that writes nothing
//   input(row), output(row)    where the row begins, a multiple of 16 bytes
//   Row begin(row, first, n)   what a thread needs to know of a row whose classes [first, first + n) its block has
//   visit(state, packs)        adds packs, -inf where there is none
//   merge(a, b), merge_warp()  in an order that the sizes fix
//   conclude(row, state)       what write needs; the row's results are given by one thread
//   write(pack, class, terms)  what takes the place of a pack
#pragma once

#include "cuda/async.cuh"

namespace masked_loss::cuda {

// kLag stores may be under way while their stages are not yet filled again. A group's chunks have to be in the ring at
// once with those that others wait for: groups * chunks + lag <= stages.
struct RingShape {
  int warps, groups;  // of warps, and how many of them
  int chunk, stages;  // bytes, chunks
  int lag;

  constexpr int threads() const { return (warps * groups + 1) * 32; }
  constexpr int most_chunks() const { return (stages - lag) / groups; }  // of a block's part of a row
};

inline constexpr int kRingCluster = 8;  // blocks that share a row, at most

template <class Program>
struct RingMemory {
  static constexpr auto shape = Program::kShape;

  alignas(128) unsigned char stages[shape.stages][shape.chunk];
  alignas(128) unsigned char zeros[4096];
  alignas(16) typename Program::State parts[shape.groups][2][kRingCluster * shape.warps];
  Barrier full[shape.stages], done[shape.stages], exchanged[shape.groups][2];
};

template <class Program>
class Ring {
 public:
  static constexpr auto shape = Program::kShape;
  using T = typename Program::T;
  using State = typename Program::State;
  using P = Pack<T>;

  __device__ __forceinline__ Ring(const Program& of, RingMemory<Program>& in)
      : program_(of), memory_(in), rank_(cluster_rank()), blocks_(cluster_blocks()) {
    const auto packs = static_cast<int>(program_.classes / P::size), each = (packs + blocks_ - 1) / blocks_;
    first_pack_ = min(rank_ * each, packs);
    bytes_ = min(each, packs - first_pack_) * 16;
    chunks_ = (each * 16 + shape.chunk - 1) / shape.chunk;
    end_ = program_.end();
    first_ = blockIdx.x / blocks_;
    step_ = gridDim.x / blocks_;
  }

  __device__ __forceinline__ void run() {
    if (threadIdx.x == 0) {
      for (int i = 0; i < shape.stages; ++i) memory_.full[i].init(1), memory_.done[i].init(shape.warps);
      for (auto& of_group : memory_.exchanged) of_group[0].init(1), of_group[1].init(1);
      fence_barriers();
    }
    for (unsigned i = threadIdx.x; i < sizeof(memory_.zeros) / 16; i += blockDim.x) {
      write_for_bulk_store(reinterpret_cast<P*>(memory_.zeros) + i, P{});
    }
    fence_for_bulk_stores();
    __syncthreads();
    sync_cluster();
    if (threadIdx.x < shape.warps * shape.groups * 32) {
      consume();
    } else if (threadIdx.x % 32 == 0) {
      produce();
    }
    __syncthreads();
    sync_cluster();  // others may still write into this block's memory
  }

 private:
  // The rows of this cluster, one after the other; whether one is kept is read long before it is asked for.
  struct Walk {
    std::int64_t position;
    bool kept;
  };
  __device__ __forceinline__ bool keeps(std::int64_t position) const {
    return position < end_ && program_.keeps(program_.row(position));
  }
  __device__ __forceinline__ Walk walk() const { return {first_, keeps(first_)}; }
  __device__ __forceinline__ void advance(Walk& walk) const {
    walk.position += step_;
    walk.kept = keeps(walk.position);
  }

  __device__ __forceinline__ int bytes_of(int chunk) const { return min(shape.chunk, bytes_ - chunk * shape.chunk); }
  __device__ __forceinline__ unsigned char* place(T* row, int chunk) const {
    return reinterpret_cast<unsigned char*>(row) + first_pack_ * 16ll + std::int64_t(chunk) * shape.chunk;
  }

  __device__ void produce() {
    std::int64_t loaded = 0, stored = 0;  // chunks
    Walk store = walk();
    int store_chunk = 0;
    const auto store_next = [&] {
      const int stage = static_cast<int>(stored % shape.stages);
      memory_.done[stage].wait(stored / shape.stages & 1);
      ++stored;
      if constexpr (Program::kWrites) {
        while (!store.kept) advance(store);
        if (bytes_of(store_chunk) > 0) {
          bulk_store(place(program_.output(program_.row(store.position)), store_chunk), memory_.stages[stage],
                     bytes_of(store_chunk));
        }
        commit_bulk_stores();
        if (++store_chunk < chunks_) return;
        store_chunk = 0;
        advance(store);
      }
    };
    for (Walk load = walk(); load.position < end_; advance(load)) {
      const auto row = program_.row(load.position);
      if (!load.kept) {
        for (int at = 0; Program::kWrites && at < bytes_; at += sizeof(memory_.zeros)) {
          bulk_store(place(program_.output(row), 0) + at, memory_.zeros, min(int(sizeof(memory_.zeros)), bytes_ - at));
        }
        continue;
      }
      for (int chunk = 0; chunk < chunks_; ++chunk, ++loaded) {
        const int stage = static_cast<int>(loaded % shape.stages), bytes = bytes_of(chunk);
        if (loaded >= shape.stages) {
          const auto wanted = loaded - shape.stages + 1 + (Program::kWrites ? shape.lag : 0);
          while (stored < wanted) store_next();
          if constexpr (Program::kWrites) wait_for_bulk_stores<shape.lag>();
        }
        auto& full = memory_.full[stage];
        if (bytes <= 0) {
          full.arrive();
          continue;
        }
        full.arrive_and_expect(bytes);
        bulk_load(memory_.stages[stage], place(const_cast<T*>(program_.input(row)), chunk), bytes, full);
      }
    }
    while (stored < loaded) store_next();
    commit_bulk_stores();
    wait_for_bulk_stores<0>();
  }

  __device__ __forceinline__ void release(int stage) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) memory_.done[stage].arrive();
  }

  __device__ void consume() {
    constexpr int threads = shape.warps * 32, packs = shape.chunk / 16 / threads;
    const int group = threadIdx.x / threads, thread = threadIdx.x % threads, warp = thread / 32, lane = thread % 32;
    std::int64_t kept = 0, mine = 0;
    for (Walk at = walk(); at.position < end_; advance(at)) {
      if (!at.kept || kept++ % shape.groups != group) continue;
      const auto loaded = (kept - 1) * chunks_;  // before it
      const int parity = mine & 1;
      auto& exchanged = memory_.exchanged[group][parity];
      if (thread == 0) exchanged.arrive_and_expect(blocks_ * shape.warps * sizeof(State));
      const auto row = program_.begin(program_.row(at.position), first_pack_ * P::size, bytes_ / 16 * P::size, thread);
      State state;
      for (int chunk = 0; chunk < chunks_; ++chunk) {
        const int stage = static_cast<int>((loaded + chunk) % shape.stages), here = bytes_of(chunk) / 16;
        memory_.full[stage].wait((loaded + chunk) / shape.stages & 1);
        P pack[packs];
#pragma unroll
        for (int k = 0; k < packs; ++k) {
          const int i = k * threads + thread;
          pack[k] = i < here ? reinterpret_cast<const P*>(memory_.stages[stage])[i] : Program::nothing();
        }
        program_.visit(state, pack);
        if constexpr (!Program::kWrites) release(stage);
      }
      state = program_.merge_warp(state);
      auto& parts = memory_.parts[group][parity];
      if (lane < blocks_) store_async(&parts[rank_ * shape.warps + warp], state, exchanged, unsigned(lane));
      exchanged.wait(mine++ >> 1 & 1);
      state = {};
      for (int i = lane; i < blocks_ * shape.warps; i += 32) state = program_.merge(state, parts[i]);
      const auto terms = program_.conclude(row, program_.merge_warp(state));
      if constexpr (Program::kWrites) {
        for (int chunk = 0; chunk < chunks_; ++chunk) {
          const int stage = static_cast<int>((loaded + chunk) % shape.stages), here = bytes_of(chunk) / 16;
#pragma unroll
          for (int k = 0; k < packs; ++k) {
            const int i = k * threads + thread;
            if (i >= here) continue;
            auto* pack = reinterpret_cast<P*>(memory_.stages[stage]) + i;
            write_for_bulk_store(pack, program_.write(*pack, (chunk * (shape.chunk / 16) + i) * P::size, terms));
          }
          fence_for_bulk_stores();
          release(stage);
        }
      }
    }
  }

  const Program& program_;
  RingMemory<Program>& memory_;
  const int rank_, blocks_;
  int first_pack_, bytes_, chunks_;  // of a row, what this block has
  std::int64_t end_, first_, step_;  // positions
};

template <class Program>
__global__ void __launch_bounds__(Program::kShape.threads(), 1) row_ring(Program program) {
  Ring<Program>(program, *static_cast<RingMemory<Program>*>(dynamic_shared())).run();
}

// Of the host. `blocks` share a row.
template <class Program>
void launch_ring(const Program& program, int blocks, cudaStream_t stream) {
  constexpr auto bytes = sizeof(RingMemory<Program>);
  static_assert(bytes <= 227 * 1024);
  const auto kernel = row_ring<Program>;
  constexpr unsigned threads = Program::kShape.threads();
  const auto clusters = resident_clusters(kernel, {unsigned(blocks), threads, bytes, unsigned(blocks)});
  const auto taken = std::min<std::int64_t>(program.count, clusters);
  launch(kernel, {unsigned(taken * blocks), threads, bytes, unsigned(blocks)}, stream, program);
}

}  // namespace masked_loss::cuda
