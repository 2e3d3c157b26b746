// Executes CUDA kernels on the CPU, so that their sources are tested without a GPU. x86-64 only.
//
// Every CUDA thread is a fiber. A fiber runs until it reaches a barrier or a warp exchange, and then waits for the
// threads it has to meet there; which of the ready threads runs next is drawn from the schedule's seed. Mistakes that
// a GPU answers with a hang or with garbage end the launch with an Error that says who waits where. AddressSanitizer
// sees the bounds of shared memory; ThreadSanitizer sees CUDA's own rules (only barriers order memory accesses). Copies
// of the bulk copy engine happen late: at a time that the schedule draws, or when nothing else can go on.
//
// Not modelled: registers, launch bounds, bank conflicts, memory fences, blocks that wait for one another.
#pragma once

#ifndef __x86_64__
#error "the emulation switches stacks in x86-64 assembly"
#endif

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <climits>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#elif defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" void __tsan_ignore_thread_begin();
extern "C" void __tsan_ignore_thread_end();
#endif

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace emulation {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Launch {
  dim3 blocks;
  dim3 threads;
  std::size_t shared_bytes = 0;
  unsigned cluster_blocks = 1;
};

// What a GPU leaves open: the order of threads and blocks.
class Schedule {
 public:
  // seed 0: in the order of their indices, one block after the other. So many blocks run interleaved.
  void set(unsigned seed, unsigned resident_blocks = 1) {
    shuffled_ = seed != 0;
    state_ = seed * 2654435761u | 1u;
    resident_blocks_ = std::max(1u, resident_blocks);
  }
  bool shuffled() const { return shuffled_; }
  unsigned resident_blocks() const { return resident_blocks_; }
  std::uint32_t random() {
    state_ ^= state_ << 13, state_ ^= state_ >> 17, state_ ^= state_ << 5;
    return state_;
  }
  template <class Item>
  void shuffle(std::vector<Item>& items) {
    if (!shuffled_) return;
    for (std::size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[random() % i]);
  }

 private:
  bool shuffled_ = false;
  std::uint32_t state_ = 1;
  unsigned resident_blocks_ = 1;
};
inline Schedule schedule;

// What the kernels are compiled for, as 90 for compute_90. The GPU itself is no older, and has clusters.
inline int ptx_version = 90;

// How often each kernel has been launched.
inline std::map<const void*, std::size_t> launches;

// Hides the emulation's own memory accesses from ThreadSanitizer.
struct Hidden {
#ifdef __SANITIZE_THREAD__
  Hidden() { __tsan_ignore_thread_begin(); }
  ~Hidden() { __tsan_ignore_thread_end(); }
#else
  Hidden() {}
#endif
};

inline void release([[maybe_unused]] char* clock) {
#ifdef __SANITIZE_THREAD__
  __tsan_release(clock);
#endif
}

inline void acquire([[maybe_unused]] char* clock) {
#ifdef __SANITIZE_THREAD__
  __tsan_acquire(clock);
#endif
}

inline void forbid([[maybe_unused]] void* memory, [[maybe_unused]] std::size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
  __asan_poison_memory_region(memory, bytes);
#endif
}

inline void allow([[maybe_unused]] void* memory, [[maybe_unused]] std::size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(memory, bytes);
#endif
}

struct Fiber {
  static constexpr std::size_t stack_bytes = 64 * 1024;
  void* stack_pointer = nullptr;
  char* stack = nullptr;  // nullptr: the stack of the host's thread
  void* asan_stack = nullptr;
  void* tsan_fiber = nullptr;
};

// noipa: the caller's view of memory and registers ends here.
__attribute__((naked, noinline, noipa)) inline void switch_stack(void** /*from*/, void* /*to*/) {
  asm("push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15\n"
      "mov %rsp, (%rdi)\n"
      "mov %rsi, %rsp\n"
      "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp\n"
      "ret");
}

#ifdef __SANITIZE_ADDRESS__
inline bool from_host;
inline const void* host_stack;  // as AddressSanitizer knows it
inline std::size_t host_stack_bytes;
#endif

inline void arrive([[maybe_unused]] Fiber& here) {
#ifdef __SANITIZE_ADDRESS__
  const void* stack;
  std::size_t bytes;
  __sanitizer_finish_switch_fiber(here.asan_stack, &stack, &bytes);
  if (from_host) host_stack = stack, host_stack_bytes = bytes;
#endif
}

__attribute__((no_sanitize("thread"))) inline void switch_fiber(Fiber& from, Fiber& to) {
#if defined(__SANITIZE_ADDRESS__)
  from_host = from.stack == nullptr;
  __sanitizer_start_switch_fiber(&from.asan_stack, to.stack ? to.stack : host_stack,
                                 to.stack ? Fiber::stack_bytes : host_stack_bytes);
#elif defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(to.tsan_fiber, __tsan_switch_to_fiber_no_sync);
#endif
  switch_stack(&from.stack_pointer, to.stack_pointer);
  arrive(from);
}

// The fibers that are not in use, kept from launch to launch. The one that was used last comes first: a kernel without
// barriers runs all its threads on one stack that stays in the cache.
class Fibers {
 public:
  Fiber* take(void (*entry)()) {
    if (idle_.empty()) idle_.push_back(make());
    Fiber* fiber = idle_.back();
    idle_.pop_back();
    void** top = reinterpret_cast<void**>(fiber->stack + Fiber::stack_bytes);
    *--top = nullptr;  // where a backtrace ends
    *--top = reinterpret_cast<void*>(entry);
    fiber->stack_pointer = top - 6;  // the callee-saved registers
    return fiber;
  }
  void give_back(Fiber* fiber) {
#ifdef __SANITIZE_THREAD__
    used_.push_back(fiber);  // two threads on one fiber would look ordered
#else
    idle_.push_back(fiber);
#endif
  }
  // Its thread will not go on: what lies on the stack is forgotten.
  void give_back_unfinished(Fiber* fiber) {
#ifdef __SANITIZE_THREAD__
    fiber->tsan_fiber = __tsan_create_fiber(0);  // the old one is lost: it cannot be destroyed inside of functions
#endif
    allow(fiber->stack, Fiber::stack_bytes);
    give_back(fiber);
  }
  void settle() {
    idle_.insert(idle_.end(), used_.begin(), used_.end());
    used_.clear();
  }

 private:
  static constexpr std::size_t page = 4096;  // below each stack: traps overflows

  static Fiber* make() {
    void* memory = mmap(nullptr, page + Fiber::stack_bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, page, PROT_NONE);
    auto* fiber = new Fiber;
    fiber->stack = static_cast<char*>(memory) + page;
#ifdef __SANITIZE_THREAD__
    fiber->tsan_fiber = __tsan_create_fiber(0);
#endif
    return fiber;
  }

  std::vector<Fiber*> idle_, used_;
};

// A place in a kernel where threads wait for each other.
struct Site {
  const char* name;
  unsigned mask;  // of a warp's lanes; 0: all threads of the block
  const char* file;
  int line;

  bool operator==(const Site& other) const {
    const auto same = [](const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; };
    return line == other.line && mask == other.mask && same(name, other.name) && same(file, other.file);
  }
  std::string text() const {
    char lanes[24] = "";
    if (mask != 0) std::snprintf(lanes, sizeof lanes, "mask 0x%08x", mask);
    return std::string(name) + "(" + lanes + ") at " + file + ":" + std::to_string(line);
  }
};

inline std::string text(const uint3& index) {
  char text[40];
  std::snprintf(text, sizeof text, "(%u,%u,%u)", index.x, index.y, index.z);
  return text;
}

struct Warp;
struct Block;

struct Thread {
  Block* block;
  Warp* warp;
  unsigned rank, lane;  // in the block, in the warp
  uint3 index;
  Fiber* fiber;
  enum { Ready, Waiting, Exited } state;
  Site site;                                       // where it waits
  alignas(16) unsigned char given[16], taken[16];  // in a warp exchange
  unsigned source, votes;
  unsigned group;                                             // of bulk stores that is being filled
  std::vector<std::pair<const char*, std::size_t>> unfenced;  // what it has written, unseen by the copy engine
};

struct Gathering {  // of the threads that wait for each other
  std::vector<Thread*> threads;
  char clocks[2];
  bool phase = false;
};

struct Warp {
  Thread* threads;
  std::uint32_t ready;                       // lanes
  std::map<unsigned, Gathering> gatherings;  // by mask
};

struct Cluster {
  Gathering barrier;
  std::vector<Block*> blocks;
};

struct Block {
  uint3 index;
  Cluster* cluster;
  std::unique_ptr<char, void (*)(void*)> statics{nullptr, std::free}, dynamic{nullptr, std::free};
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::size_t running;
  Gathering barrier;
  std::map<unsigned, Gathering> named;  // barriers, by their number
};

// An mbarrier: a phase completes when so many have arrived and all bytes that they announced have come.
struct Mbarrier {
  long long expected, pending, bytes = 0;
  unsigned phase = 0;
  std::vector<Thread*> waiting;
  char clocks[2];
};

// What the hardware does by itself.
struct Operation {
  const Block* block;   // whose shared memory it touches
  const Thread* owner;  // of a bulk store, and its group
  unsigned group;
  std::function<void()> perform;
};

class Machine {
 public:
  static constexpr std::size_t static_capacity = 48 * 1024;

  Thread* current = nullptr;  // nullptr: no kernel is running
  Launch shape;
  std::vector<Operation> operations;  // that have been asked for
  std::map<const void*, Mbarrier> mbarriers;

  void perform(std::size_t i) {
    const auto operation = std::move(operations[i]);
    operations.erase(operations.begin() + static_cast<std::ptrdiff_t>(i));
    operation.perform();
  }
  void run(const Launch& launched, const void* name, void (*call)(const void*), const void* kernel);
  [[noreturn]] void fail(const Site& site, const char* what, const Site* other = nullptr);
  void wake(Thread& thread) {
    thread.state = Thread::Ready;
    thread.warp->ready |= 1u << thread.lane;
  }
  // Another warp comes first now, and may run far ahead of the others.
  void reshuffle() { schedule.shuffle(order_); }
  void wait(Thread& thread);
  std::size_t shared_variable(const void* key, std::size_t bytes, std::size_t alignment);

 private:
  void check() const;
  void start(Block& block);
  void run_resident();
  Thread* next();
  Thread* ready();
  void finish(Block& block);
  void release_memory();
  std::string stuck() const;
  [[noreturn]] void abandon(const std::string& message);
  static void enter();

  std::mutex mutex_;
  Fibers fibers_;
  Fiber host_;
  void (*call_)(const void*);
  const void* kernel_;
  std::deque<Block> blocks_;  // kept from launch to launch
  std::size_t resident_ = 0;
  std::vector<Warp*> order_;
  std::map<const void*, std::size_t> variables_;  // offsets of this kernel's static shared memory
  std::size_t static_bytes_ = 0;
  std::string error_;
  char started_, finished_;  // ThreadSanitizer's clocks of launches
};
inline Machine& machine = *new Machine;  // lives for ever: so do its fibers

inline Thread& self() { return *machine.current; }

inline void Machine::fail(const Site& site, const char* what, const Site* other) {
  Thread& thread = *current;
  {
    Hidden hidden;
    error_ = site.text() + " in thread " + text(thread.index) + " of block " + text(thread.block->index) + " " + what +
             (other != nullptr ? " " + other->text() : "");
  }
  switch_fiber(*thread.fiber, host_);  // for ever: nothing unwinds this stack
  std::abort();
}

// Goes on with another thread, without a way over the host, which ends and fails are for.
inline void Machine::wait(Thread& thread) {
  current = next();
  if (current == &thread) return;
  switch_fiber(*thread.fiber, current == nullptr ? host_ : *current->fiber);
}

// It never returns, which ThreadSanitizer's call stack of a fiber would keep from launch to launch.
__attribute__((no_sanitize("thread"))) inline void Machine::enter() {
  Thread* thread;
  {
    Hidden hidden;
    thread = machine.current;
    arrive(*thread->fiber);
  }
  acquire(&machine.started_);
  machine.call_(machine.kernel_);
  release(&machine.finished_);
  Hidden hidden;
  thread->state = Thread::Exited;
  switch_fiber(*thread->fiber, machine.host_);
}

inline void Machine::check() const {
  const auto expect = [](bool condition, const char* message) {
    if (!condition) throw Error(message);
  };
  const auto &blocks = shape.blocks, &threads = shape.threads;
  const auto block_threads = std::size_t(threads.x) * threads.y * threads.z;
  expect(block_threads >= 1 && block_threads <= 1024, "a block has 1 to 1024 threads");
  expect(blocks.x >= 1 && blocks.y >= 1 && blocks.z >= 1, "the grid is empty");
  expect(blocks.x <= INT_MAX && blocks.y <= 65535 && blocks.z <= 65535, "the grid is too large");
  expect(shape.shared_bytes <= 227 * 1024, "a block has at most 227 KiB of shared memory");
  expect(shape.cluster_blocks >= 1 && shape.cluster_blocks <= 8 && blocks.x % shape.cluster_blocks == 0,
         "a cluster has 1 to 8 blocks that divide the grid");
  expect(shape.cluster_blocks == 1 || ptx_version >= 90, "the kernel is compiled for GPUs without clusters");
}

inline void Machine::start(Block& block) {
  void* memory = nullptr;
  if (!block.statics) {
    if (posix_memalign(&memory, 128, static_capacity) != 0) throw std::bad_alloc();
    block.statics.reset(static_cast<char*>(memory));
  }
  // A new allocation each time, so that AddressSanitizer knows its end.
  if (posix_memalign(&memory, 128, std::max<std::size_t>(1, shape.shared_bytes)) != 0) throw std::bad_alloc();
  block.dynamic.reset(static_cast<char*>(memory));
  // NaN: nobody may count on what shared memory held before.
  std::memset(block.statics.get(), 0xff, static_bytes_);
  std::memset(block.dynamic.get(), 0xff, shape.shared_bytes);
  forbid(block.statics.get() + static_bytes_, static_capacity - static_bytes_);
  const dim3& size = shape.threads;
  const unsigned threads = size.x * size.y * size.z;
  block.threads.resize(threads);
  block.warps.resize((threads + 31) / 32);
  block.running = threads;
  block.barrier = {};
  block.named.clear();
  for (std::size_t w = 0; w < block.warps.size(); ++w) {
    Warp& warp = block.warps[w];
    warp.threads = &block.threads[w * 32];
    warp.ready = 0;
    warp.gatherings.clear();
    order_.push_back(&warp);
  }
  for (unsigned rank = 0; rank < threads; ++rank) {
    Thread& thread = block.threads[rank];
    thread.block = &block;
    thread.warp = &block.warps[rank / 32];
    thread.rank = rank;
    thread.lane = rank % 32;
    thread.index = {rank % size.x, rank / size.x % size.y, rank / size.x / size.y};
    thread.fiber = nullptr;
    thread.group = 0;
    thread.unfenced.clear();
    wake(thread);
  }
}

inline Thread* Machine::next() {
  const auto perform_one = [&] { perform(schedule.shuffled() ? schedule.random() % operations.size() : 0); };
  if (!operations.empty() && schedule.shuffled() && schedule.random() % 8 == 0) perform_one();
  for (;;) {
    if (Thread* thread = ready()) return thread;
    if (operations.empty()) return nullptr;
    perform_one();
  }
}

inline Thread* Machine::ready() {
  for (Warp* warp : order_) {
    if (warp->ready == 0) continue;
    unsigned lane = __builtin_ctz(warp->ready);
    if (schedule.shuffled()) {
      const unsigned turn = schedule.random() % 32;
      const std::uint32_t turned = warp->ready >> turn | warp->ready << (-turn & 31);
      lane = (__builtin_ctz(turned) + turn) % 32;
    }
    warp->ready &= ~(1u << lane);
    Thread& thread = warp->threads[lane];
    if (thread.fiber == nullptr) thread.fiber = fibers_.take(enter);
    threadIdx = thread.index;
    blockIdx = thread.block->index;
    return &thread;
  }
  return nullptr;
}

inline void Machine::finish(Block& block) {
  // What a cluster's other blocks may still ask for is no longer there.
  allow(block.statics.get(), static_capacity);
  std::memset(block.statics.get(), 0xff, static_bytes_);
  forbid(block.statics.get(), static_capacity);
  std::memset(block.dynamic.get(), 0xff, shape.shared_bytes);
  forbid(block.dynamic.get(), shape.shared_bytes);
}

inline void Machine::run_resident() {
  reshuffle();
  while ((current = next()) != nullptr) {
    switch_fiber(host_, *current->fiber);  // comes back when some thread has ended, or none can go on
    if (!error_.empty()) abandon(error_);
    if (current != nullptr && current->state == Thread::Exited) {
      fibers_.give_back(current->fiber);
      if (--current->block->running > 0) continue;
      for (const auto& operation : operations) {
        if (operation.block == current->block) abandon("a block has returned before copies of its shared memory ended");
      }
      finish(*current->block);
    }
  }
  for (std::size_t i = 0; i < resident_; ++i) {
    if (blocks_[i].running != 0) abandon(stuck());
  }
  release_memory();
}

inline void Machine::release_memory() {
  order_.clear();
  operations.clear();
  mbarriers.clear();
  fibers_.settle();
  for (std::size_t i = 0; i < resident_; ++i) {
    allow(blocks_[i].statics.get(), static_capacity);
    allow(blocks_[i].dynamic.get(), shape.shared_bytes);
  }
}

inline void Machine::abandon(const std::string& message) {
  for (std::size_t i = 0; i < resident_; ++i) {
    for (const Thread& thread : blocks_[i].threads) {
      if (thread.state != Thread::Exited && thread.fiber != nullptr) fibers_.give_back_unfinished(thread.fiber);
    }
  }
  release_memory();
  throw Error(message);
}

// Who waits where.
inline std::string Machine::stuck() const {
  std::string result = "threads wait for others that never come:";
  for (std::size_t i = 0; i < resident_; ++i) {
    std::map<std::string, std::vector<unsigned>> groups;
    for (const Thread& thread : blocks_[i].threads) {
      groups[thread.state == Thread::Exited ? "have returned" : "wait in " + thread.site.text()].push_back(thread.rank);
    }
    result += "\n  block " + text(blocks_[i].index);
    for (const auto& [what, ranks] : groups) {
      result += "\n    " + std::to_string(ranks.size()) + " threads (" + std::to_string(ranks.front()) + " to " +
                std::to_string(ranks.back()) + ") " + what;
    }
  }
  return result;
}

inline void Machine::run(const Launch& launched, const void* name, void (*call)(const void*), const void* kernel) {
  static thread_local bool inside = false;
  if (inside) throw Error("a launch inside of a kernel");
  // Several threads of the host may launch, as autograd's do: one after the other.
  const std::lock_guard lock(mutex_);
  struct Inside {
    Inside() { inside = true; }
    ~Inside() { inside = false; }
  } now;
  shape = launched;
  check();
  ++launches[name];
  call_ = call;
  kernel_ = kernel;
  error_.clear();
  variables_.clear();
  static_bytes_ = 0;
  blockDim = shape.threads;
  gridDim = shape.blocks;
#ifdef __SANITIZE_THREAD__
  host_.tsan_fiber = __tsan_get_current_fiber();
#endif
  release(&started_);
  {
    Hidden hidden;
    const unsigned in_cluster = shape.cluster_blocks;
    const auto blocks = std::size_t(shape.blocks.x) * shape.blocks.y * shape.blocks.z, clusters = blocks / in_cluster;
    const auto together = std::max<std::size_t>(1, schedule.resident_blocks() / in_cluster);
    std::vector<unsigned> ranks(clusters);
    for (std::size_t i = 0; i < clusters; ++i) ranks[i] = unsigned(i);
    schedule.shuffle(ranks);
    for (std::size_t first = 0; first < clusters; first += together) {
      const auto count = std::min(together, clusters - first);
      std::vector<Cluster> resident(count);
      resident_ = count * in_cluster;
      while (blocks_.size() < resident_) blocks_.emplace_back();
      for (std::size_t i = 0; i < resident_; ++i) {
        const unsigned rank = ranks[first + i / in_cluster] * in_cluster + unsigned(i % in_cluster);
        const dim3& size = shape.blocks;
        Block& block = blocks_[i];
        block.index = {rank % size.x, rank / size.x % size.y, rank / size.x / size.y};
        block.cluster = &resident[i / in_cluster];
        block.cluster->blocks.push_back(&block);
        start(block);
      }
      run_resident();
    }
  }
  acquire(&finished_);
}

inline std::size_t Machine::shared_variable(const void* key, std::size_t bytes, std::size_t alignment) {
  const auto found = variables_.find(key);
  if (found != variables_.end()) return found->second;
  // Space in between, which AddressSanitizer guards.
  const std::size_t gap = 32, offset = (static_bytes_ + gap + alignment - 1) / alignment * alignment;
  if (offset + bytes > static_capacity) fail({"shared", 0, "", 0}, "asks for more than 48 KiB of static shared memory");
  variables_.emplace(key, offset);
  static_bytes_ = offset + bytes;
  for (std::size_t i = 0; i < resident_; ++i) {
    char* memory = blocks_[i].statics.get() + offset;
    allow(memory, bytes);
    std::memset(memory, 0xff, bytes);
  }
  return offset;
}

// The block's variable of this type and name.
template <class T, class Name>
T& shared_variable() {
  static const char key = 0;
  std::size_t offset;
  {
    Hidden hidden;
    offset = machine.shared_variable(&key, sizeof(T), std::max<std::size_t>(alignof(T), 16));
  }
  char* variable = self().block->statics.get() + offset;
  allow(variable, sizeof(T));
  return *reinterpret_cast<T*>(variable);
}

// The shared memory that the launch asked for.
inline void* dynamic_shared() { return self().block->dynamic.get(); }

struct Unordered {  // warp exchanges do not order memory accesses
  static void release(char*) {}
  static void acquire(char*) {}
};
struct Ordered {
  static void release(char* clock) { emulation::release(clock); }
  static void acquire(char* clock) { emulation::acquire(clock); }
};

// Waits until as many threads as expected have come; the last one of them completes what they came for.
template <class Order, class Complete>
void gather(Gathering& gathering, std::size_t expected, const Site& site, Complete complete) {
  Hidden hidden;
  Thread& thread = self();
  auto& threads = gathering.threads;
  if (!threads.empty() && !(threads.front()->site == site)) {
    machine.fail(site, "comes while others wait in", &threads.front()->site);
  }
  char* clock = &gathering.clocks[gathering.phase];
  Order::release(clock);
  thread.site = site;
  thread.state = Thread::Waiting;
  threads.push_back(&thread);
  if (threads.size() == expected) {
    complete(threads);
    for (Thread* other : threads) machine.wake(*other);
    threads.clear();
    gathering.phase = !gathering.phase;
  }
  machine.wait(thread);
  Order::acquire(clock);
}

// A block's barrier, with the number of threads whose predicate holds.
inline unsigned block_barrier(bool predicate, const Site& site) {
  Thread& thread = self();
  {
    Hidden hidden;
    thread.votes = predicate;
  }
  gather<Ordered>(thread.block->barrier, thread.block->threads.size(), site, [](const std::vector<Thread*>& threads) {
    unsigned count = 0;
    for (const Thread* other : threads) count += other->votes;
    for (Thread* other : threads) other->votes = count;
    machine.reshuffle();
  });
  Hidden hidden;
  return thread.votes;
}

// Gives a value to the lanes of the mask, takes that of one of them, and learns who gave a value other than zero.
template <class Order = Unordered, class T>
T exchange(T value, unsigned source, const Site& site, unsigned* votes = nullptr) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(Thread::given));
  Hidden hidden;
  Thread& thread = self();
  if ((site.mask >> thread.lane & 1) == 0) machine.fail(site, "is called by a lane that is not in its mask");
  if ((site.mask >> source & 1) == 0) machine.fail(site, "reads a lane that is not in its mask");
  std::memcpy(thread.given, &value, sizeof value);
  thread.source = source;
  thread.votes = value != T();
  const unsigned lanes = ~site.mask == 0 ? 32 : __builtin_popcount(site.mask);
  gather<Order>(thread.warp->gatherings[site.mask], lanes, site, [](const std::vector<Thread*>& threads) {
    unsigned votes = 0;
    for (const Thread* other : threads) votes |= other->votes << other->lane;
    for (Thread* other : threads) {
      std::memcpy(other->taken, other->warp->threads[other->source].given, sizeof other->taken);
      other->votes = votes;
    }
  });
  if (votes != nullptr) *votes = thread.votes;
  std::memcpy(&value, thread.taken, sizeof value);
  return value;
}

// The same number for all lanes of a mask: merge(a, b) of all that they give.
template <class T, class Merge>
T reduce(T value, const Site& site, Merge merge) {
  Hidden hidden;
  Thread& thread = self();
  if ((site.mask >> thread.lane & 1) == 0) machine.fail(site, "is called by a lane that is not in its mask");
  std::memcpy(thread.given, &value, sizeof value);
  const unsigned lanes = ~site.mask == 0 ? 32 : __builtin_popcount(site.mask);
  gather<Unordered>(thread.warp->gatherings[site.mask], lanes, site, [&](const std::vector<Thread*>& threads) {
    T all, other;
    std::memcpy(&all, threads.front()->given, sizeof all);
    for (const Thread* one : threads) {
      std::memcpy(&other, one->given, sizeof other);
      all = merge(all, other);
    }
    for (Thread* one : threads) std::memcpy(one->taken, &all, sizeof all);
  });
  std::memcpy(&value, thread.taken, sizeof value);
  return value;
}

inline void named_barrier(unsigned number, unsigned threads, const Site& site) {
  Block& block = *self().block;
  if (number == 0 || number > 15) machine.fail(site, "has a number that is not from 1 to 15");
  gather<Ordered>(block.named[number], threads, site, [](auto&) { machine.reshuffle(); });
}

inline Mbarrier& find_mbarrier(const void* address, const Site& site) {
  Hidden hidden;
  const auto found = machine.mbarriers.find(address);
  if (found == machine.mbarriers.end()) machine.fail(site, "is of a barrier that has not been initialized");
  return found->second;
}

inline void make_mbarrier(const void* address, unsigned arrivals, const Site& site) {
  Hidden hidden;
  if (arrivals == 0) machine.fail(site, "expects nobody");
  if (machine.mbarriers.count(address) != 0) machine.fail(site, "is of a barrier that has been initialized");
  Mbarrier& barrier = machine.mbarriers[address];
  barrier.expected = barrier.pending = arrivals;
}

inline void settle(Mbarrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  ++barrier.phase;
  barrier.pending = barrier.expected;
  for (Thread* thread : barrier.waiting) machine.wake(*thread);
  barrier.waiting.clear();
  machine.reshuffle();
}

// Announces bytes that will come, if any, and arrives.
inline void arrive_at_mbarrier(const void* address, long long bytes, const Site& site) {
  Mbarrier& barrier = find_mbarrier(address, site);
  release(&barrier.clocks[barrier.phase % 2]);
  Hidden hidden;
  if (barrier.pending == 0) machine.fail(site, "comes when all have arrived");
  barrier.bytes += bytes;
  --barrier.pending;
  settle(barrier);
}

inline void bytes_have_come(const void* address, long long bytes) {
  Mbarrier& barrier = machine.mbarriers.at(address);
  barrier.bytes -= bytes;
  settle(barrier);
}

// Until the phase of that parity is not the current one.
inline void wait_for_mbarrier(const void* address, unsigned parity, const Site& site) {
  Mbarrier& barrier = find_mbarrier(address, site);
  {
    Hidden hidden;
    Thread& thread = self();
    if (barrier.phase % 2 == parity) {
      thread.site = site;
      thread.state = Thread::Waiting;
      barrier.waiting.push_back(&thread);
      machine.wait(thread);
    }
  }
  acquire(&barrier.clocks[parity]);
}

inline void check_copy(const void* to, const void* from, std::size_t bytes, const Site& site) {
  const auto aligned = [](const void* address) { return reinterpret_cast<std::uintptr_t>(address) % 16 == 0; };
  if (!aligned(to) || !aligned(from)) machine.fail(site, "has a misaligned address");
  if (bytes == 0 || bytes % 16 != 0) machine.fail(site, "copies a number of bytes that is not a multiple of 16");
}

// Into shared memory; the barrier gets to know of the bytes.
inline void bulk_load(void* to, const void* from, std::size_t bytes, const void* address, const Site& site) {
  Hidden hidden;
  check_copy(to, from, bytes, site);
  find_mbarrier(address, site);
  machine.operations.push_back({self().block, nullptr, 0, [=] {
                                  std::memcpy(to, from, bytes);
                                  bytes_have_come(address, static_cast<long long>(bytes));
                                }});
}

// Reads no more than a prefetch may: the sanitizers see it.
inline void bulk_prefetch(const void* from, std::size_t bytes, const Site& site) {
  check_copy(from, from, bytes, site);
  std::vector<char> read(bytes);
  std::memcpy(read.data(), from, bytes);
}

// Out of shared memory, which is read late, in a group of this thread.
inline void bulk_store(void* to, const void* from, std::size_t bytes, const Site& site) {
  Hidden hidden;
  check_copy(to, from, bytes, site);
  const Thread& thread = self();
  const auto* first = static_cast<const char*>(from);
  for (const Thread& other : thread.block->threads) {
    for (const auto& [written, size] : other.unfenced) {
      if (written < first + bytes && first < written + size) {
        machine.fail(site, "copies what has been written without a fence for the copy engine");
      }
    }
  }
  machine.operations.push_back({thread.block, &thread, thread.group, [=] { std::memcpy(to, from, bytes); }});
}

inline void commit_bulk_stores() { ++self().group; }

// Until at most so many of this thread's latest groups are under way.
inline void wait_for_bulk_stores(unsigned groups) {
  Hidden hidden;
  const Thread& thread = self();
  for (;;) {
    std::vector<std::size_t> old;
    for (std::size_t i = 0; i < machine.operations.size(); ++i) {
      const auto& operation = machine.operations[i];
      if (operation.owner == &thread && operation.group + groups < thread.group) old.push_back(i);
    }
    if (old.empty()) return;
    machine.perform(old[schedule.shuffled() ? schedule.random() % old.size() : 0]);
  }
}

// A write into shared memory that a bulk store will read.
inline void note_write(const void* address, std::size_t bytes) {
  Hidden hidden;
  self().unfenced.emplace_back(static_cast<const char*>(address), bytes);
}
inline void fence_for_bulk_stores() {
  Hidden hidden;
  self().unfenced.clear();
}

// Eight bytes into the shared memory of a block of the cluster; its barrier gets to know of them.
inline void store_async(void* to, std::uint64_t value, const void* address, const Block* block, const Site& site) {
  Hidden hidden;
  find_mbarrier(address, site);
  machine.operations.push_back({block, nullptr, 0, [=] {
                                  std::memcpy(to, &value, sizeof value);
                                  bytes_have_come(address, sizeof value);
                                }});
}

template <class T>
void check_alignment(const T* address, const Site& site) {
  if (reinterpret_cast<std::uintptr_t>(address) % sizeof(T) != 0) machine.fail(site, "has a misaligned address");
}

// CUDA's functions for the host. A launch ends with this error, where there is one; mistakes end with an Error instead.
inline cudaError_t refusal = cudaSuccess;
inline thread_local cudaError_t last_error = cudaSuccess;

inline cudaError_t get_last_error() { return std::exchange(last_error, cudaSuccess); }
inline const char* get_error_string(cudaError_t error) { return error == refusal ? "refused" : "unknown"; }

// What is compiled for another version is on another device, so that what was asked of one holds.
inline cudaError_t get_device(int* device) {
  *device = ptx_version;
  return cudaSuccess;
}

inline cudaError_t get_attributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  attributes->ptxVersion = ptx_version;
  attributes->binaryVersion = 90;
  return cudaSuccess;
}

inline cudaError_t set_attribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

// How many clusters a device holds at once.
inline int resident_clusters = 3;
inline cudaError_t max_active_clusters(int* clusters, const void*, const cudaLaunchConfig_t*) {
  *clusters = resident_clusters;
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t launch(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  if (refusal != cudaSuccess) return last_error = refusal;
  Launch shape{config->gridDim, config->blockDim, config->dynamicSmemBytes};
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const auto& attribute = config->attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension) shape.cluster_blocks = attribute.val.clusterDim.x;
  }
  const std::tuple<Parameters...> parameters(std::forward<Arguments>(arguments)...);
  const auto call = [&] { std::apply(kernel, parameters); };
  machine.run(
      shape, reinterpret_cast<const void*>(kernel),
      [](const void* lambda) { (*static_cast<decltype(&call)>(lambda))(); }, &call);
  return cudaSuccess;
}

// Adds the kernels that were launched to a file: library or program, offset in it (nm knows the name), and how often.
inline void write_launches(const char* path) {
  std::FILE* file = std::fopen(path, "a");
  if (file == nullptr) throw Error(std::string("cannot write ") + path);
  for (const auto& [kernel, count] : launches) {
    Dl_info object{};
    dladdr(kernel, &object);
    const auto offset = static_cast<const char*>(kernel) - static_cast<const char*>(object.dli_fbase);
    const std::unique_ptr<char, void (*)(void*)> name(realpath(object.dli_fname, nullptr), std::free);
    std::fprintf(file, "%s %zx %zu\n", name.get(), std::size_t(offset), count);
  }
  std::fclose(file);
}

}  // namespace emulation
