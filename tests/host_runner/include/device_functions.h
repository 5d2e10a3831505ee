// CUDA's arithmetic functions. Those that CUDA approximates are computed to float32 accuracy.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>
#include <limits>

namespace host_runner {

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

inline float rsqrt(float x) { return static_cast<float>(1 / sqrt(static_cast<double>(x))); }
inline float sinpi(float x) { return static_cast<float>(sin(M_PI * remainder(x, 2.0))); }
inline float cospi(float x) { return static_cast<float>(cos(M_PI * remainder(x, 2.0))); }

}  // namespace host_runner

// The C library declares some of these names, with C linkage or only in later versions.
#define __expf(x) ::expf(x)
#define __exp10f(x) ::exp10f(x)
#define __logf(x) ::logf(x)
#define __log2f(x) ::log2f(x)
#define __log10f(x) ::log10f(x)
#define __sinf(x) ::sinf(x)
#define __cosf(x) ::cosf(x)
#define __tanf(x) ::tanf(x)
#define __sincosf(x, sine, cosine) ::sincosf(x, sine, cosine)
#define __powf(x, y) ::powf(x, y)
#define rsqrtf(x) ::host_runner::rsqrt(x)
#define sinpif(x) ::host_runner::sinpi(x)
#define cospif(x) ::host_runner::cospi(x)

inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1 / a; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __frsqrt_rn(float a) { return rsqrtf(a); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __saturatef(float a) { return a > 0 ? fminf(a, 1) : 0; }

inline int __float_as_int(float a) { return host_runner::bit_cast<int>(a); }
inline unsigned __float_as_uint(float a) { return host_runner::bit_cast<unsigned>(a); }
inline float __int_as_float(int a) { return host_runner::bit_cast<float>(a); }
inline float __uint_as_float(unsigned a) { return host_runner::bit_cast<float>(a); }
inline long long __double_as_longlong(double a) { return host_runner::bit_cast<long long>(a); }
inline double __longlong_as_double(long long a) { return host_runner::bit_cast<double>(a); }

inline float __int2float_rn(int a) { return static_cast<float>(a); }
inline float __uint2float_rn(unsigned a) { return static_cast<float>(a); }
inline float __double2float_rn(double a) { return static_cast<float>(a); }

namespace host_runner {

// Outside the range the nearest integer, NaN to zero, as a GPU converts.
template <class Integer>
inline Integer saturate(float whole) {
  constexpr auto lowest = std::numeric_limits<Integer>::min();
  constexpr auto highest = std::numeric_limits<Integer>::max();
  if (!(whole == whole)) return 0;
  if (whole <= static_cast<float>(lowest)) return lowest;
  return whole >= static_cast<float>(highest) ? highest : static_cast<Integer>(whole);
}

}  // namespace host_runner

inline int __float2int_rn(float a) { return host_runner::saturate<int>(rintf(a)); }
inline int __float2int_rz(float a) { return host_runner::saturate<int>(truncf(a)); }
inline int __float2int_rd(float a) { return host_runner::saturate<int>(floorf(a)); }
inline int __float2int_ru(float a) { return host_runner::saturate<int>(ceilf(a)); }
inline unsigned __float2uint_rn(float a) { return host_runner::saturate<unsigned>(rintf(a)); }
inline unsigned __float2uint_rz(float a) { return host_runner::saturate<unsigned>(truncf(a)); }

inline int __popc(unsigned a) { return __builtin_popcount(a); }
inline int __popcll(unsigned long long a) { return __builtin_popcountll(a); }
inline int __clz(int a) { return a ? __builtin_clz(static_cast<unsigned>(a)) : 32; }
inline int __clzll(long long a) {
  return a ? __builtin_clzll(static_cast<unsigned long long>(a)) : 64;
}
inline int __ffs(int a) { return __builtin_ffs(a); }
inline int __ffsll(long long a) { return __builtin_ffsll(a); }
inline unsigned __brev(unsigned a) {
  unsigned reversed = 0;
  for (int bit = 0; bit < 32; ++bit) reversed |= (a >> bit & 1) << (31 - bit);
  return reversed;
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>((static_cast<std::uint64_t>(a) * b) >> 32);
}
inline int __mulhi(int a, int b) {
  return static_cast<int>((static_cast<std::int64_t>(a) * b) >> 32);
}
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>((static_cast<unsigned __int128>(a) * b) >> 64);
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  const std::uint64_t both = static_cast<std::uint64_t>(high) << 32 | low;
  return static_cast<unsigned>(both << (shift & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  const std::uint64_t both = static_cast<std::uint64_t>(high) << 32 | low;
  return static_cast<unsigned>(both >> (shift & 31));
}

// Caching hints change no value.
template <class T> inline T __ldg(const T* address) { return *address; }
template <class T> inline T __ldcg(const T* address) { return *address; }
template <class T> inline T __ldca(const T* address) { return *address; }
template <class T> inline T __ldcs(const T* address) { return *address; }
template <class T> inline void __stcg(T* address, T value) { *address = value; }
template <class T> inline void __stcs(T* address, T value) { *address = value; }
template <class T> inline void __stwt(T* address, T value) { *address = value; }

#define HOST_RUNNER_EXTREMES(T)                        \
  inline T min(T a, T b) { return b < a ? b : a; }     \
  inline T max(T a, T b) { return a < b ? b : a; }

HOST_RUNNER_EXTREMES(int)
HOST_RUNNER_EXTREMES(unsigned)
HOST_RUNNER_EXTREMES(long)
HOST_RUNNER_EXTREMES(unsigned long)
HOST_RUNNER_EXTREMES(long long)
HOST_RUNNER_EXTREMES(unsigned long long)

#undef HOST_RUNNER_EXTREMES

// As fminf: a NaN gives way to a number.
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
