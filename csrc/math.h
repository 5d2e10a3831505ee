// Elementary functions of float and f32x16: one sequence of operations for every lane of a CPU and
// for CUDA, without branches or calls. Double takes the functions of the C library.
//
// Errors bound those of every float where an error can be largest, measured on x86-64 with and
// without fused multiply-add; an ulp is the spacing of floats at the exact result. A NaN stays one.
#pragma once

#include <cmath>

#include "lanes.h"

namespace dpm {

// Of two numbers; a NaN passes if it is the first.
template <class T>
DPM_INLINE T min(T a, T b) {
  return select(b < a, b, a);
}
template <class T>
DPM_INLINE T max(T a, T b) {
  return select(a < b, b, a);
}

#if !defined(__CUDACC__)
// One instruction, of which the second operand is what the others above take when neither is less.
#if defined(__AVX512F__)
DPM_INLINE f32x16 min(f32x16 a, f32x16 b) { return _mm512_maskz_min_ps(0xffff, b, a); }
DPM_INLINE f32x16 max(f32x16 a, f32x16 b) { return _mm512_maskz_max_ps(0xffff, b, a); }
#elif defined(__AVX2__)
DPM_INLINE f32x16 min(f32x16 a, f32x16 b) {
  return {_mm256_min_ps(b.low, a.low), _mm256_min_ps(b.high, a.high)};
}
DPM_INLINE f32x16 max(f32x16 a, f32x16 b) {
  return {_mm256_max_ps(b.low, a.low), _mm256_max_ps(b.high, a.high)};
}
#endif
#endif

template <class T>
DPM_INLINE T abs(T x) {
  return bits<T>(bits<UnsignedOf<T>>(x) & 0x7fffffffu);
}
DPM_INLINE double abs(double x) { return std::fabs(x); }

// Correctly rounded, x >= 0.
DPM_INLINE float sqrt(float x) { return ::sqrtf(x); }
DPM_INLINE double sqrt(double x) { return ::sqrt(x); }

#if !defined(__CUDACC__)
template <class V>
DPM_INLINE V sqrt(V x) {
  for (unsigned i = 0; i < sizeof(V) / sizeof(float); ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
}
template <class V>
DPM_INLINE Pair<V> sqrt(Pair<V> x) {
  return {sqrt(x.low), sqrt(x.high)};
}
#endif

// a b + c, rounded once where the processor does that: written out where c is a product as well,
// of which a compiler would fuse now one and now the other.
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA) || defined(__CUDACC__)
DPM_INLINE float multiply_add(float a, float b, float c) { return ::fmaf(a, b, c); }
DPM_INLINE double multiply_add(double a, double b, double c) { return ::fma(a, b, c); }
#else
DPM_INLINE float multiply_add(float a, float b, float c) { return a * b + c; }
DPM_INLINE double multiply_add(double a, double b, double c) { return a * b + c; }
#endif

#if !defined(__CUDACC__)
template <class V>
DPM_INLINE V multiply_add(V a, V b, V c) {
  for (unsigned i = 0; i < sizeof(V) / sizeof(float); ++i) c[i] = multiply_add(a[i], b[i], c[i]);
  return c;
}
template <class V>
DPM_INLINE Pair<V> multiply_add(Pair<V> a, Pair<V> b, Pair<V> c) {
  return {multiply_add(a.low, b.low, c.low), multiply_add(a.high, b.high, c.high)};
}
#endif

// For CUDA, where sqrt and division are subroutines: relative error 2^-23, subnormal x is 0.
template <class T>
DPM_INLINE T sqrt_fast(T x) {
#if defined(__CUDA_ARCH__)
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(x) : "f"(x));
  return x;
#else
  return sqrt(x);
#endif
}

// For CUDA: 2 ulp for b in [2^-126, 2^126]. Elsewhere the quotient itself.
template <class T>
DPM_INLINE T divide_fast(T a, T b) {
#if defined(__CUDA_ARCH__)
  return __fdividef(a, b);
#else
  return a / b;
#endif
}
DPM_INLINE double divide_fast(double a, double b) { return a / b; }

// exp(x) = scale (1 + r + r^2 q(r)) with x = n ln 2 + r and scale = 2^n.
template <class T>
struct ExpReduction {
  T r, scale;
};

// For x in [-87.33, 88]; n = 0 where `keep`.
template <class T, class Mask>
DPM_INLINE ExpReduction<T> reduce_exp(T x, Mask keep) {
  // A float next to 3 2^22 has an integer in its low bits: n + 127, the exponent field of 2^n.
  constexpr float shift = 12582912.0f + 127.0f;
  const T shifted = select(keep, splat<T>(shift), x * 1.44269504f + shift);
  const T n = shifted - shift;
  const T r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // n times the first part is exact
  return {r, bits<T>(bits<UnsignedOf<T>>(shifted) << 23)};
}

// r^2 q(r), which is exp(r) - 1 - r, relative error below 4e-9 of exp(r); |r| <= ln(2) / 2.
template <class T>
DPM_INLINE T exp_tail(T r) {
  const T q = r * 0.00138210552f + 0.00836867467f;
  return r * r * (((q * r + 0.0416682623f) * r + 0.166665211f) * r + 0.49999994f);
}

// Any x; 1.1 ulp. Above 88 it is exp(88) = 1.65e38, below -87.33 it is 0.
template <class T>
DPM_INLINE T exp(T x) {
  const auto [r, scale] = reduce_exp(min(x, splat<T>(88.0f)), false);
  return select(x < -87.33f, T{}, scale * (r + exp_tail(r) + 1.0f));
}
DPM_INLINE double exp(double x) { return std::exp(x); }

// 2^x for x <= 0; relative error 2.2e-7. Below -126 it is 2^-126. With half the latency of exp.
template <class T>
DPM_INLINE T exp2_of_negative(T x) {
  constexpr float shift = 12582912.0f + 127.0f;  // as in reduce_exp
  const T limited = max(x, splat<T>(-126.0f)), shifted = limited + shift;
  const T f = limited - (shifted - shift), z = f * f;
  const T p = z * (f * 0.0013264727f + 0.009671513f) + (f * 0.055507336f + 0.24022242f);
  const T scale = bits<T>(bits<UnsignedOf<T>>(shifted) << 23);
  return scale * (z * p + (f * 0.693147f + 1.0f));
}
DPM_INLINE double exp2_of_negative(double x) { return std::exp2(x); }

template <class T>
struct Exponential {
  T exp, expm1;
};

// exp(x) and exp(x) - 1, each as accurate as alone, for x in [-87, 87].
template <class T>
DPM_INLINE Exponential<T> exponential(T x) {
  const auto [r, scale] = reduce_exp(x, false);
  const T above_one = r + exp_tail(r);
  return {scale * (above_one + 1.0f), scale * above_one + (scale - 1.0f)};
}
DPM_INLINE Exponential<double> exponential(double x) { return {std::exp(x), std::expm1(x)}; }

// exp(x) - 1 for any x; 1.6 ulp. Saturates as exp does.
template <class T>
DPM_INLINE T expm1(T x) {
  const T limited = min(max(x, splat<T>(-87.0f)), splat<T>(88.0f));
  const auto [r, scale] = reduce_exp(limited, false);
  return scale * (r + exp_tail(r)) + (scale - 1.0f);
}
DPM_INLINE double expm1(double x) { return std::expm1(x); }

// exp(x) - 1, and exp(x) - 1 - x with its digits near 0 too; see expm1_minus_identity.
template <class T>
struct ExpExcess {
  T expm1, excess;
};

template <class T>
DPM_INLINE ExpExcess<T> exp_excess(T x) {
  const T limited = min(max(x, splat<T>(-87.0f)), splat<T>(88.0f));
  const auto near = abs(x) < 0.7f;
  const auto [r, scale] = reduce_exp(limited, near);
  const T q = (r * 2.4940533e-5f + 2.00759285e-4f) * r + 0.00138888857f;
  const T p = ((q * r + 0.00833276566f) * r + 0.0416666642f) * r + 0.166666701f;
  const T tail = r * r * (p * r + 0.5f);
  const T expm1 = scale * (r + tail) + (scale - 1.0f);
  return {expm1, select(near, tail, expm1 - x)};
}
DPM_INLINE ExpExcess<double> exp_excess(double x) {
  const double expm1 = std::expm1(x);
  if (std::fabs(x) > 0.7) return {expm1, expm1 - x};
  double sum = 0.0;  // x^k / k! for k = 2 ... 18
  for (int k = 18; k >= 2; --k) sum = (sum + 1.0) * x / k;
  return {expm1, sum * x};
}

// exp(x) - 1 - x for any x; 3.1 ulp, also near 0, where it is x^2 / 2. The exponential saturates.
template <class T>
DPM_INLINE T expm1_minus_identity(T x) {
  return exp_excess(x).excess;
}

// The same from exp(x), known for other reasons; 8 ulp.
template <class T>
DPM_INLINE T expm1_minus_identity(T x, T exp_x) {
  const T q = (x * 2.4940533e-5f + 2.00759285e-4f) * x + 0.00138888857f;
  const T p = ((q * x + 0.00833276566f) * x + 0.0416666642f) * x + 0.166666701f;
  return select(abs(x) < 0.7f, x * x * (p * x + 0.5f), exp_x - 1.0f - x);
}
DPM_INLINE double expm1_minus_identity(double x, double) { return expm1_minus_identity(x); }

// ln(1 + f) - f for f in [sqrt(1/2) - 1, sqrt(2) - 1], error below 4e-8 of ln(1 + f).
template <class T>
DPM_INLINE T log_tail(T f) {
  const T p = (f * 0.087387979f - 0.143077224f) * f + 0.149163544f;
  const T q = ((p * f - 0.165703133f) * f + 0.199622393f) * f - 0.250017762f;
  return f * f * ((q * f + 0.333339453f) * f - 0.499999911f);
}

// The exponent e of u = 2^e m, m in [sqrt(1/2), sqrt(2)), in place: e 2^23. u is normal.
template <class T>
DPM_INLINE UnsignedOf<T> exponent_in_place(T u) {
  return (bits<UnsignedOf<T>>(u) - 0x3f3504f3u) & 0xff800000u;
}

// e ln 2 + ln(1 + f), e in place.
template <class T>
DPM_INLINE T log_of_parts(UnsignedOf<T> exponent, T f) {
  const T e = convert<T>(bits<SignedOf<T>>(exponent));
  constexpr float unit = 1.1920929e-7f;  // 2^-23
  return e * (0.693359375f * unit) + (log_tail(f) + (f - e * (2.12194440e-4f * unit)));
}

// ln x for positive normal x (and infinity); 1.3 ulp.
template <class T>
DPM_INLINE T log(T x) {
  const UnsignedOf<T> exponent = exponent_in_place(x);
  const T m = bits<T>(bits<UnsignedOf<T>>(x) - exponent);
  return select(x < INFINITY, log_of_parts(exponent, m - 1.0f), x);
}
DPM_INLINE double log(double x) { return std::log(x); }

// ln x where x - 1 is known without the rounding of x near 1; 2 ulp.
template <class T>
DPM_INLINE T log(T x, T less_one) {
  const UnsignedOf<T> exponent = exponent_in_place(x);
  const T f = bits<T>(bits<UnsignedOf<T>>(x) - exponent) - 1.0f;
  return log_of_parts(exponent, select(exponent == 0u, less_one, f));
}
DPM_INLINE double log(double x, double less_one) {
  return std::fabs(less_one) < 0.5 ? std::log1p(less_one) : std::log(x);
}

// ln(1 + x) for x in (-1, 1e38]; 2 ulp, also near 0. At -1 it is -88.
template <class T>
DPM_INLINE T log1p(T x) {
  const UnsignedOf<T> exponent = exponent_in_place(x + 1.0f);
  const T scale = bits<T>(0x3f800000u - exponent);  // 2^-e
  return log_of_parts(exponent, x * scale + (scale - 1.0f));
}
DPM_INLINE double log1p(double x) { return std::log1p(x); }

// ln u for u in [2^-33, 1]; relative error 1.2e-7, also near 1.
template <class T>
DPM_INLINE T log_unit(T u) {
  const UnsignedOf<T> exponent = exponent_in_place(u);
  const T f = bits<T>(bits<UnsignedOf<T>>(u) - exponent) - 1.0f;
  const T e = convert<T>(bits<SignedOf<T>>(exponent));
  return e * (0.693147181f * 1.1920929e-7f) + (log_tail(f) + f);
}

template <class T>
struct CosSin {
  T cos, sin;
};

// (cos, sin)(2 pi u) for u in [0, 1]; absolute error 1.7e-7.
template <class T>
DPM_INLINE CosSin<T> cos_sin_of_turns(T u) {
  const T shifted = 2.0f * u + 12582912.0f;       // 3 2^22: half turns in the low bits
  const T h = 2.0f * u - (shifted - 12582912.0f);  // in [-1/2, 1/2], exact
  const T z = h * h;
  const T c = ((z * 0.22000809f - 1.33206248f) * z + 4.05844736f) * z - 4.93479538f;
  const T s = ((z * 0.0764338076f - 0.597625375f) * z + 2.54995775f) * z - 5.1677022f;
  const UnsignedOf<T> sign = bits<UnsignedOf<T>>(shifted) << 31;
  const T cos = c * z + 1.0f, sin = h * (s * z + 3.1415925f);
  return {bits<T>(bits<UnsignedOf<T>>(cos) ^ sign), bits<T>(bits<UnsignedOf<T>>(sin) ^ sign)};
}

// 1 / (1 + exp(-x)) for any x; 2.5 ulp (4 on CUDA), and 0 below -87.33.
template <class T>
DPM_INLINE T sigmoid(T x) {
  const T small = exp(-abs(x));
  return divide_fast(select(x < 0.0f, small, splat<T>(1.0f)), 1.0f + small);
}
DPM_INLINE double sigmoid(double x) {
  const double small = std::exp(-std::fabs(x));
  return (x < 0.0 ? small : 1.0) / (1.0 + small);
}

// ln(1 + exp(x)) for any x; 2.1 ulp, and max(x, 0) where exp is 0.
template <class T>
DPM_INLINE T softplus(T x) {
  return max(x, T{}) + log1p(exp(-abs(x)));
}

// Any x; 3.5 ulp, also near 0.
template <class T>
DPM_INLINE T tanh(T x) {
  const T e = expm1(-2.0f * abs(x));  // in [-1, 0]
  const T y = divide_fast(-e, e + 2.0f);
  return bits<T>(bits<UnsignedOf<T>>(y) | (bits<UnsignedOf<T>>(x) & 0x80000000u));
}
DPM_INLINE double tanh(double x) { return std::tanh(x); }

// Probability that a unit Gaussian is below x, any x; absolute error 3e-7, and 0 below -5.3.
template <class T>
DPM_INLINE T normal_cdf(T x) {
  const T y = min(max(x, splat<T>(-5.3f)), splat<T>(5.3f)), z = y * y;
  const T p = ((z * 6.2649133e-6f + 3.4162853e-4f) * z + 0.0056994357f) * z + 0.052070934f;
  const T q = ((z * 5.298344e-7f + 1.2253589e-4f) * z + 0.0028635128f) * z + 0.038830068f;
  const T above_half = divide_fast(y * (p * z + 0.3989418f), (q * z + 0.29718181f) * z + 1.0f);
  return select(x < -5.3f, T{}, above_half + 0.5f);
}
DPM_INLINE double normal_cdf(double x) { return 0.5 * std::erfc(-0.7071067811865476 * x); }

}  // namespace dpm
