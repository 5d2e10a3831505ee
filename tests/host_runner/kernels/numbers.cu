// Storage types and functions of one element.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../../../csrc/launch.cuh"
#include "kernels.h"

namespace proof {
namespace {

constexpr int kBlock = 256;

__device__ __forceinline__ void convert(float x, unsigned short& out, __half) {
  out = __half_as_ushort(__float2half_rn(x));
}
__device__ __forceinline__ void convert(unsigned short x, float& out, __half) {
  out = __half2float(__ushort_as_half(x));
}
__device__ __forceinline__ void convert(float x, unsigned short& out, __nv_bfloat16) {
  out = __bfloat16_as_ushort(__float2bfloat16_rn(x));
}
__device__ __forceinline__ void convert(unsigned short x, float& out, __nv_bfloat16) {
  out = __bfloat162float(__ushort_as_bfloat16(x));
}

template <class Storage, class From, class To>
__global__ void convert_kernel(const From* __restrict__ x, To* __restrict__ out, int64_t size) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
  if (i < size) convert(x[i], out[i], Storage());
}

__global__ void functions_kernel(const float* __restrict__ x, float* __restrict__ out,
                                 int64_t size) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
  if (i >= size) return;
  const float value = x[i], magnitude = fabsf(value);
  const float results[kNumFunctions] = {
      __expf(value),      exp2f(value),
      __logf(magnitude),  __log2f(magnitude),
      __sinf(value),      __cosf(value),
      rsqrtf(magnitude),  __frcp_rn(value),
      cospif(value),      __fmaf_rn(value, value, -1.0f),
  };
  for (int k = 0; k < kNumFunctions; ++k) out[k * size + i] = results[k];
}

__global__ void bit_functions_kernel(const unsigned* __restrict__ x, unsigned* __restrict__ out,
                                     int64_t size) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
  if (i >= size) return;
  const unsigned value = x[i];
  const unsigned results[kNumBitFunctions] = {
      __umulhi(value, 0xd2511f53u),
      static_cast<unsigned>(__popc(value)),
      static_cast<unsigned>(__clz(static_cast<int>(value))),
      static_cast<unsigned>(__ffs(static_cast<int>(value))),
      __brev(value),
      __float_as_uint(__uint_as_float(value)),
      __funnelshift_l(value, ~value, 7),
      static_cast<unsigned>(__float2int_rn(static_cast<float>(value))),
  };
  for (int k = 0; k < kNumBitFunctions; ++k) out[k * size + i] = results[k];
}

unsigned num_blocks(int64_t size) { return static_cast<unsigned>((size + kBlock - 1) / kBlock); }

template <class Storage, class From, class To>
void launch_convert(const char* name, const From* x, To* out, int64_t size) {
  dpm::launch(name, convert_kernel<Storage, From, To>, num_blocks(size), kBlock, 0, nullptr, x,
              out, size);
}

}  // namespace

void to_half(const float* x, unsigned short* out, int64_t size) {
  launch_convert<__half>("to_half", x, out, size);
}
void from_half(const unsigned short* x, float* out, int64_t size) {
  launch_convert<__half>("from_half", x, out, size);
}
void to_bfloat16(const float* x, unsigned short* out, int64_t size) {
  launch_convert<__nv_bfloat16>("to_bfloat16", x, out, size);
}
void from_bfloat16(const unsigned short* x, float* out, int64_t size) {
  launch_convert<__nv_bfloat16>("from_bfloat16", x, out, size);
}

void functions(const float* x, float* out, int64_t size) {
  dpm::launch("functions", functions_kernel, num_blocks(size), kBlock, 0, nullptr, x, out, size);
}

void bit_functions(const unsigned* x, unsigned* out, int64_t size) {
  dpm::launch("bit_functions", bit_functions_kernel, num_blocks(size), kBlock, 0, nullptr, x, out,
              size);
}

}  // namespace proof
