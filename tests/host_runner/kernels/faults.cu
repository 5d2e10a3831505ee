// Kernels that are wrong, each in one way.
#include "../../../csrc/launch.cuh"
#include "kernels.h"

#include <cstring>
#include <stdexcept>

namespace proof {
namespace {

constexpr int kBlock = 64;

__global__ void barrier_after_exit(float*) {
  if (threadIdx.x >= 60) return;
  __syncthreads();
}

__global__ void two_barriers(float* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
    out[0] = 1;
  } else {
    __syncthreads();
    out[1] = 1;
  }
}

__global__ void barrier_against_shuffle(float* out) {
  if (threadIdx.x == 5) {
    __syncthreads();
  } else {
    out[0] = __shfl_xor_sync(0xffffffff, out[0], 1);
  }
}

__global__ void lane_outside_its_mask(float* out) {
  out[0] = __shfl_sync(0x0000ffff, out[0], 0);
}

__global__ void width_of_three(float* out) { out[0] = __shfl_sync(0xffffffff, out[0], 0, 3); }

__global__ void index_out_of_bounds(float* out) {
  __shared__ float tile[kBlock];
  tile[threadIdx.x + 1] = 1;
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x];
}

__global__ void misaligned(float* out) {
  *reinterpret_cast<float4*>(out + 4 * threadIdx.x + 1) = make_float4(0, 0, 0, 0);
}

__global__ void past_dynamic_shared(float* out) {
  dpm::dynamic_shared<float>()[threadIdx.x] = out[0];
}

// Found by AddressSanitizer alone: beyond `out` lies memory of others.
__global__ void past_the_tensor(float* out) {
  __syncthreads();
  out[threadIdx.x + 1] = 0;
}

__global__ void uninitialized_kernel(float* __restrict__ out, int num_terms) {
  __shared__ float tile[kBlock];
  float sum;
  for (int i = 0; i < num_terms; ++i) sum += i;
  if (num_terms == 0) tile[threadIdx.x] = sum;
  out[threadIdx.x] = tile[threadIdx.x];
  out[kBlock + threadIdx.x] = sum;
}

struct Fault {
  const char* name;
  void (*kernel)(float*);
};

constexpr Fault kFaults[] = {
    {"barrier_after_exit", barrier_after_exit},
    {"two_barriers", two_barriers},
    {"barrier_against_shuffle", barrier_against_shuffle},
    {"lane_outside_its_mask", lane_outside_its_mask},
    {"width_of_three", width_of_three},
    {"index_out_of_bounds", index_out_of_bounds},
    {"misaligned", misaligned},
    {"past_dynamic_shared", past_dynamic_shared},
    {"past_the_tensor", past_the_tensor},
};

}  // namespace

void fault(const char* name, float* out) {
  for (const Fault& fault : kFaults) {
    if (std::strcmp(fault.name, name) == 0)
      return dpm::launch(name, fault.kernel, 2, kBlock, 32, nullptr, out);
  }
  throw std::invalid_argument(name);
}

void uninitialized(float* out) {
  dpm::launch("uninitialized", uninitialized_kernel, 1, kBlock, 0, nullptr, out, 1);
}

}  // namespace proof
