// bfloat16 as CUDA stores, rounds and widens it, NaN bits included.
#pragma once

#include <cuda_runtime.h>

namespace host_runner {

inline unsigned short bfloat16_bits(float value) {
  const unsigned bits = bit_cast<unsigned>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<unsigned short>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

inline float bfloat16_value(unsigned short bits) {
  return bit_cast<float>(static_cast<unsigned>(bits) << 16);
}

}  // namespace host_runner

struct __nv_bfloat16 {
  unsigned short bits;
  __nv_bfloat16() = default;
  __nv_bfloat16(float value) : bits(host_runner::bfloat16_bits(value)) {}
  operator float() const { return host_runner::bfloat16_value(bits); }
};

inline __nv_bfloat16 __float2bfloat16_rn(float value) { return {value}; }
inline __nv_bfloat16 __float2bfloat16(float value) { return {value}; }
inline float __bfloat162float(__nv_bfloat16 value) { return value; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) {
  return host_runner::bit_cast<__nv_bfloat16>(bits);
}

struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {{x}, {y}}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 value) { return {{value.x}, {value.y}}; }
inline float2 __bfloat1622float2(__nv_bfloat162 value) { return {value.x, value.y}; }
inline float __low2float(__nv_bfloat162 value) { return value.x; }
inline float __high2float(__nv_bfloat162 value) { return value.y; }
