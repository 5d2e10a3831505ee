// The instructions of csrc/mma.cuh, given matrices element by element as the PTX ISA places them.
#include "../../../csrc/launch.cuh"
#include "../../../csrc/mma.cuh"
#include "kernels.h"

namespace proof {
namespace {

// mma.m16n8k16 with elements of 16 bits: row and column of a_i, b_i and c_i, lane by lane.
template <class Element>
__global__ void multiply_halves_kernel(const unsigned short* __restrict__ a,  // [16, 16]
                                       const unsigned short* __restrict__ b,  // [16, 8]
                                       float* __restrict__ d) {               // [16, 8]
  const int group = threadIdx.x >> 2, in_group = threadIdx.x & 3;
  uint32_t a_registers[4] = {}, b_registers[2] = {};
  for (int i = 0; i < 8; ++i) {
    const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
    const int column = in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0);
    a_registers[i / 2] |= uint32_t{a[row * 16 + column]} << (16 * (i & 1));
  }
  for (int i = 0; i < 4; ++i) {
    const int row = in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0);
    b_registers[i / 2] |= uint32_t{b[row * 8 + group]} << (16 * (i & 1));
  }
  float c[4];
  for (int i = 0; i < 4; ++i) {
    c[i] = d[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)];
  }
  dpm::mma<Element>(c, a_registers, b_registers);
  for (int i = 0; i < 4; ++i) {
    d[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)] = c[i];
  }
}

// mma.m16n8k8 of tf32, whose operands are words.
__global__ void multiply_tf32_kernel(const float* __restrict__ a,  // [16, 8]
                                     const float* __restrict__ b,  // [8, 8]
                                     float* __restrict__ d) {      // [16, 8]
  const int group = threadIdx.x >> 2, in_group = threadIdx.x & 3;
  uint32_t a_registers[4], b_registers[2];
  for (int i = 0; i < 4; ++i) {
    const int row = i == 0 || i == 2 ? group : group + 8, column = in_group + (i < 2 ? 0 : 4);
    a_registers[i] = __float_as_uint(a[row * 8 + column]);
  }
  for (int i = 0; i < 2; ++i) {
    b_registers[i] = __float_as_uint(b[(in_group + 4 * i) * 8 + group]);
  }
  float c[4];
  for (int i = 0; i < 4; ++i) {
    c[i] = d[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)];
  }
  dpm::mma<float>(c, a_registers, b_registers);
  for (int i = 0; i < 4; ++i) {
    d[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)] = c[i];
  }
}

template <class Element>
__global__ void round_pairs_kernel(const float* __restrict__ x,  // [size], size even
                                   float* __restrict__ out,      // [2, size]
                                   int size) {
  for (int i = 2 * threadIdx.x; i < size; i += 2 * blockDim.x) {
    const dpm::Pair32 pair = dpm::unpack<Element>(dpm::pack<Element>(x[i], x[i + 1]));
    out[i] = __uint_as_float(dpm::tf32_of_float(x[i]));
    out[i + 1] = __uint_as_float(dpm::tf32_of_float(x[i + 1]));
    out[size + i] = pair.low;
    out[size + i + 1] = pair.high;
  }
}

}  // namespace

void multiply_halves(const unsigned short* a, const unsigned short* b, float* d, bool bfloat16) {
  const auto kernel =
      bfloat16 ? multiply_halves_kernel<dpm::bf16> : multiply_halves_kernel<dpm::f16>;
  dpm::launch("multiply_halves", kernel, 1, 32, 0, nullptr, a, b, d);
}

void multiply_tf32(const float* a, const float* b, float* d) {
  dpm::launch("multiply_tf32", multiply_tf32_kernel, 1, 32, 0, nullptr, a, b, d);
}

void round_pairs(const float* x, float* out, int size, bool bfloat16) {
  const auto kernel = bfloat16 ? round_pairs_kernel<dpm::bf16> : round_pairs_kernel<dpm::f16>;
  dpm::launch("round_pairs", kernel, 1, 32, 0, nullptr, x, out, size);
}

}  // namespace proof
