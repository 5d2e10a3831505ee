// Threads of a block together, and blocks that must not depend on each other.
#include "../../../csrc/launch.cuh"
#include "kernels.h"

namespace proof {
namespace {

constexpr int kBlock = 256;

template <bool kBarriers>
__global__ void __launch_bounds__(kBlock) block_sum_kernel(const float* __restrict__ x,  // [B, 256]
                                                           float* __restrict__ out) {    // [B]
  __shared__ float sums[kBlock];
  const int i = threadIdx.x;
  sums[i] = __ldg(x + static_cast<int64_t>(blockIdx.x) * kBlock + i);
#pragma unroll
  for (int half = kBlock / 2; half > 0; half /= 2) {
    if (kBarriers) __syncthreads();
    if (i < half) sums[i] += sums[i + half];
  }
  if (i == 0) out[blockIdx.x] = sums[0];
}

__global__ void reverse_kernel(const float* __restrict__ x, float* __restrict__ out) {
  float* tile = dpm::dynamic_shared<float>();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x;
  tile[threadIdx.x] = x[first + threadIdx.x];
  __syncthreads();
  out[first + threadIdx.x] = tile[blockDim.x - 1 - threadIdx.x];
}

__global__ void count_kernel(const int* __restrict__ x, int* __restrict__ out) {
  const int nonzero = x[threadIdx.x] != 0;
  atomicAdd(out, nonzero);
  const int sum = __syncthreads_count(nonzero);
  const int any = __syncthreads_or(nonzero);
  const int all = __syncthreads_and(nonzero);
  if (threadIdx.x == 0) {
    out[1] = sum;
    out[2] = any != 0;
    out[3] = all != 0;
  }
}

__global__ void number_kernel(int* __restrict__ out) {
  const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const int i = thread + blockDim.x * blockDim.y * blockDim.z * block;
  out[i] = i;
}

__global__ void race_between_blocks_kernel(volatile int* out) {
  const int block = blockIdx.x;
  out[block] = (block == 0 ? 0 : out[block - 1]) + 1;
}

__global__ void __launch_bounds__(kBlock) many_barriers_kernel(int* __restrict__ out,
                                                               int num_barriers) {
  __shared__ int turns[2][kBlock];
  const int i = threadIdx.x;
  turns[0][i] = 0;
  for (int turn = 0; turn < num_barriers; ++turn) {
    __syncthreads();
    turns[~turn & 1][i] = turns[turn & 1][(i + 1) % kBlock] + 1;
  }
  out[static_cast<int64_t>(blockIdx.x) * kBlock + i] = turns[num_barriers & 1][i];
}

}  // namespace

void block_sum(const float* x, float* out, int num_blocks, bool barriers) {
  if (barriers) {
    dpm::launch("block_sum", block_sum_kernel<true>, num_blocks, kBlock, 0, nullptr, x, out);
  } else {
    dpm::launch("block_sum", block_sum_kernel<false>, num_blocks, kBlock, 0, nullptr, x, out);
  }
}

void reverse(const float* x, float* out, int num_blocks, int block, int64_t shared_bytes) {
  dpm::launch("reverse", reverse_kernel, num_blocks, block, shared_bytes, nullptr, x, out);
}

void count(const int* x, int* out, int num_threads) {
  dpm::launch("count", count_kernel, 1, num_threads, 0, nullptr, x, out);
}

void number(int* out, int grid_x, int grid_y, int grid_z, int block_x, int block_y, int block_z) {
  dpm::launch("number", number_kernel, dim3(grid_x, grid_y, grid_z),
              dim3(block_x, block_y, block_z), 0, nullptr, out);
}

void race_between_blocks(int* out, int num_blocks) {
  dpm::launch("race_between_blocks", race_between_blocks_kernel, num_blocks, 1, 0, nullptr, out);
}

void many_barriers(int* out, int num_blocks, int num_barriers) {
  dpm::launch("many_barriers", many_barriers_kernel, num_blocks, kBlock, 0, nullptr, out,
              num_barriers);
}

int num_multiprocessors() {
  int device = 0, number = 0;
  dpm::check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  dpm::check_cuda(cudaDeviceGetAttribute(&number, cudaDevAttrMultiProcessorCount, device),
                  "cudaDeviceGetAttribute");
  return number;
}

}  // namespace proof
