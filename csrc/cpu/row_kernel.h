#pragma once

#include <cstdint>

namespace masked_loss::cpu {

// A family's kernel over rows of classes. Rows are named by their position among those that the work visits.
template <class Work, class Mode>
struct RowKernel {
  enum class Step { Visit, Conclude, Write };

  struct Sizes {
    std::int64_t rows_at_once;  // of which [begin, end) of `run` should have whole multiples
    std::int64_t scratch;       // bytes
    std::int64_t parts;         // of a row that threads may share; 1 where they may not
    std::int64_t memory;        // bytes that are kept for such a row from the first step to the last
  };

  Sizes (*sizes)(const Work& work, Mode mode);

  // Works on the rows at [begin, end); `scratch` is at the beginning of a cache line. What the work has of a plan (and
  // of what comes back with it) is that of these rows alone; in the steps below, of all rows.
  void (*run)(const Work& work, Mode mode, std::int64_t begin, std::int64_t end, char* scratch);

  // The same in steps, for a row that several threads share: its parts are visited, what they amount to is concluded,
  // and the parts are written.
  void (*step)(const Work& work, Mode mode, Step step, std::int64_t row, std::int64_t part, char* memory);
};

}  // namespace masked_loss::cpu
