// float16 as CUDA stores, rounds and widens it, NaN bits included.
#pragma once

#include <cuda_runtime.h>

namespace host_runner {

// Round to nearest even. 0.5f has the spacing of subnormal halves, so adding it rounds to them.
inline unsigned short half_bits(float value) {
  const unsigned bits = bit_cast<unsigned>(value);
  const unsigned sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  unsigned half;
  if (magnitude > 0x7f800000u) return 0x7fff;
  if (magnitude >= 0x47800000u) {  // 65536
    half = 0x7c00;
  } else if (magnitude < 0x38800000u) {  // 2^-14
    half = bit_cast<unsigned>(bit_cast<float>(magnitude) + 0.5f) - bit_cast<unsigned>(0.5f);
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13;
  }
  return static_cast<unsigned short>(sign | half);
}

inline float half_value(unsigned short half) {
  const unsigned sign = (half & 0x8000u) << 16, magnitude = half & 0x7fffu;
  if (magnitude > 0x7c00u) return bit_cast<float>(0x7fffffffu);
  if (magnitude == 0x7c00u) return bit_cast<float>(sign | 0x7f800000u);
  if (magnitude < 0x0400u) {
    const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
    return bit_cast<float>(sign | bit_cast<unsigned>(subnormal));
  }
  return bit_cast<float>(sign | ((magnitude << 13) + 0x38000000u));
}

}  // namespace host_runner

struct __half {
  unsigned short bits;
  __half() = default;
  __half(float value) : bits(host_runner::half_bits(value)) {}
  operator float() const { return host_runner::half_value(bits); }
};

using half = __half;

inline __half __float2half_rn(float value) { return {value}; }
inline __half __float2half(float value) { return {value}; }
inline float __half2float(__half value) { return value; }
inline unsigned short __half_as_ushort(__half value) { return value.bits; }
inline __half __ushort_as_half(unsigned short bits) {
  return host_runner::bit_cast<__half>(bits);
}

struct alignas(4) __half2 {
  __half x, y;
};

using half2 = __half2;

inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline __half2 __floats2half2_rn(float x, float y) { return {{x}, {y}}; }
inline __half2 __float22half2_rn(float2 value) { return {{value.x}, {value.y}}; }
inline float2 __half22float2(__half2 value) { return {value.x, value.y}; }
inline float __low2float(__half2 value) { return value.x; }
inline float __high2float(__half2 value) { return value.y; }
