#pragma once

#include <c10/util/SmallBuffer.h>

#include "cpu/parallel.h"
#include "cpu/row_kernel.h"

namespace masked_loss::cpu {

// Runs a row kernel over the first `rows` rows of a work: in tasks of many rows, or, of few long rows, with each of
// them shared by threads. The sizes alone decide, so that the number of threads changes no bit.
template <class Work, class Mode>
class RowDriver {
 public:
  RowDriver(const RowKernel<Work, Mode>& kernel, const Work& work, Mode mode, std::int64_t rows)
      : kernel_(kernel), work_(work), mode_(mode), rows_(rows), sizes_(kernel.sizes(work, mode)) {
    if (rows > kFewRows || work.classes < kLongRow) sizes_.parts = 1;
    const auto at_once = sizes_.rows_at_once, elements_at_once = at_once * std::max(work.classes, kFewClasses);
    task_rows_ = sizes_.parts > 1 ? std::max<std::int64_t>(1, rows)
                                  : at_once * std::max<std::int64_t>(1, kElementsPerTask / elements_at_once);
  }

  std::int64_t tasks() const { return divide_up(rows_, task_rows_); }
  std::int64_t task_rows() const { return std::min(rows_, task_rows_); }  // of each but the last

  // make_plan() is called once a thread, and what it gives as plan(task, begin, end, run): it calls run(work) with what
  // is known of the rows at [begin, end).
  template <class MakePlan>
  void operator()(const MakePlan& make_plan) const {
    if (sizes_.parts > 1 && rows_ > 0) {
      make_plan()(0, 0, rows_, [&](const Work& work) { run_steps(work); });
      return;
    }
    run_tasks(tasks(), [&] {
      constexpr std::int64_t line = 64;
      return [this, memory = c10::SmallBuffer<char, 16384>(sizes_.scratch + line),
              plan = make_plan()](std::int64_t task) mutable {
        auto* scratch = reinterpret_cast<char*>(divide_up(reinterpret_cast<std::intptr_t>(memory.data()), line) * line);
        const auto begin = task * task_rows_, end = std::min(rows_, begin + task_rows_);
        plan(task, begin, end, [&](const Work& work) { kernel_.run(work, mode_, begin, end, scratch); });
      };
    });
  }

 private:
  using Kernel = RowKernel<Work, Mode>;
  using Step = typename Kernel::Step;

  static constexpr std::int64_t kElementsPerTask = 1 << 16;
  static constexpr std::int64_t kFewRows = 32;       // which threads share where each is long,
  static constexpr std::int64_t kLongRow = 1 << 15;  // which is of so many classes
  static constexpr std::int64_t kFewClasses = 16;    // fewer count as so many, for what each row costs besides

  void run_steps(const Work& work) const {
    const auto parts = sizes_.parts;
    c10::SmallBuffer<char, 4096> memory(rows_ * sizes_.memory);
    const auto step = [&](Step step, std::int64_t row, std::int64_t part) {
      kernel_.step(work, mode_, step, row, part, memory.data() + row * sizes_.memory);
    };
    const auto step_parts = [&](Step of_part) {
      run_tasks(rows_ * parts,
                [&] { return [&, of_part](std::int64_t task) { step(of_part, task / parts, task % parts); }; });
    };
    step_parts(Step::Visit);
    for (std::int64_t row = 0; row < rows_; ++row) step(Step::Conclude, row, 0);
    step_parts(Step::Write);
  }

  const Kernel& kernel_;
  const Work& work_;
  const Mode mode_;
  const std::int64_t rows_;
  typename Kernel::Sizes sizes_;
  std::int64_t task_rows_;
};

}  // namespace masked_loss::cpu
