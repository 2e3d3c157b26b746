#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

namespace masked_loss::cpu {

// Runs task(0) ... task(tasks - 1), each on the next free thread: masked rows make their costs uneven. What a task
// does must not depend on the thread; make_task is called once a thread, for its scratch memory.
template <class MakeTask>
void run_tasks(std::int64_t tasks, const MakeTask& make_task) {
  const std::int64_t threads = std::min<std::int64_t>(tasks, at::in_parallel_region() ? 1 : at::get_num_threads());
  if (threads <= 1) {
    if (tasks == 0) return;
    auto task = make_task();
    for (std::int64_t i = 0; i < tasks; ++i) task(i);
    return;
  }
  std::atomic<std::int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](std::int64_t, std::int64_t) {
    auto task = make_task();
    for (std::int64_t i = next++; i < tasks; i = next++) task(i);
  });
}

inline std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace masked_loss::cpu
