// kernels [FILTER...] [--quick] [--shapes] [--json FILE] [--list]
//
// Runs the cases whose names have one of the filters in them, checks each one's results against float64, and times it
// on the stream, with what lies in the L2 cache thrown out before. Prints milliseconds, what has to be moved at least
// in GB/s and in percent of what a copy on this device moves, the error in units of what is allowed, and the kernels
// with their registers. --shapes tries every way to spread the rows over threads. --spoil damages results before they
// are checked: every case has to notice.
#include <algorithm>
#include <chrono>
#include <fstream>
#include <sstream>

#include "bench.h"
#ifdef __CUDACC__
#include <cxxabi.h>
#endif

namespace masked_loss::cuda::bench {
namespace {

struct Settings {
  std::vector<std::string> filters;
  std::string json;
  int repeats = 12;
  bool shapes = false, list = false, spoil = false;
};

struct Kernel {
  std::string name;
  int registers;
  unsigned blocks, threads;
  std::size_t shared;
};

struct Measured {
  double ms = 0;
  std::vector<Kernel> kernels;
};

#ifdef __CUDACC__
constexpr std::size_t kFlushed = std::size_t(1) << 28;  // more than L2 holds

class Event {
 public:
  Event() { check(cudaEventCreate(&event_), "no event"); }
  ~Event() { cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  void record() { check(cudaEventRecord(event_, machine.stream), "an event was not recorded"); }
  double ms_since(const Event& begin) const {
    check(cudaEventSynchronize(event_), "a kernel failed");
    float ms = 0;
    check(cudaEventElapsedTime(&ms, begin.event_, event_), "events were not recorded");
    return ms;
  }

 private:
  cudaEvent_t event_;
};

// Without return type, namespaces and arguments.
std::string short_name(const char* mangled) {
  int status = 0;
  const std::unique_ptr<char, void (*)(void*)> text(abi::__cxa_demangle(mangled, nullptr, nullptr, &status), std::free);
  std::string name = status == 0 ? text.get() : mangled;
  for (const std::string dropped : {"(anonymous namespace)::", "masked_loss::cuda::", "masked_loss::", "void "}) {
    for (auto at = name.find(dropped); at != std::string::npos; at = name.find(dropped)) name.erase(at, dropped.size());
  }
  int depth = 0;
  for (std::size_t i = 0; i < name.size(); ++i) {
    depth += (name[i] == '<') - (name[i] == '>');
    if (name[i] == '(' && depth == 0 && i > 0) return name.substr(0, i);
  }
  return name;
}

// What a call launches: it is recorded, not run.
std::vector<Kernel> kernels_of(const std::function<void(cudaStream_t)>& call) {
  cudaGraph_t graph = nullptr;
  check(cudaStreamBeginCapture(machine.stream, cudaStreamCaptureModeThreadLocal), "no capture");
  call(machine.stream);
  check(cudaStreamEndCapture(machine.stream, &graph), "a call cannot be captured");
  std::size_t count = 0;
  check(cudaGraphGetNodes(graph, nullptr, &count), "no nodes");
  std::vector<cudaGraphNode_t> nodes(count);
  check(cudaGraphGetNodes(graph, nodes.data(), &count), "no nodes");
  std::vector<Kernel> kernels;
  for (const auto node : nodes) {
    cudaGraphNodeType type;
    check(cudaGraphNodeGetType(node, &type), "no type");
    if (type != cudaGraphNodeTypeKernel) continue;
    cudaKernelNodeParams params{};
    cudaFuncAttributes attributes{};
    const char* name = nullptr;
    check(cudaGraphKernelNodeGetParams(node, &params), "no parameters");
    check(cudaFuncGetAttributes(&attributes, params.func), "no attributes");
    check(cudaFuncGetName(&name, params.func), "no name");
    kernels.push_back({short_name(name), attributes.numRegs, params.gridDim.x * params.gridDim.y * params.gridDim.z,
                       params.blockDim.x, params.sharedMemBytes + attributes.sharedSizeBytes});
  }
  cudaGraphDestroy(graph);
  return kernels;
}

// The median. While the cache is being flushed the host is ahead: between the events there is the device's time alone.
// What is over at once is called several times.
double time_of(const std::function<void(cudaStream_t)>& call, int repeats, bool tiny) {
  static const Array<char> flushed(kFlushed);
  static Event begin, end;
  const int calls = tiny ? 10 : 1;
  std::vector<double> times;
  for (int i = 0; i < repeats; ++i) {
    check(cudaMemsetAsync(flushed.data(), i, kFlushed, machine.stream), "memory was not set");
    begin.record();
    for (int k = 0; k < calls; ++k) call(machine.stream);
    end.record();
    times.push_back(end.ms_since(begin) / calls);
  }
  std::nth_element(times.begin(), times.begin() + repeats / 2, times.end());
  return times[std::size_t(repeats) / 2];
}

Measured measure(const std::function<void(cudaStream_t)>& call, int repeats, bool tiny) {
  return {time_of(call, repeats, tiny), kernels_of(call)};
}

// In GB/s.
double copy_speed() {
  constexpr std::size_t bytes = std::size_t(1) << 30;
  const Array<char> from(bytes), to(bytes);
  const auto copy = [&](cudaStream_t stream) {
    check(cudaMemcpyAsync(to.data(), from.data(), bytes, cudaMemcpyDeviceToDevice, stream), "a copy failed");
  };
  return 2.0 * bytes / time_of(copy, 20, false) / 1e6;
}

std::string start() {
  cudaDeviceProp device{};
  check(cudaGetDeviceProperties(&device, 0), "no device");
  check(cudaStreamCreate(&machine.stream), "no stream");
  machine.multiprocessors = device.multiProcessorCount;
  return device.name;
}
void wait() { check(cudaStreamSynchronize(machine.stream), "a kernel failed"); }
#else
Measured measure(const std::function<void(cudaStream_t)>&, int, bool) { return {}; }
double copy_speed() { return 1; }
std::string start() { return "the emulation"; }
void wait() {}
#endif

struct Row {
  std::string name, shape;
  double bytes, error, share;
  Measured measured;
};

std::string json_of(const std::string& device, double copy, const std::vector<Row>& rows) {
  std::ostringstream out;
  out << "{\"device\": \"" << device << "\", \"copy_gb_s\": " << copy << ", \"cases\": [";
  const char* between = "";
  for (const auto& row : rows) {
    out << between << "\n {\"name\": \"" << row.name << "\", \"shape\": \"" << row.shape
        << "\", \"ms\": " << row.measured.ms << ", \"bytes\": " << row.bytes << ", \"share\": " << row.share
        << ", \"error\": " << (std::isfinite(row.error) ? row.error : -1) << ", \"kernels\": [";
    const char* comma = "";
    for (const auto& k : row.measured.kernels) {
      out << comma << "{\"name\": \"" << k.name << "\", \"registers\": " << k.registers << ", \"blocks\": " << k.blocks
          << ", \"threads\": " << k.threads << ", \"shared\": " << k.shared << "}";
      comma = ", ";
    }
    out << "]}";
    between = ",";
  }
  out << "\n]}\n";
  return out.str();
}

void print(const Row& row) {
  std::printf("%-46s %-26s %9.4f ms %7.0f GB/s %6.1f %% %8.2g%s", row.name.c_str(), row.shape.c_str(), row.measured.ms,
              row.measured.ms > 0 ? row.bytes / row.measured.ms / 1e6 : 0, 100 * row.share, row.error,
              row.error <= 1 ? "" : " WRONG");
  for (const auto& k : row.measured.kernels) {
    std::printf("  %s %dr %ux%u %zuK", k.name.c_str(), k.registers, k.blocks, k.threads, k.shared >> 10);
  }
  std::printf("\n");
  std::fflush(stdout);
}

Settings read_settings(int argc, char** argv) {
  Settings settings;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    if (word == "--quick") {
      settings.repeats = 4;
    } else if (word == "--shapes") {
      settings.shapes = true;
    } else if (word == "--list") {
      settings.list = true;
    } else if (word == "--spoil") {
      settings.spoil = true;
    } else if (word == "--json" && i + 1 < argc) {
      settings.json = argv[++i];
    } else if (word.rfind("--", 0) == 0) {
      throw std::invalid_argument("expected [FILTER...] [--quick] [--shapes] [--json FILE] [--list], got " + word);
    } else {
      settings.filters.push_back(word);
    }
  }
  return settings;
}

int run(const Settings& settings) {
  std::vector<Case> cases;
  for (const auto& of : {cross_entropy_cases(), softmax_cases(), element_cases(), reduction_cases()}) {
    for (const auto& one : of) {
      const auto& filters = settings.filters;
      const auto is_in = [&](const std::string& filter) { return one.name.find(filter) != std::string::npos; };
      if (filters.empty() || std::any_of(filters.begin(), filters.end(), is_in)) cases.push_back(one);
    }
  }
  if (settings.list) {
    for (const auto& one : cases) std::printf("%s\n", one.name.c_str());
    return 0;
  }
  const auto begin = std::chrono::steady_clock::now();
  const auto device = start();
  const double copy = copy_speed();
  std::printf("%s, %d multiprocessors, a copy moves %.0f GB/s\n", device.c_str(), machine.multiprocessors, copy);
  std::vector<Row> rows;
  int wrong = 0;
  for (const auto& one : cases) {
    Job job = one.make();
    std::vector<Variant> variants{{"", job.call}};
    if (settings.shapes) variants.insert(variants.end(), job.variants.begin(), job.variants.end());
    for (const auto& [what, call] : variants) {
      for (const auto& result : job.results) {
        if (!result.in_place) set_bytes(result.memory, 0xff, result.bytes);
      }
      Row row{one.name, what, job.bytes, 0, 0, {}};
      try {
        call(machine.stream);
        wait();
        for (const auto& result : job.results) {
          if (settings.spoil) set_bytes(result.memory, 0x7d, std::min<std::size_t>(result.bytes, 16));
        }
        row.error = job.error();
        row.measured = measure(call, settings.repeats, job.bytes < 1 << 22);
        if (row.measured.ms > 0) row.share = job.bytes / row.measured.ms / 1e6 / copy;
      } catch (const std::exception& error) {
        std::printf("%s %s: %s\n", one.name.c_str(), what.c_str(), error.what());
        row.error = std::numeric_limits<double>::infinity();
      }
      wrong += !(row.error <= 1);
      print(row);
      rows.push_back(row);
    }
  }
  if (!settings.json.empty()) std::ofstream(settings.json) << json_of(device, copy, rows);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
  std::printf("%zu cases, %d of them wrong, in %.1f s\n", rows.size(), wrong, seconds.count());
  return settings.spoil ? wrong != int(rows.size()) : wrong != 0;
}

}  // namespace
}  // namespace masked_loss::cuda::bench

int main(int argc, char** argv) {
  using namespace masked_loss::cuda::bench;
  try {
    return run(read_settings(argc, argv));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
}
