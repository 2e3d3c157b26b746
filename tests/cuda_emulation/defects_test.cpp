// That the emulation notices what it is there for: kernels with one mistake each.
#include <functional>

#include "cuda/async.cuh"
#include "kernels.h"

#pragma GCC diagnostic ignored "-Wunused-function"  // each sanitizer has its own

namespace masked_loss::cuda::test {
namespace {

__global__ void divergent_barrier() {
  if (threadIdx.x < 40) __syncthreads();
}
__global__ void two_barriers() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
__global__ void missing_lanes(float* out, unsigned n) {
  if (threadIdx.x >= n) return;
  out[threadIdx.x] = __shfl_xor_sync(kWholeWarp, out[threadIdx.x], 1);
}
__global__ void lane_outside_of_the_mask(float* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_down_sync(0x0000ffff, out[threadIdx.x], 4);
}
__global__ void caller_outside_of_the_mask(float* out) {
  out[threadIdx.x] = __shfl_xor_sync(0x0000ffff, out[threadIdx.x], 1);
}
__global__ void barrier_beside_exchange(float* out) {
  if (threadIdx.x % 2 != 0) __syncthreads();
  out[threadIdx.x] = __shfl_xor_sync(kWholeWarp, out[threadIdx.x], 2);
}
__global__ void misaligned_pack(float* out) { store_streaming(out + 1, Pack<float>{}); }
__global__ void neighbour_has_returned(float* out) {
  auto& a = emulation::shared_variable<float, struct A>();
  a = 1;
  auto cluster = cooperative_groups::this_cluster();
  cluster.sync();
  if (cluster.block_rank() != 0) return;
  for (int i = 0; i < 3; ++i) __syncthreads();
  out[0] = *cluster.map_shared_rank(&a, 1);
}

// The second round's write may overtake the first round's reads.
__global__ void missing_second_barrier(float* out) {
  auto& a = emulation::shared_variable<float, struct B>();
  for (int i = 0; i < 2; ++i) {
    if (threadIdx.x == 0) a = float(i);
    __syncthreads();
    out[i * blockDim.x + threadIdx.x] = a;
  }
}
__global__ void unwritten_shared_memory(float* out) {
  auto& a = emulation::shared_variable<float[64], struct C>();
  if (threadIdx.x < 32) a[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = a[threadIdx.x];
}
__global__ void order_of_blocks(int* count, int* order) {
  if (threadIdx.x == 0) order[atomicAdd(count, 1)] = int(blockIdx.x);
}

// Copies 64 bytes in and out of shared memory, each mistake by its number.
struct Copied {
  alignas(16) Pack<float> packs[4];
  Barrier full;
};
__global__ void copies_with_a_mistake(const float* in, float* out, int mistake) {
  auto& memory = shared<Copied, struct CopiesWithAMistake>();
  auto& [packs, full] = memory;
  if (threadIdx.x == 0) {
    if (mistake != 1) full.init(1);
    if (mistake == 2) full.init(1);
    fence_barriers();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    full.arrive_and_expect(mistake == 3 ? 48 : 64);
    if (mistake == 4) full.arrive();
    bulk_load(packs, in + (mistake == 5 ? 1 : 0), mistake == 6 ? 56 : 64, full);
    if (mistake == 7) return;
  }
  if (mistake != 8) full.wait(mistake == 9 ? 1 : 0);
  if (threadIdx.x < 4) {
    Pack<float> pack = packs[threadIdx.x];
    for (float& x : pack.values) x += 1;
    write_for_bulk_store(&packs[threadIdx.x], pack);
    if (mistake != 10) fence_for_bulk_stores();
  }
  if (mistake == 11) {
    if (threadIdx.x < 32) sync_threads(16, 32);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    bulk_store(out, packs, 64);
    if (mistake != 12) commit_bulk_stores();
    if (mistake != 13) wait_for_bulk_stores<0>();
    if (mistake == 13) packs[0].values[0] = -1;
  }
}

// What only a sanitizer sees.
__global__ void shared_overrun(float* out) {
  auto& a = emulation::shared_variable<float[32], struct D>();
  volatile int i = 32;
  if (threadIdx.x == 0) out[0] = a[i];
}
__global__ void dynamic_overrun(float* out, int n) {
  auto* a = static_cast<float*>(emulation::dynamic_shared());
  a[n] = 1;
  out[0] = a[n];
}
__global__ void global_overrun(float* out, unsigned n) {
  if (threadIdx.x <= n) out[threadIdx.x] = 1;
}
__global__ void misaligned_access(float* out) { *reinterpret_cast<uint4*>(out + 1) = {}; }
__global__ void missing_syncwarp(float* out) {
  auto& a = emulation::shared_variable<float[32], struct E>();
  a[threadIdx.x] = float(threadIdx.x);
  const float one = __shfl_xor_sync(kWholeWarp, 1.0f, 1);
  out[threadIdx.x] = a[31 - threadIdx.x] + one;
}
__global__ void race_of_blocks(float* out) {
  if (threadIdx.x == 0) out[0] = float(blockIdx.x);
}

class Defects : public ::testing::Test {
 protected:
  Defects() : out_(256) {}
  void SetUp() override { emulation::schedule.set(3); }
  float* out() { return out_.data(); }

  static void expect_error(const std::function<void()>& run, const std::string& message) {
    try {
      run();
      ADD_FAILURE() << "no error; expected: " << message;
    } catch (const emulation::Error& error) {
      EXPECT_NE(std::string(error.what()).find(message), std::string::npos) << error.what();
    }
  }

 private:
  Buffer<float> out_;
};

// ThreadSanitizer loses track where threads are abandoned.
#ifndef __SANITIZE_THREAD__
TEST_F(Defects, Barriers) {
  expect_error([] { launch(divergent_barrier, {1, 64}, nullptr); }, "40 threads (0 to 39) wait in __syncthreads()");
  expect_error([] { launch(two_barriers, {1, 64}, nullptr); }, "comes while others wait in __syncthreads()");
  expect_error([&] { launch(barrier_beside_exchange, {1, 64}, nullptr, out()); }, "threads wait for others");
}

TEST_F(Defects, Lanes) {
  expect_error([&] { launch(missing_lanes, {1, 64}, nullptr, out(), 40u); }, "8 threads (32 to 39) wait in");
  expect_error([&] { launch(lane_outside_of_the_mask, {1, 32}, nullptr, out()); }, "reads a lane that is not in");
  expect_error([&] { launch(caller_outside_of_the_mask, {1, 32}, nullptr, out()); }, "called by a lane that is not in");
}

TEST_F(Defects, Memory) {
  expect_error([&] { launch(misaligned_pack, {1, 1}, nullptr, out()); }, "has a misaligned address");
  expect_error([&] { launch(neighbour_has_returned, {2, 32, 0, 2}, nullptr, out()); }, "a block that has returned");
}

TEST_F(Defects, Copies) {
  Buffer<float> in(20);
  for (std::size_t i = 0; i < in.size(); ++i) in[i] = float(i);
  const auto run = [&](int mistake) { launch(copies_with_a_mistake, {1, 64}, nullptr, in.data(), out(), mistake); };
  for (unsigned seed = 0; seed <= 10; ++seed) {
    emulation::schedule.set(seed);
    std::fill_n(out(), 16, -7.0f);
    run(0);
    for (int i = 0; i < 16; ++i) EXPECT_EQ(out()[i], in[i] + 1) << seed;
  }
  emulation::schedule.set(0);
  expect_error([&] { run(1); }, "has not been initialized");
  expect_error([&] { run(2); }, "has been initialized");
  expect_error([&] { run(3); }, "wait in Barrier::wait");
  expect_error([&] { run(4); }, "comes when all have arrived");
  expect_error([&] { run(5); }, "has a misaligned address");
  expect_error([&] { run(6); }, "is not a multiple of 16");
  expect_error([&] { run(7); }, "threads wait for others");
  expect_error([&] { run(8); }, "has returned before copies");
  expect_error([&] { run(9); }, "has returned before copies");
  expect_error([&] { run(10); }, "without a fence for the copy engine");
  expect_error([&] { run(11); }, "is not from 1 to 15");
  expect_error([&] { run(12); }, "has returned before copies");
  expect_error([&] { run(13); }, "has returned before copies");
}

TEST_F(Defects, Launches) {
  expect_error([&] { launch(misaligned_pack, {1, 1025}, nullptr, out()); }, "1 to 1024 threads");
  expect_error([&] { launch(misaligned_pack, {0, 32}, nullptr, out()); }, "the grid is empty");
  expect_error([&] { launch(misaligned_pack, {1, 32, 1 << 20}, nullptr, out()); }, "227 KiB");
  expect_error([&] { launch(misaligned_pack, {3, 32, 0, 2}, nullptr, out()); }, "blocks that divide the grid");
  emulation::ptx_version = 89;
  expect_error([&] { launch(misaligned_pack, {2, 32, 0, 2}, nullptr, out()); }, "for GPUs without clusters");
  emulation::ptx_version = 90;
}

TEST_F(Defects, RacesShowInSomeOrder) {
  bool wrong = false;
  for (unsigned seed = 1; seed <= 10; ++seed) {
    emulation::schedule.set(seed);
    launch(missing_second_barrier, {1, 128}, nullptr, out());
    for (int i = 0; i < 256; ++i) wrong |= out()[i] != float(i / 128);
  }
  EXPECT_TRUE(wrong);
}

TEST_F(Defects, SharedMemoryStartsAsNaN) {
  launch(unwritten_shared_memory, {1, 64}, nullptr, out());
  EXPECT_EQ(out()[31], 1);
  EXPECT_TRUE(std::isnan(out()[32]));
}

TEST_F(Defects, BlocksComeInAnyOrder) {
  Buffer<int> order(16), count(1);
  launch(order_of_blocks, {16, 32}, nullptr, count.data(), order.data());
  EXPECT_FALSE(std::is_sorted(order.begin(), order.end()));
  std::sort(order.begin(), order.end());
  for (int i = 0; i < 16; ++i) EXPECT_EQ(order[i], i);
}
#endif

#ifdef __SANITIZE_ADDRESS__
using DefectsDeathTest = Defects;
TEST_F(DefectsDeathTest, AddressSanitizer) {
  EXPECT_DEATH(launch(shared_overrun, {1, 32}, nullptr, out()), "use-after-poison|out of bounds");
  EXPECT_DEATH(launch(dynamic_overrun, {1, 32, 400}, nullptr, out(), 100), "heap-buffer-overflow");
  EXPECT_DEATH(launch(global_overrun, {1, 1024}, nullptr, out(), 256u), "heap-buffer-overflow");
  EXPECT_DEATH(launch(misaligned_access, {1, 1}, nullptr, out()), "misaligned address");
}
#endif

// The program ends with an error once ThreadSanitizer has reported: each runs by itself, and fails.
#ifdef __SANITIZE_THREAD__
using DefectsDeathTest = Defects;
TEST_F(DefectsDeathTest, ThreadSanitizer) {
  ::testing::FLAGS_gtest_death_test_style = "threadsafe";
  const auto run = [](const auto& launches) {
    launches();
    std::exit(0);  // ThreadSanitizer makes it another code
  };
  emulation::schedule.set(0, 2);
  const auto seen = ::testing::ExitedWithCode(66);
  EXPECT_EXIT(run([&] { launch(missing_second_barrier, {1, 128}, nullptr, out()); }), seen, "data race");
  EXPECT_EXIT(run([&] { launch(missing_syncwarp, {1, 32}, nullptr, out()); }), seen, "data race");
  EXPECT_EXIT(run([&] { launch(race_of_blocks, {2, 32}, nullptr, out()); }), seen, "data race");
}
#endif

}  // namespace
}  // namespace masked_loss::cuda::test
