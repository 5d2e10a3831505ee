// Sums over the threads of a block, in a fixed order: two runs give equal bits.
#pragma once

namespace dpm {

constexpr unsigned kWholeWarp = 0xffffffffu;

// Sums of each value over a block of kThreads, a multiple of 32; thread 0 has them in `values`.
template <int kThreads, int kCount>
__device__ __forceinline__ void block_sum(double (&values)[kCount]) {
  constexpr int kWarps = kThreads / 32;
  __shared__ double partial[kWarps][kCount];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    double sum = values[k];
    for (int offset = 16; offset > 0; offset /= 2) {
      sum += __shfl_down_sync(kWholeWarp, sum, offset);
    }
    if (lane == 0) partial[warp][k] = sum;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      double sum = partial[0][k];
      for (int w = 1; w < kWarps; ++w) sum += partial[w][k];
      values[k] = sum;
    }
  }
}

}  // namespace dpm
