// Runs a grid on one host thread: block after block, and in a block every thread as a fibre that
// goes on until it must wait for others. What CUDA leaves undefined is made to show: blocks, warps
// and lanes run in whatever order was asked for, shared memory starts as NaN, and threads that wait
// for each other in vain are an error.
#include <link.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <new>
#include <numeric>
#include <string>
#include <vector>

#include <cuda_runtime.h>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace {

constexpr int kMostThreads = 1024;
constexpr std::size_t kMostSharedBytes = 227 * 1024;  // compute capability 9.0
constexpr std::size_t kGuardBytes = 4096;

}  // namespace

namespace dpm {

// Declared `extern __shared__` in launch.cuh. The guard shows writes past what a launch asked for.
alignas(128) thread_local unsigned char dynamic_shared_bytes[kMostSharedBytes + kGuardBytes];

}  // namespace dpm

namespace host_runner {
namespace {

enum class Order { forward, reverse, shuffled };

enum class State { ready, waits_for_block, waits_for_warp, exited };

struct Fibre {
  unsigned char* stack = nullptr;
  bool started = false;
  jmp_buf context;

  uint3 index;
  State state;
  Site site;
  unsigned mask;
  int source;
  std::uint64_t value, result;
  std::vector<std::pair<float*, const float*>> copies;  // to and from, not made yet
};

struct Bytes {
  unsigned char *begin, *end;
};

std::mutex mutex;  // one launch at a time owns what follows
Order block_order, thread_order;
std::uint64_t seed, random_state;
std::array<Fibre, kMostThreads> fibres;
int num_threads;
Fibre* running;
jmp_buf scheduler;
Body body;
const void* closure;
std::string failure;
cudaError_t last_error = cudaSuccess;
std::map<const void*, int> granted_shared_bytes;
std::map<int, int> attributes = {
    {cudaDevAttrMaxThreadsPerBlock, kMostThreads},
    {cudaDevAttrMaxSharedMemoryPerBlock, 48 * 1024},
    {cudaDevAttrWarpSize, warpSize},
    {cudaDevAttrMultiProcessorCount, 4},
    {cudaDevAttrL2CacheSize, 50 << 20},
    {cudaDevAttrMaxThreadsPerMultiProcessor, 2048},
    {cudaDevAttrComputeCapabilityMajor, 9},
    {cudaDevAttrComputeCapabilityMinor, 0},
    {cudaDevAttrMaxSharedMemoryPerMultiprocessor, 228 * 1024},
    {cudaDevAttrMaxSharedMemoryPerBlockOptin, kMostSharedBytes},
};

// Fibres are made by ucontext and switched by setjmp and longjmp: swapcontext would make a system
// call each time, for a signal mask that never differs. AddressSanitizer is told of each switch.

#ifdef __SANITIZE_ADDRESS__
constexpr std::size_t kStackBytes = 512 * 1024;
const void* scheduler_stack;
std::size_t scheduler_stack_bytes;

void to_fibre(const Fibre& fibre) {
  __sanitizer_start_switch_fiber(nullptr, fibre.stack, kStackBytes);
}
void in_fibre() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
}
void to_scheduler() {
  __sanitizer_start_switch_fiber(nullptr, scheduler_stack, scheduler_stack_bytes);
}
void in_scheduler() { __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr); }
#else
constexpr std::size_t kStackBytes = 64 * 1024;
void to_fibre(const Fibre&) {}
void in_fibre() {}
void to_scheduler() {}
void in_scheduler() {}
#endif

void suspend() {
  to_scheduler();
  if (_setjmp(running->context) == 0) _longjmp(scheduler, 1);
  in_fibre();
}

void fibre_main() {
  in_fibre();
  for (;;) {  // once for each block
    running->copies.clear();
    body(closure);
    running->state = State::exited;
    suspend();
  }
}

void resume(Fibre& fibre) {
  static ucontext_t fresh;
  running = &fibre;
  threadIdx = fibre.index;
  to_fibre(fibre);
  if (_setjmp(scheduler) == 0) {
    if (fibre.started) _longjmp(fibre.context, 1);
    fibre.started = true;
    getcontext(&fresh);
    fresh.uc_stack.ss_sp = fibre.stack;
    fresh.uc_stack.ss_size = kStackBytes;
    fresh.uc_link = nullptr;
    makecontext(&fresh, fibre_main, 0);
    setcontext(&fresh);
  }
  in_scheduler();
  running = nullptr;
}

// A page that may not be touched lies below each stack.
void allocate_stack(Fibre& fibre) {
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  void* memory = mmap(nullptr, page + kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0) throw std::bad_alloc();
  fibre.stack = static_cast<unsigned char*>(memory) + page;
}

std::string text(uint3 v) {
  return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
}

std::string text(Site site) {
  const std::string file = site.file;
  return std::string(site.call) + " at " + file.substr(file.rfind('/') + 1) + ":" +
         std::to_string(site.line);
}

bool same(Site a, Site b) {
  return a.line == b.line && std::strcmp(a.call, b.call) == 0 && std::strcmp(a.file, b.file) == 0;
}

std::uint64_t random_bits() {  // splitmix64
  std::uint64_t z = random_state += 0x9e3779b97f4a7c15;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}

template <class Iterator>
void arrange(Iterator begin, Iterator end, Order order) {
  std::iota(begin, end, 0);
  if (order == Order::reverse) std::reverse(begin, end);
  if (order != Order::shuffled) return;
  for (auto left = end - begin; left > 1; --left)
    std::swap(begin[left - 1], begin[random_bits() % static_cast<std::uint64_t>(left)]);
}

// Lets lanes go on whose whole mask has come to the same place. False where there are none.
bool release_warp(Fibre* warp, int num_lanes) {
  bool released = false;
  for (int lane = 0; lane < num_lanes; ++lane) {
    if (warp[lane].state != State::waits_for_warp) continue;
    const auto [mask, site] = std::make_pair(warp[lane].mask, warp[lane].site);
    unsigned come = 0, ballot = 0;
    bool complete = true;
    for (int other = 0; other < num_lanes; ++other) {
      const Fibre& fibre = warp[other];
      if ((mask >> other & 1) == 0 || fibre.state == State::exited) continue;
      complete = complete && fibre.state == State::waits_for_warp && fibre.mask == mask &&
                 same(fibre.site, site);
      come |= 1u << other;
      ballot |= (fibre.value != 0 ? 1u : 0u) << other;
    }
    if (!complete) continue;
    for (int other = 0; other < num_lanes; ++other) {
      Fibre& fibre = warp[other];
      if ((come >> other & 1) == 0) continue;
      fibre.state = State::ready;
      if (fibre.source == kBallot) {
        fibre.result = ballot;
      } else {
        fibre.result = (come >> fibre.source & 1) != 0 ? warp[fibre.source].value : ~0ull;
      }
    }
    released = true;
  }
  return released;
}

// Runs a warp until none of its threads can go on without the rest of the block.
void run_warp(int first) {
  std::array<int, warpSize> lanes;
  const int num_lanes = std::min<int>(warpSize, num_threads - first);
  do {
    arrange(lanes.begin(), lanes.begin() + num_lanes, thread_order);
    for (int i = 0; i < num_lanes; ++i) {
      Fibre& fibre = fibres[static_cast<std::size_t>(first + lanes[i])];
      if (fibre.state == State::ready) resume(fibre);
      if (!failure.empty()) return;
    }
  } while (release_warp(&fibres[static_cast<std::size_t>(first)], num_lanes));
}

std::string who_waits_where() {
  std::map<std::string, int> places;
  for (int i = 0; i < num_threads; ++i) {
    const Fibre& fibre = fibres[static_cast<std::size_t>(i)];
    char mask[32] = "";
    if (fibre.state == State::waits_for_warp)
      std::snprintf(mask, sizeof(mask), " with mask 0x%08x", fibre.mask);
    ++places[fibre.state == State::exited ? "after the end" : "in " + text(fibre.site) + mask];
  }
  std::string result = "threads of block " + text(blockIdx) + " wait for each other in vain:";
  for (const auto& [place, count] : places)
    result += (result.back() == ':' ? " " : ", ") + std::to_string(count) + " " + place;
  return result;
}

void run_block() {
  for (int i = 0; i < num_threads; ++i) fibres[static_cast<std::size_t>(i)].state = State::ready;
  std::array<int, kMostThreads / warpSize> warps;
  const auto num_warps = (num_threads + warpSize - 1) / warpSize;
  const auto begin = fibres.begin(), end = begin + num_threads;
  for (;;) {
    arrange(warps.begin(), warps.begin() + num_warps, thread_order);
    for (int i = 0; i < num_warps; ++i) {
      run_warp(warps[static_cast<std::size_t>(i)] * warpSize);
      if (!failure.empty()) return;
    }
    const auto has_exited = [](const Fibre& fibre) { return fibre.state == State::exited; };
    if (std::all_of(begin, end, has_exited)) return;
    const auto has_come = [&](const Fibre& fibre) {
      return fibre.state == State::waits_for_block && same(fibre.site, begin->site);
    };
    if (!std::all_of(begin, end, has_come)) {
      failure = who_waits_where();
      return;
    }
    std::uint64_t sum = 0;
    std::for_each(begin, end, [&](const Fibre& fibre) { sum += fibre.value; });
    std::for_each(begin, end, [&](Fibre& fibre) {
      fibre.state = State::ready;
      fibre.result = sum;
    });
  }
}

// The thread-local segment of this library: dynamic shared memory and every __shared__ variable.
Bytes shared_segment() {
  Bytes segment{std::begin(dpm::dynamic_shared_bytes), std::end(dpm::dynamic_shared_bytes)};
  const auto visit = [](dl_phdr_info* info, std::size_t, void* found) {
    auto& segment = *static_cast<Bytes*>(found);
    const auto begin = static_cast<unsigned char*>(info->dlpi_tls_data);
    for (int i = 0; begin != nullptr && i < info->dlpi_phnum; ++i) {
      const auto end = begin + info->dlpi_phdr[i].p_memsz;
      if (info->dlpi_phdr[i].p_type != PT_TLS || segment.begin < begin || segment.end > end)
        continue;
      segment = {begin, end};
      return 1;
    }
    return 0;
  };
  dl_iterate_phdr(visit, &segment);
  return segment;
}

void poison(unsigned char* begin, unsigned char* end) {
  std::memset(begin, 0xff, static_cast<std::size_t>(end - begin));
}

void run_grid(std::size_t shared_bytes) {
  const Bytes segment = shared_segment();
  const auto dynamic = std::begin(dpm::dynamic_shared_bytes);
  const auto dynamic_end = std::end(dpm::dynamic_shared_bytes), rest = dynamic + shared_bytes;
  poison(segment.begin, segment.end);
#ifdef __SANITIZE_ADDRESS__
  __asan_poison_memory_region(rest, static_cast<std::size_t>(dynamic_end - rest));
#endif
  std::vector<std::uint64_t> blocks(std::uint64_t{gridDim.x} * gridDim.y * gridDim.z);
  arrange(blocks.begin(), blocks.end(), block_order);
  for (const std::uint64_t block : blocks) {
    blockIdx.x = static_cast<unsigned>(block % gridDim.x);
    blockIdx.y = static_cast<unsigned>(block / gridDim.x % gridDim.y);
    blockIdx.z = static_cast<unsigned>(block / gridDim.x / gridDim.y);
    poison(segment.begin, rest);
    poison(dynamic_end, segment.end);
    run_block();
    if (!failure.empty()) break;
  }
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(rest, static_cast<std::size_t>(dynamic_end - rest));
#endif
  const auto written = [](unsigned char byte) { return byte != 0xff; };
  if (failure.empty() && std::any_of(rest, rest + kGuardBytes, written))
    failure = "write past the dynamic shared memory that was asked for";
}

cudaError_t check(const cudaLaunchConfig_t& config, const void* kernel) {
  const dim3 grid = config.gridDim, block = config.blockDim;
  const std::uint64_t threads = std::uint64_t{block.x} * block.y * block.z;
  const bool grid_fits = grid.x >= 1 && grid.x <= 0x7fffffff && grid.y >= 1 && grid.y <= 0xffff &&
                         grid.z >= 1 && grid.z <= 0xffff;
  if (!grid_fits || threads < 1 || threads > kMostThreads || block.x > kMostThreads ||
      block.y > kMostThreads || block.z > 64)
    return cudaErrorInvalidConfiguration;
  const auto granted = granted_shared_bytes.find(kernel);
  const int limit = granted == granted_shared_bytes.end() ? 48 * 1024 : granted->second;
  return config.dynamicSmemBytes <= static_cast<std::size_t>(limit) ? cudaSuccess
                                                                    : cudaErrorInvalidValue;
}

}  // namespace

std::uint64_t meet_block(std::uint64_t value, Site site) {
  running->value = value;
  running->site = site;
  running->state = State::waits_for_block;
  suspend();
  return running->result;
}

std::uint64_t meet_warp(unsigned mask, std::uint64_t value, int source, Site site) {
  if ((mask >> lane() & 1) == 0) fail("the calling lane is not in its own mask", site);
  running->mask = mask;
  running->value = value;
  running->source = source;
  running->site = site;
  running->state = State::waits_for_warp;
  suspend();
  return running->result;
}

void copy_later(float* to, const float* from) { running->copies.emplace_back(to, from); }

void wait_for_copies() {
  for (const auto& [to, from] : running->copies) *to = *from;
  running->copies.clear();
}

void fail(const char* what, Site site) {
  if (running == nullptr) {  // host code of a .cu file
    std::fprintf(stderr, "%s: %s\n", text(site).c_str(), what);
    std::abort();
  }
  failure = std::string(what) + ", in " + text(site) + ", thread " + text(threadIdx) +
            " of block " + text(blockIdx);
  to_scheduler();
  _longjmp(scheduler, 1);
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, Body thread,
                   const void* thread_closure) {
  const std::lock_guard lock(mutex);
  failure.clear();
  last_error = check(config, kernel);
  if (last_error != cudaSuccess) return last_error;
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  body = thread;
  closure = thread_closure;
  random_state = seed;
  num_threads = static_cast<int>(blockDim.x * blockDim.y * blockDim.z);
  for (int i = 0; i < num_threads; ++i) {
    Fibre& fibre = fibres[static_cast<std::size_t>(i)];
    if (fibre.stack == nullptr) allocate_stack(fibre);
    const unsigned thread_number = static_cast<unsigned>(i);
    fibre.index = {thread_number % blockDim.x, thread_number / blockDim.x % blockDim.y,
                   thread_number / blockDim.x / blockDim.y};
  }
  run_grid(config.dynamicSmemBytes);
  if (!failure.empty()) {
    for (Fibre& fibre : fibres) fibre.started = false;  // some stand in the middle of the kernel
    last_error = cudaErrorLaunchFailure;
  }
  return last_error;
}

}  // namespace host_runner

using host_runner::last_error;

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorLaunchFailure: return host_runner::failure.c_str();
  }
  return "unrecognized error code";
}

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error; }

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  const int most = host_runner::attributes[cudaDevAttrMaxSharedMemoryPerBlockOptin];
  if (value < 0 || value > most) return last_error = cudaErrorInvalidValue;
  host_runner::granted_shared_bytes[kernel] = value;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  const auto found = host_runner::attributes.find(attribute);
  if (device != 0 || found == host_runner::attributes.end())
    return last_error = cudaErrorInvalidValue;
  *value = found->second;
  return cudaSuccess;
}

extern "C" {

void host_runner_set_order(int blocks, int threads, std::uint64_t seed) {
  host_runner::block_order = static_cast<host_runner::Order>(blocks);
  host_runner::thread_order = static_cast<host_runner::Order>(threads);
  host_runner::seed = seed;
}

void host_runner_set_attribute(int attribute, int value) {
  host_runner::attributes[attribute] = value;
}

#ifndef __SANITIZE_ADDRESS__
// Kernels are compiled with -fsanitize=alignment,bounds,...; instead of its library, these report.

struct Located {
  const char* file;
  std::uint32_t line, column;
};

static void report(const char* what, const Located* where) {
  host_runner::fail(what, {"the kernel", where->file, static_cast<int>(where->line)});
}

void __ubsan_handle_type_mismatch_v1(const Located* where, std::uintptr_t address) {
  report(address == 0 ? "access through a null pointer" : "misaligned access", where);
}
void __ubsan_handle_out_of_bounds(const Located* where, std::uintptr_t) {
  report("index out of bounds", where);
}
void __ubsan_handle_shift_out_of_bounds(const Located* where, std::uintptr_t, std::uintptr_t) {
  report("shift by a negative number or too far", where);
}
void __ubsan_handle_divrem_overflow(const Located* where, std::uintptr_t, std::uintptr_t) {
  report("division by zero or overflow in division", where);
}
#endif

}  // extern "C"
