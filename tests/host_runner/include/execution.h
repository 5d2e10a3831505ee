// What the threads of a block know and how they wait for each other.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "vector_types.h"

extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;
constexpr int warpSize = 32;

namespace host_runner {

// Threads meet only where they make the same call on the same line.
struct Site {
  const char* call;
  const char* file;
  int line;
};

// Returns when every thread of the block has come: the sum of what they brought.
std::uint64_t meet_block(std::uint64_t value, Site);

// Returns when every lane of `mask` that has not exited has come: what lane `source` brought
// (all ones if it did not come) or, for kBallot, the lanes that brought something other than zero.
constexpr int kBallot = -1;
std::uint64_t meet_warp(unsigned mask, std::uint64_t value, int source, Site);

// A float that is copied when this thread waits for its copies, and not before.
void copy_later(float* to, const float* from);
void wait_for_copies();

// Ends the launch with an error.
[[noreturn]] void fail(const char* what, Site);

inline int lane() {
  return static_cast<int>(
      (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % warpSize);
}

template <class T>
T shuffle(unsigned mask, T value, int source, int width, Site site) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8);
  if (width < 1 || width > warpSize || (width & (width - 1)) != 0)
    fail("the width must be a power of two up to 32", site);
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = meet_warp(mask, bits, source, site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace host_runner

#define HOST_RUNNER_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define HOST_RUNNER_SITE host_runner::Site{__func__, file, line}

inline void __syncthreads(HOST_RUNNER_HERE) { host_runner::meet_block(0, HOST_RUNNER_SITE); }

inline int __syncthreads_count(int predicate, HOST_RUNNER_HERE) {
  return static_cast<int>(host_runner::meet_block(predicate != 0, HOST_RUNNER_SITE));
}

inline int __syncthreads_or(int predicate, HOST_RUNNER_HERE) {
  return host_runner::meet_block(predicate != 0, HOST_RUNNER_SITE) != 0;
}

inline int __syncthreads_and(int predicate, HOST_RUNNER_HERE) {
  return host_runner::meet_block(predicate == 0, HOST_RUNNER_SITE) == 0;
}

inline void __syncwarp(unsigned mask = ~0u, HOST_RUNNER_HERE) {
  host_runner::meet_warp(mask, 0, host_runner::kBallot, HOST_RUNNER_SITE);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, HOST_RUNNER_HERE) {
  return static_cast<unsigned>(
      host_runner::meet_warp(mask, predicate != 0, host_runner::kBallot, HOST_RUNNER_SITE));
}

inline int __any_sync(unsigned mask, int predicate, HOST_RUNNER_HERE) {
  return host_runner::meet_warp(mask, predicate != 0, host_runner::kBallot, HOST_RUNNER_SITE) != 0;
}

inline int __all_sync(unsigned mask, int predicate, HOST_RUNNER_HERE) {
  return host_runner::meet_warp(mask, predicate == 0, host_runner::kBallot, HOST_RUNNER_SITE) == 0;
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, HOST_RUNNER_HERE) {
  const int first = host_runner::lane() & -width;
  source = first | (source & (width - 1));
  return host_runner::shuffle(mask, value, source, width, HOST_RUNNER_SITE);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, HOST_RUNNER_HERE) {
  const int lane = host_runner::lane(), first = lane & -width;
  const bool inside = delta <= static_cast<unsigned>(lane - first);
  const int source = inside ? lane - static_cast<int>(delta) : lane;
  return host_runner::shuffle(mask, value, source, width, HOST_RUNNER_SITE);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                   HOST_RUNNER_HERE) {
  const int lane = host_runner::lane(), last = lane | (width - 1);
  const bool inside = delta <= static_cast<unsigned>(last - lane);
  const int source = inside ? lane + static_cast<int>(delta) : lane;
  return host_runner::shuffle(mask, value, source, width, HOST_RUNNER_SITE);
}

// A lane may look into an earlier segment of `width` lanes but not into a later one.
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize, HOST_RUNNER_HERE) {
  const int lane = host_runner::lane(), last = lane | (width - 1);
  const int source = (lane ^ lane_mask) <= last ? lane ^ lane_mask : lane;
  return host_runner::shuffle(mask, value, source, width, HOST_RUNNER_SITE);
}

#undef HOST_RUNNER_HERE
#undef HOST_RUNNER_SITE

// One thread runs at a time, so memory is always in order and every access is atomic. Threads and
// blocks that spin until another one writes never end here. No atomics on floats: their order, and
// with it the last bits, would differ between runs on a GPU.
inline void __threadfence_block() {}
inline void __threadfence() {}
inline void __threadfence_system() {}

#define HOST_RUNNER_ATOMICS(T)                                                                \
  inline T atomicAdd(T* address, T value) { return std::exchange(*address, *address + value); } \
  inline T atomicMax(T* address, T value) {                                                   \
    return std::exchange(*address, *address < value ? value : *address);                      \
  }                                                                                           \
  inline T atomicMin(T* address, T value) {                                                   \
    return std::exchange(*address, value < *address ? value : *address);                      \
  }                                                                                           \
  inline T atomicExch(T* address, T value) { return std::exchange(*address, value); }         \
  inline T atomicCAS(T* address, T compare, T value) {                                        \
    return std::exchange(*address, *address == compare ? value : *address);                   \
  }

HOST_RUNNER_ATOMICS(unsigned)
HOST_RUNNER_ATOMICS(unsigned long long)

#undef HOST_RUNNER_ATOMICS

inline int atomicAdd(int* address, int value) {
  return static_cast<int>(
      atomicAdd(reinterpret_cast<unsigned*>(address), static_cast<unsigned>(value)));
}
