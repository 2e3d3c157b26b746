// What pytest --emulated tells and asks the library of emulated kernels.
#include "cuda/stream.h"
#include "emulation.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void masked_loss_emulated_set(unsigned seed, unsigned resident_blocks, int multiprocessors, int ptx_version) {
  emulation::schedule.set(seed, resident_blocks);
  masked_loss::cuda::emulated_device = {nullptr, multiprocessors};
  emulation::ptx_version = ptx_version;
}

EXPORT void masked_loss_emulated_write_launches(const char* path) { emulation::write_launches(path); }
