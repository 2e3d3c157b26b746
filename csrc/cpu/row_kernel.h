#pragma once

#include <cstdint>

namespace masked_loss::cpu {

enum class RowStep { Visit, Conclude, Write };

// A family's kernel over rows of classes. Rows are named by their position among those that the work visits.
template <class Work, class Mode>
struct RowKernel {
  // Works on the rows at [begin, end); `scratch` is that many bytes, at the beginning of a cache line. What the work
  // has of a plan (and of what comes back with it) is that of these rows alone; in the steps below, of all rows.
  void (*run)(const Work& work, Mode mode, std::int64_t begin, std::int64_t end, char* scratch);
  std::int64_t (*scratch_size)(const Work& work, Mode mode);
  std::int64_t (*rows_at_once)(const Work& work, Mode mode);  // of which [begin, end) should have whole multiples

  // The same in steps, for a row that several threads share: its parts are visited, what they amount to is concluded,
  // and the parts are written. `memory` is kept for the row from the first step to the last.
  std::int64_t (*parts)(const Work& work, Mode mode);  // of a row; 1 where it is not to be shared
  std::int64_t (*memory_size)(const Work& work, Mode mode);
  void (*step)(const Work& work, Mode mode, RowStep step, std::int64_t row, std::int64_t part, char* memory);
};

}  // namespace masked_loss::cpu
