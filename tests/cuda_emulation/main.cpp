#include <gtest/gtest.h>

#include <cstdlib>

#include "emulation.h"

int main(int argc, char** argv) {
  ::testing::InitGoogleTest(&argc, argv);
  const int result = RUN_ALL_TESTS();
  if (const char* path = std::getenv("MASKED_LOSS_LAUNCHES")) emulation::write_launches(path);
  return result;
}
