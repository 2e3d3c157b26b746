#pragma once

#include <cstdint>

namespace masked_loss {

// How the losses of elements are reduced. The numbers are those of the ops' argument `int reduction`.
enum class Reduction : std::int64_t { None = 0, Mean = 1, Sum = 2, SequenceMean = 3, BatchMean = 4 };

}  // namespace masked_loss
