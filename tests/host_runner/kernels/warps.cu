// Lanes of a warp together.
#include "../../../csrc/launch.cuh"
#include "kernels.h"

namespace proof {
namespace {

constexpr unsigned kAllLanes = 0xffffffff;

template <class T>
__global__ void shuffle_kernel(const T* __restrict__ x,  // [n]
                               T* __restrict__ out,      // [4, n]
                               int width) {
  const int i = threadIdx.x, n = blockDim.x;
  const T value = x[i];
  out[i] = __shfl_sync(kAllLanes, value, 3, width);
  out[n + i] = __shfl_down_sync(kAllLanes, value, 3, width);
  out[2 * n + i] = __shfl_up_sync(kAllLanes, value, 3, width);
  out[3 * n + i] = __shfl_xor_sync(kAllLanes, value, 3, width);
}

// The halves of the warp vote apart, at the same call, and then meet.
__global__ void vote_kernel(const int* __restrict__ x, unsigned* __restrict__ out) {
  const int lane = threadIdx.x;
  const unsigned mask = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  const int nonzero = x[lane] != 0;
  const unsigned ballot = __ballot_sync(mask, nonzero);
  const int any = __any_sync(mask, nonzero), all = __all_sync(mask, nonzero);
  __syncwarp();
  out[lane] = ballot;
  out[warpSize + lane] = any != 0;
  out[2 * warpSize + lane] = all != 0;
}

__global__ void shuffle_from_exited_kernel(const float* __restrict__ x, float* __restrict__ out,
                                           int num_left) {
  const int lane = threadIdx.x;
  if (lane >= num_left) return;
  out[lane] = __shfl_down_sync(kAllLanes, x[lane], 1);
}

}  // namespace

template <class T>
void shuffle(const T* x, T* out, int num_threads, int width) {
  dpm::launch("shuffle", shuffle_kernel<T>, 1, num_threads, 0, nullptr, x, out, width);
}

template void shuffle(const int*, int*, int, int);
template void shuffle(const unsigned*, unsigned*, int, int);
template void shuffle(const float*, float*, int, int);
template void shuffle(const double*, double*, int, int);
template void shuffle(const long long*, long long*, int, int);

void vote(const int* x, unsigned* out) {
  dpm::launch("vote", vote_kernel, 1, 32, 0, nullptr, x, out);
}

void shuffle_from_exited(const float* x, float* out, int num_left) {
  dpm::launch("shuffle_from_exited", shuffle_from_exited_kernel, 1, 32, 0, nullptr, x, out,
              num_left);
}

}  // namespace proof
