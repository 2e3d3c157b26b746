// What the host asks of a device and of its kernels.
#include "cuda/device.cuh"

#include "kernels.h"

namespace masked_loss::cuda::test {
namespace {

__global__ void one_kernel(int* out) { *out = 1; }
__global__ void another_kernel(int* out) { *out = 2; }

// torch asks for the last error after its own launches, and would say that they had failed.
TEST(Launch, AnErrorIsThrownAndLeavesNothingBehind) {
  Buffer<int> out(1);
  for (const auto error : {cudaErrorInvalidConfiguration, cudaErrorLaunchOutOfResources}) {
    emulation::refusal = error;
    try {
      launch(one_kernel, {1, 1}, nullptr, out.data());
      ADD_FAILURE() << "no error";
    } catch (const std::runtime_error& thrown) {
      EXPECT_STREQ(thrown.what(), "masked_loss: a CUDA kernel was not launched: refused");
    }
    emulation::refusal = cudaSuccess;
    EXPECT_EQ(cudaGetLastError(), cudaSuccess);
  }
  launch(one_kernel, {1, 1}, nullptr, out.data());
  EXPECT_EQ(out[0], 1);
}

TEST(Launch, AnErrorOfOthersStaysTheirs) {
  Buffer<int> out(1);
  emulation::last_error = cudaErrorInvalidValue;
  launch(one_kernel, {1, 1}, nullptr, out.data());
  EXPECT_EQ(cudaGetLastError(), cudaErrorInvalidValue);
}

TEST(PtxVersion, IsThatOfTheKernelOnTheCurrentDevice) {
  for (const int version : {80, 90, 200, 80}) {  // beyond 128 none is remembered
    emulation::ptx_version = version;
    EXPECT_EQ(ptx_version<&one_kernel>(), version);
    EXPECT_EQ(ptx_version<&another_kernel>(), version);
  }
  emulation::ptx_version = 90;
}

}  // namespace
}  // namespace masked_loss::cuda::test
