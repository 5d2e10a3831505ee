// Kernel launches: a CUDA error becomes an exception that names the kernel.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace dpm {

// Shared memory that a kernel gets without cudaFuncAttributeMaxDynamicSharedMemorySize.
constexpr std::size_t kDefaultSharedBytes = 48 * 1024;
constexpr int kReservedBytes = 1024;  // of shared memory, by the system for each block
constexpr unsigned kWholeWarp = 0xffffffffu;

inline void check_cuda(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next caller, torch perhaps, would report this error as its own
  throw std::runtime_error(what + ": " + cudaGetErrorString(error));
}

// Of the current device.
inline int device_attribute(cudaDeviceAttr name) {
  int device = 0, value = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
  return value;
}

inline std::string to_string(dim3 size) {
  return std::to_string(size.x) + "x" + std::to_string(size.y) + "x" + std::to_string(size.z);
}

// One thread for each of `count` items of each of `N`, or one block.
inline dim3 grid_of(int64_t N, int64_t count, int threads = 1) {
  constexpr int64_t kMaxBlocks = 0x7fffffff;
  if (count > 0 && N > kMaxBlocks * threads / count) {
    throw std::invalid_argument("a launch of " + std::to_string(N) + " x " + std::to_string(count) +
                                " exceeds 2**31 - 1 blocks: split the batch");
  }
  return dim3(static_cast<unsigned>((N * count + threads - 1) / threads));
}

// What happens while the kernel runs is reported by a later call, or under CUDA_LAUNCH_BLOCKING=1.
template <class... Parameters>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
            std::size_t shared_bytes, cudaStream_t stream,
            std::common_type_t<Parameters>... arguments) {
  cudaError_t error = cudaSuccess;
  if (shared_bytes > kDefaultSharedBytes) {
    // All that a block can have: another thread may set it for a larger launch of the same kernel.
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
  }
  if (error == cudaSuccess) {
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    error = cudaLaunchKernelEx(&config, kernel, arguments...);
  }
  if (error != cudaSuccess) {
    check_cuda(error, std::string(name) + " (grid " + to_string(grid) + ", block " +
                          to_string(block) + ", " + std::to_string(shared_bytes) +
                          " bytes of shared memory)");
  }
}

// The bytes that launch() was asked for, aligned to 128 bytes. The only `extern __shared__`.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char dynamic_shared_bytes[];
  return reinterpret_cast<T*>(dynamic_shared_bytes);
}

}  // namespace dpm
