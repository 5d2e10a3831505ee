// Instructions that C++ cannot say: the only inline PTX here. Each has a body for the host runner,
// which computes the same thing, and a test of that body (tests/test_mma.py).
//
// A warp multiplies matrices whose elements are spread over its lanes, packed into registers. With
// g = lane / 4 and t = lane % 4, register by register (PTX ISA, "Matrix fragments for mma"):
//   16-bit, D (16, 8) += A (16, 16) B (16, 8)
//     a: A[g][2t, 2t+1]  A[g+8][2t, 2t+1]  A[g][2t+8, 2t+9]  A[g+8][2t+8, 2t+9]
//     b: B[2t, 2t+1][g]  B[2t+8, 2t+9][g]
//   tf32, D (16, 8) += A (16, 8) B (8, 8)
//     a: A[g][t]  A[g+8][t]  A[g][t+4]  A[g+8][t+4]
//     b: B[t][g]  B[t+4][g]
//   both
//     d: D[g][2t]  D[g][2t+1]  D[g+8][2t]  D[g+8][2t+1]
#pragma once

#include <cuda_runtime.h>

#include "storage.h"

namespace dpm {

struct Pair32 {
  float low, high;
};

#if defined(__CUDACC__)

#define DPM_MMA(types)                                                              \
  asm volatile("mma.sync.aligned." types                                                     \
      " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"            \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                              \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

template <class Element>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<Element, bf16>) {
    DPM_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
  } else if constexpr (std::is_same_v<Element, f16>) {
    DPM_MMA("m16n8k16.row.col.f32.f16.f16.f32");
  } else {
    static_assert(std::is_same_v<Element, float>);
    DPM_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
  }
}

#undef DPM_MMA

// Rounded to the 10 bits of mantissa of tf32, ties away from zero; the other bits are 0.
__device__ __forceinline__ uint32_t tf32_of_float(float x) {
  uint32_t out;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(out) : "f"(x));
  return out;
}

// Two neighbors in 16 bits each, rounded to the nearest, ties to even.
template <class Element>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t out;
  if constexpr (std::is_same_v<Element, bf16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  }
  return out;
}

template <class Element>
__device__ __forceinline__ Pair32 unpack(uint32_t halves) {
  if constexpr (std::is_same_v<Element, bf16>) {
    return {__uint_as_float(halves << 16), __uint_as_float(halves & 0xffff0000u)};
  } else {
    Pair32 out;
    asm("{.reg .f16 low, high;\n"
        " mov.b32 {low, high}, %2;\n"
        " cvt.f32.f16 %0, low;\n"
        " cvt.f32.f16 %1, high;}"
        : "=f"(out.low), "=f"(out.high)
        : "r"(halves));
    return out;
  }
}

// A float from global to shared memory, which is there after wait_for_copies() and a barrier.
__device__ __forceinline__ void copy_later(float* shared, const float* from) {
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

#else

// Sums in the order of k, in float; a GPU's order is its own.
template <class Element>
inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static uint32_t of_lanes[32][6];  // no two warps of the runner are here at a time
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  memcpy(of_lanes[lane], a, sizeof(a));
  memcpy(of_lanes[lane] + 4, b, sizeof(b));
  __syncwarp();
  constexpr int kPacked = 4 / sizeof(Element), kHalf = 4 * kPacked;
  const auto element = [](uint32_t packed, int k) {
    if constexpr (kPacked == 1) {
      return bits<float>(packed & 0xffffe000u);  // what is below tf32 is not looked at
    } else {
      return to_float(Element{static_cast<uint16_t>(packed >> (16 * (k % kPacked)))});
    }
  };
  for (int i = 0; i < 4; ++i) {
    const int row_half = i / 2, column = 2 * t + i % 2;
    for (int k = 0; k < 2 * kHalf; ++k) {
      const int high = k / kHalf, holder = k % kHalf / kPacked;
      d[i] += element(of_lanes[4 * g + holder][2 * high + row_half], k) *
              element(of_lanes[4 * column + holder][4 + high], k);
    }
  }
  __syncwarp();
}

inline uint32_t tf32_of_float(float x) {
  return x == x ? (bits<uint32_t>(x) + 0x1000u) & 0xffffe000u : 0x7fffffffu;
}

template <class Element>
inline uint32_t pack(float low, float high) {
  return from_float<Element>(low).bits | uint32_t{from_float<Element>(high).bits} << 16;
}

template <class Element>
inline Pair32 unpack(uint32_t halves) {
  return {to_float(Element{static_cast<uint16_t>(halves)}),
          to_float(Element{static_cast<uint16_t>(halves >> 16)})};
}

inline void copy_later(float* shared, const float* from) { host_runner::copy_later(shared, from); }
inline void wait_for_copies() { host_runner::wait_for_copies(); }

#endif

// So many floats, by the threads of a block.
__device__ __forceinline__ void copy_later(float* shared, const float* from, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) copy_later(shared + i, from + i);
}

}  // namespace dpm
