// Long rows of contiguous classes, in a ring of shared memory: a persistent block, or a cluster of blocks that share
// each row, takes one row after the other. One thread has chunks of the next rows copied into the ring and those that
// have been overwritten copied out; groups of warps take the rows in turn, so that one computes while another waits for
// what its row adds up to.
//
// Copies begin and end at multiples of 16 bytes: what a row has before and behind them, up to 14 elements, its first
// block reads and writes by plain accesses. Masks are bytes of other alignments. They are prefetched beside the copies,
// and read from the cache into registers one chunk ahead; the ring has a bit an element of them.
//
// A program has, beside its dtype T and a RingShape kShape,
//
//   kInputs                    operands that are read; their rows, and those of the output, begin alike within 16 bytes
//   kMasked                    whether there may be a mask or a causal end
//   kWrites                    whether there is an output
//   State                      what a part of a row adds up to, words of 8 bytes; State() is that of none
//   count, classes             of the rows, at most, and of each of them
//   end()                      how many rows there are to visit, which the host need not know; row(position) names them
//   bool keeps(row)            rows that are not kept are written as masked, by skip(row) where nothing is written
//   input(k, row), output(row) where the row begins
//   mask(row), end_of(row)     kMasked: its bytes, or null, and where the row ends
//   Row begin(row, leads)      what a thread needs to know of a row, whose results are given by the one that leads
//   visit(state, packs, kept, class, step)   adds packs [kInputs][], with a bit an element; so many classes apart
//   merge(a, b), merge_warp()  in an order that the sizes fix
//   conclude(row, state)       what write needs; gives the row's results
//   write(pack, class, terms)  what takes the place of a pack, from all inputs
//   absent(), masked()         kMasked: what is visited, and written, where nothing is kept; else absent() is not there
#pragma once

#include "cuda/async.cuh"
#include "cuda/row_packs.cuh"

namespace masked_loss::cuda {

// kLag stores may be under way while their stages are not yet filled again. A group's chunks have to be in the ring at
// once with those that others wait for: groups * chunks + lag <= stages.
struct RingShape {
  int warps, groups;  // of warps, and how many of them
  int chunk, stages;  // bytes of an operand, chunks
  int lag;

  constexpr int threads() const { return (warps * groups + 1) * 32; }
  constexpr int most_chunks() const { return (stages - lag) / groups; }  // of a block's part of a row
};

inline constexpr int kRingCluster = 8;               // blocks that share a row, at most
inline constexpr std::int64_t kRingBytes = 1 << 15;  // of a row, from which on a ring is filled in chunks

// Of half types an instruction counts for more than memory, of float the memory. Threads of programs with more to hold
// have 96 registers, and not 72.
constexpr RingShape ring_shape(int element_bytes, int inputs, bool masked) {
  if (inputs > 1) {
    if (element_bytes > 2) return {16, 1, 1 << 13, 12, 2};
    return masked ? RingShape{8, 2, 1 << 12, 24, 3} : RingShape{8, 2, 1 << 13, 12, 2};
  }
  if (element_bytes > 2) return {16, 1, 1 << 14, 12, 2};
  return masked ? RingShape{8, 2, 1 << 13, 24, 3} : RingShape{8, 3, 1 << 14, 13, 1};
}

// Of the host: how many blocks share a row, or 0 where it does not fit.
inline int ring_blocks(int element_bytes, int inputs, bool masked, std::int64_t classes) {
  const auto shape = ring_shape(element_bytes, inputs, masked);
  const std::int64_t bytes = classes * element_bytes, most = std::int64_t(shape.most_chunks()) * shape.chunk;
  if (bytes < kRingBytes) return 0;
  int blocks = 1;
  while (blocks * most < bytes) blocks *= 2;
  return blocks <= kRingCluster ? blocks : 0;
}

// Of the host: whether the rows of some operands begin alike within 16 bytes. Null pointers are not operands.
template <class T, int operands>
bool begin_alike(const Rows<operands>& rows, std::initializer_list<std::pair<const T*, int>> of) {
  constexpr std::int64_t pack = 16 / sizeof(T);
  const auto [first, k0] = *of.begin();
  const auto place = [](const T* address) { return reinterpret_cast<std::uintptr_t>(address) % 16; };
  bool alike = place(first) % sizeof(T) == 0;
  for (const auto& [address, k] : of) {
    if (address == nullptr) continue;
    alike &= place(address) == place(first);
    for (int d = 0; d < rows.dims; ++d) alike &= (rows.strides[k][d] - rows.strides[k0][d]) % pack == 0;
  }
  return alike;
}

template <class Program>
struct RingMemory {
  static constexpr auto shape = Program::kShape;
  // A bit for each element of a chunk that a thread has.
  static constexpr int bits = shape.chunk / (shape.warps * 32) / int(sizeof(typename Program::T));
  using Bits = std::conditional_t<bits <= 8, std::uint8_t, std::conditional_t<bits <= 16, std::uint16_t, unsigned>>;
  static_assert(bits <= 32);

  alignas(128) unsigned char stages[shape.stages][Program::kInputs][shape.chunk];
  alignas(128) unsigned char masked[4096];  // packs of what is written where nothing is kept
  alignas(16) typename Program::State parts[shape.groups][2][kRingCluster * shape.warps];
  Bits kept[Program::kMasked ? shape.stages : 1][Program::kMasked ? shape.warps * 32 : 1];
  Barrier full[shape.stages], done[shape.stages], exchanged[shape.groups][2];
};

template <class Program>
class Ring {
 public:
  static constexpr auto shape = Program::kShape;
  static constexpr int kInputs = Program::kInputs;
  using T = typename Program::T;
  using State = typename Program::State;
  using P = Pack<T>;

  __device__ __forceinline__ Ring(const Program& of, RingMemory<Program>& in)
      : program_(of), memory_(in), rank_(cluster_rank()), blocks_(cluster_blocks()) {
    const auto packs = static_cast<int>(program_.classes / P::size);
    each_ = (packs + blocks_ - 1) / blocks_;
    chunks_ = (each_ + kChunk - 1) / kChunk;
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
    if constexpr (Program::kWrites) {
      P masked;
#pragma unroll
      for (T& value : masked.values) value = program_.masked();
      for (unsigned i = threadIdx.x; i < sizeof(memory_.masked) / 16; i += blockDim.x) {
        write_for_bulk_store(reinterpret_cast<P*>(memory_.masked) + i, masked);
      }
      fence_for_bulk_stores();
    }
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
  static constexpr int kThreads = shape.warps * 32, kChunk = shape.chunk / 16, kPacks = kChunk / kThreads;
  static constexpr unsigned kEvery = (1u << P::size) - 1;

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

  // A row's packs, of which this block has some, and reads those that are not behind the row's end.
  struct Slice : RowPacks<T> {
    int first, count, read, end;
    // Packs of a chunk, out of so many.
    __device__ __forceinline__ static int of_chunk(int packs, int chunk) {
      return max(0, min(kChunk, packs - chunk * kChunk));
    }
    __device__ __forceinline__ int class_of(int pack) const { return this->element(first + pack); }
  };
  __device__ __forceinline__ Slice slice_of(std::int64_t row) const {
    Slice slice;
    static_cast<RowPacks<T>&>(slice) = {program_.input(0, row), static_cast<int>(program_.classes)};
    slice.first = min(rank_ * each_, slice.packs);
    slice.count = slice.read = min(each_, slice.packs - slice.first);
    slice.end = static_cast<int>(program_.classes);
    if constexpr (Program::kMasked) {
      slice.end = static_cast<int>(program_.end_of(row));
      slice.read = max(0, min(slice.count, (slice.end - slice.class_of(0) + P::size - 1) / P::size));
    }
    return slice;
  }

  // The first rank's too, where nothing is kept.
  __device__ __forceinline__ void store_masked(std::int64_t row) const {
    const auto slice = slice_of(row);
    T* output = program_.output(row);
    auto* to = reinterpret_cast<unsigned char*>(output + slice.class_of(0));
    for (int at = 0; at < slice.count * 16; at += int(sizeof(memory_.masked))) {
      bulk_store(to + at, memory_.masked, min(int(sizeof(memory_.masked)), slice.count * 16 - at));
    }
    if (rank_ != 0) return;
    for (int i = 0; i < slice.head; ++i) output[i] = program_.masked();
    for (int i = slice.element(slice.packs); i < slice.size; ++i) output[i] = program_.masked();
  }

  __device__ __forceinline__ void prefetch_mask(std::int64_t row, int c, int classes) const {
    const std::uint8_t* mask = program_.mask(row);
    if (mask == nullptr) return;
    mask += c;
    const auto skipped = int(-reinterpret_cast<std::uintptr_t>(mask) % 16), bytes = (classes - skipped) / 16 * 16;
    if (bytes > 0) bulk_prefetch(mask + skipped, bytes);
  }

  __device__ void produce() {
    unsigned loaded = 0, stored = 0;  // chunks
    Walk store = walk();
    int store_chunk = 0, store_packs = 0;
    T* store_to = nullptr;
    const auto store_next = [&] {
      const unsigned stage = stored % shape.stages;
      memory_.done[stage].wait(stored / shape.stages & 1);
      ++stored;
      if constexpr (Program::kWrites) {
        if (store_chunk == 0) {
          while (!store.kept) advance(store);
          const auto row = program_.row(store.position);
          const auto slice = slice_of(row);
          store_packs = slice.count;
          store_to = program_.output(row) + slice.class_of(0);
        }
        if (const int packs = Slice::of_chunk(store_packs, store_chunk); packs > 0) {
          bulk_store(store_to + std::int64_t(store_chunk) * kChunk * P::size, memory_.stages[stage][0], packs * 16);
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
        if constexpr (Program::kWrites) {
          store_masked(row);
        } else if (rank_ == 0) {
          program_.skip(row);
        }
        continue;
      }
      const auto slice = slice_of(row);
      for (int chunk = 0; chunk < chunks_; ++chunk, ++loaded) {
        const unsigned stage = loaded % shape.stages;
        const int packs = Slice::of_chunk(slice.read, chunk);
        if (loaded >= unsigned(shape.stages)) {
          const auto wanted = loaded - shape.stages + 1 + (Program::kWrites ? shape.lag : 0);
          while (stored < wanted) store_next();
          if constexpr (Program::kWrites) wait_for_bulk_stores<shape.lag>();
        }
        auto& full = memory_.full[stage];
        if (packs == 0) {
          full.arrive();
          continue;
        }
        const int first = slice.class_of(chunk * kChunk);
        full.arrive_and_expect(packs * 16 * kInputs);
#pragma unroll
        for (int k = 0; k < kInputs; ++k) {
          bulk_load(memory_.stages[stage][k], program_.input(k, row) + first, packs * 16, full);
        }
        if constexpr (Program::kMasked) prefetch_mask(row, first, packs * P::size);
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

  // The mask of a thread's packs of a chunk, which is asked for long before it is looked at.
  struct Kept {
    MaskWord<P::size> words[kPacks];

    __device__ __forceinline__ void load(const std::uint8_t* mask, bool aligned, const Slice& slice, int first) {
#pragma unroll
      for (int k = 0; k < kPacks; ++k) {
        const int pack = first + k * kThreads;
        words[k] = {};
        if (pack >= slice.read) continue;
        const auto* bytes = mask + slice.class_of(pack);
        if (aligned) {
          words[k] = *reinterpret_cast<const MaskWord<P::size>*>(bytes);
        } else {
          std::uint8_t loaded[P::size];
#pragma unroll
          for (int j = 0; j < P::size; ++j) loaded[j] = bytes[j];
          memcpy(&words[k], loaded, sizeof(loaded));
        }
      }
    }
    __device__ __forceinline__ unsigned bits(bool has_mask, const Slice& slice, int first) const {
      unsigned all = 0;
#pragma unroll
      for (int k = 0; k < kPacks; ++k) {
        const int c = slice.class_of(first + k * kThreads), count = max(0, min(P::size, slice.end - c));
        unsigned kept = first + k * kThreads < slice.read ? (1u << count) - 1 : 0;
        if (has_mask) kept &= mask_bits(words[k]);
        all |= kept << (k * P::size);
      }
      return all;
    }
  };

  template <int packs>
  __device__ __forceinline__ void drop(P (&pack)[kInputs][packs], unsigned kept) const {
#pragma unroll
    for (int k = 0; k < packs; ++k) {
      const unsigned bits = kept >> (k * P::size) & kEvery;
      if (bits == kEvery) continue;
#pragma unroll
      for (int j = 0; j < P::size; ++j) {
#pragma unroll
        for (int i = 0; i < Program::kDropped; ++i) {
          pack[i][k].values[j] = bits >> j & 1 ? pack[i][k].values[j] : program_.absent();
        }
      }
    }
  }

  __device__ __forceinline__ P written(const P (&pack)[kInputs], unsigned kept, int c,
                                       const typename Program::Terms& terms) const {
    P result = program_.write(pack, c, terms);
    if (Program::kMasked && kept != kEvery) {
#pragma unroll
      for (int j = 0; j < P::size; ++j) {
        result.values[j] = kept >> j & 1 ? result.values[j] : program_.masked();
      }
    }
    return result;
  }

  __device__ void consume() {
    const int group = threadIdx.x / kThreads, thread = threadIdx.x % kThreads, warp = thread / 32, lane = thread % 32;
    unsigned kept_rows = 0, mine = 0;
    for (Walk at = walk(); at.position < end_; advance(at)) {
      if (!at.kept || kept_rows++ % shape.groups != unsigned(group)) continue;
      const unsigned loaded = (kept_rows - 1) * chunks_;  // before it
      const int parity = mine & 1;
      auto& exchanged = memory_.exchanged[group][parity];
      if (thread == 0) exchanged.arrive_and_expect(blocks_ * shape.warps * sizeof(State));
      const auto r = program_.row(at.position);
      const auto slice = slice_of(r);
      const auto row = program_.begin(r, rank_ == 0 && thread == 0);
      const std::uint8_t* mask = nullptr;
      bool mask_aligned = false;
      Kept next;
      if constexpr (Program::kMasked) {
        mask = program_.mask(r);
        mask_aligned = (reinterpret_cast<std::uintptr_t>(mask) + slice.head) % P::size == 0;
        if (mask != nullptr) next.load(mask, mask_aligned, slice, thread);
      }
      State state;
      // An element beside the packs is a pack with nothing else.
      const int single = rank_ == 0 && thread < 32 ? slice.single(thread) : -1;
      P alone[kInputs][1];
      bool single_kept = false;
      if (single >= 0) {
        single_kept = single < slice.end && (mask == nullptr || mask[single] != 0);
#pragma unroll
        for (int k = 0; k < kInputs; ++k) {
#pragma unroll
          for (T& value : alone[k][0].values) value = program_.absent();
          alone[k][0].values[0] = program_.input(k, r)[single];
        }
        if constexpr (Program::kMasked) drop(alone, single_kept);
        program_.visit(state, alone, single_kept, single, 0);
      }
      for (int chunk = 0; chunk < chunks_; ++chunk) {
        const unsigned stage = (loaded + chunk) % shape.stages;
        const int first = chunk * kChunk + thread;
        unsigned kept = 0;
        if constexpr (Program::kMasked) {
          kept = next.bits(mask != nullptr, slice, first);
          if (mask != nullptr) next.load(mask, mask_aligned, slice, first + kChunk);
        }
        memory_.full[stage].wait((loaded + chunk) / shape.stages & 1);
        // Not before: what the stage had last may still be in use by another group.
        if constexpr (Program::kMasked && Program::kWrites) {
          memory_.kept[stage][thread] = typename RingMemory<Program>::Bits(kept);
        }
        P pack[kInputs][kPacks];
#pragma unroll
        for (int i = 0; i < kInputs; ++i) {
#pragma unroll
          for (int k = 0; k < kPacks; ++k) {
            const bool there = first + k * kThreads < slice.read;
            if (there) {
              pack[i][k] = reinterpret_cast<const P*>(memory_.stages[stage][i])[k * kThreads + thread];
            } else {
#pragma unroll
              for (T& value : pack[i][k].values) value = program_.absent();
            }
          }
        }
        if constexpr (Program::kMasked) drop(pack, kept);
        program_.visit(state, pack, kept, slice.class_of(first), kThreads * P::size);
        if constexpr (!Program::kWrites) release(stage);
      }
      state = program_.merge_warp(state);
      auto& parts = memory_.parts[group][parity];
      if (lane < blocks_) store_words_async(&parts[rank_ * shape.warps + warp], state, exchanged, unsigned(lane));
      exchanged.wait(mine++ >> 1 & 1);
      state = {};
      for (int i = lane; i < blocks_ * shape.warps; i += 32) state = program_.merge(state, parts[i]);
      const auto terms = program_.conclude(row, program_.merge_warp(state));
      if constexpr (Program::kWrites) {
        if (single >= 0) {
          P pack[kInputs];
#pragma unroll
          for (int k = 0; k < kInputs; ++k) pack[k] = alone[k][0];
          program_.output(r)[single] = written(pack, single_kept ? kEvery : 0, single, terms).values[0];
        }
        for (int chunk = 0; chunk < chunks_; ++chunk) {
          const unsigned stage = (loaded + chunk) % shape.stages;
          const int first = chunk * kChunk + thread;
          const unsigned kept = Program::kMasked ? memory_.kept[stage][thread] : 0;
#pragma unroll
          for (int k = 0; k < kPacks; ++k) {
            const int i = first + k * kThreads;
            if (i >= slice.count) continue;
            P pack[kInputs];
#pragma unroll
            for (int n = 0; n < kInputs; ++n) {
              pack[n] = reinterpret_cast<const P*>(memory_.stages[stage][n])[k * kThreads + thread];
            }
            write_for_bulk_store(reinterpret_cast<P*>(memory_.stages[stage][0]) + k * kThreads + thread,
                                 written(pack, kept >> (k * P::size) & kEvery, slice.class_of(i), terms));
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
  int each_, chunks_;                // packs and chunks of a row that a block has, at most
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
