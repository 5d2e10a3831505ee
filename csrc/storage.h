// Storage types float, bf16 and f16: loads and stores that convert to and from float.
//
// Conversions are exact, or round to nearest even; NaN stays NaN. Nothing is computed in 16 bits.
#pragma once

#include "lanes.h"

namespace dpm {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// T is float or f32x16; the 16 bits are the low half of an unsigned integer.
template <class T>
DPM_INLINE T float_of_bf16(UnsignedOf<T> half) {
  return bits<T>(half << 16);
}

template <class T>
DPM_INLINE UnsignedOf<T> bf16_of_float(T x) {
  using U = UnsignedOf<T>;
  const U b = bits<U>(x);
  const U rounded = b + 0x7fffu + ((b >> 16) & 1u);
  return select(x == x, rounded, b | 0x400000u) >> 16;
}

template <class T>
DPM_INLINE T float_of_f16(UnsignedOf<T> half) {
  using U = UnsignedOf<T>;
  const U magnitude = (half & 0x7fffu) << 13;  // exponent and mantissa in their places
  // Exponents are biased by 15 and 127. A subnormal is a number in [2^-14, 2^-13) less 2^-14.
  const U normal = magnitude + (112u << 23);
  const U subnormal = bits<U>(bits<T>(magnitude + (113u << 23)) - 6.103515625e-5f);
  const U special = magnitude + (224u << 23);  // infinity and NaN
  U out = select(magnitude < (1u << 23), subnormal, normal);
  out = select(magnitude >= (31u << 23), special, out);
  return bits<T>(out | ((half & 0x8000u) << 16));
}

template <class T>
DPM_INLINE UnsignedOf<T> f16_of_float(T x) {
  using U = UnsignedOf<T>;
  const U b = bits<U>(x);
  const U magnitude = b & 0x7fffffffu;
  const U normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 1/2 rounds to a multiple of 2^-24, the spacing of subnormals.
  const U subnormal = bits<U>(bits<T>(magnitude) + 0.5f) - 0x3f000000u;
  const U nan = ((magnitude >> 13) & 0x3ffu) | 0x7e00u;
  U out = select(magnitude < (113u << 23), subnormal, normal);
  out = select(magnitude >= (143u << 23), splat<U>(0x7c00u), out);
  out = select(magnitude > (255u << 23), nan, out);
  return out | ((b >> 16) & 0x8000u);
}

DPM_INLINE float to_float(float x) { return x; }
DPM_INLINE float to_float(bf16 x) { return float_of_bf16<float>(x.bits); }
DPM_INLINE float to_float(f16 x) { return float_of_f16<float>(x.bits); }

template <class Storage>
DPM_INLINE Storage from_float(float x) {
  if constexpr (std::is_same_v<Storage, float>) {
    return x;
  } else if constexpr (std::is_same_v<Storage, bf16>) {
    return {static_cast<uint16_t>(bf16_of_float(x))};
  } else {
    static_assert(std::is_same_v<Storage, f16>);
    return {static_cast<uint16_t>(f16_of_float(x))};
  }
}

#if !defined(__CUDACC__)

// The unmasked AVX-512 intrinsics of GCC 12 warn of an uninitialized variable of their own.
constexpr unsigned short kAllLanes = 0xffff;

DPM_INLINE f32x16 load_all(const float* p) { return load<f32x16>(p); }
DPM_INLINE void store_all(float* p, f32x16 x) { store(p, x); }

DPM_INLINE u32x16 load_halves(const uint16_t* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<u32x16>(_mm512_maskz_cvtepu16_epi32(kAllLanes, load<__m256i>(p)));
#else
  uint32_t lanes[16];
  for (int i = 0; i < 16; ++i) lanes[i] = p[i];
  return load<u32x16>(lanes);
#endif
}

DPM_INLINE void store_halves(uint16_t* p, u32x16 x) {
#if defined(__AVX512F__)
  store(p, _mm512_maskz_cvtepi32_epi16(kAllLanes, reinterpret_cast<__m512i>(x)));
#else
  uint32_t lanes[16];
  store(lanes, x);
  for (int i = 0; i < 16; ++i) p[i] = static_cast<uint16_t>(lanes[i]);
#endif
}

DPM_INLINE f32x16 load_all(const bf16* p) { return float_of_bf16<f32x16>(load_halves(&p->bits)); }
DPM_INLINE void store_all(bf16* p, f32x16 x) { store_halves(&p->bits, bf16_of_float(x)); }

DPM_INLINE f32x16 load_all(const f16* p) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtph_ps(kAllLanes, load<__m256i>(p));
#elif defined(__AVX2__) && defined(__F16C__)
  return {_mm256_cvtph_ps(load<__m128i>(p)), _mm256_cvtph_ps(load<__m128i>(p + 8))};
#else
  return float_of_f16<f32x16>(load_halves(&p->bits));
#endif
}

DPM_INLINE void store_all(f16* p, f32x16 x) {
#if defined(__AVX512F__)
  store(p, _mm512_maskz_cvtps_ph(kAllLanes, x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__) && defined(__F16C__)
  store(p, _mm256_cvtps_ph(x.low, _MM_FROUND_TO_NEAREST_INT));
  store(p + 8, _mm256_cvtps_ph(x.high, _MM_FROUND_TO_NEAREST_INT));
#else
  store_halves(&p->bits, f16_of_float(x));
#endif
}

// The first `count` of 16 neighbors, in one or two instructions; no memory beyond them is touched.
// Zeros in the other lanes.
#if defined(__AVX512F__)
constexpr bool kHasMasks = true;
DPM_INLINE __mmask16 first_lanes(int count) { return static_cast<__mmask16>((1u << count) - 1); }
DPM_INLINE f32x16 load_first(const float* p, int count) {
  return _mm512_maskz_loadu_ps(first_lanes(count), p);
}
DPM_INLINE void store_first(float* p, f32x16 x, int count) {
  _mm512_mask_storeu_ps(p, first_lanes(count), x);
}
#elif defined(__AVX2__)
constexpr bool kHasMasks = true;
DPM_INLINE f32x16 load_first(const float* p, int count) {
  const auto first = lane_numbers() < static_cast<float>(count);
  return {_mm256_maskload_ps(p, bits<__m256i>(first.low)),
          _mm256_maskload_ps(p + 8, bits<__m256i>(first.high))};
}
DPM_INLINE void store_first(float* p, f32x16 x, int count) {
  const auto first = lane_numbers() < static_cast<float>(count);
  _mm256_maskstore_ps(p, bits<__m256i>(first.low), x.low);
  _mm256_maskstore_ps(p + 8, bits<__m256i>(first.high), x.high);
}
#else
constexpr bool kHasMasks = false;
f32x16 load_first(const float* p, int count);
void store_first(float* p, f32x16 x, int count);
#endif

// The first `count` of 16 elements that lie `stride` apart; `fill` in the other lanes.
template <class Storage>
DPM_INLINE f32x16 load16(const Storage* p, int64_t stride = 1, int count = 16, float fill = 0.0f) {
  if (stride == 1 && count == 16) return load_all(p);
  Storage lanes[16] = {};
  for (int i = 0; i < count; ++i) lanes[i] = p[i * stride];
  return select(lane_numbers() < static_cast<float>(count), load_all(lanes), splat<f32x16>(fill));
}

template <class Storage>
DPM_INLINE void store16(Storage* p, f32x16 x, int64_t stride = 1, int count = 16) {
  if (stride == 1 && count == 16) return store_all(p, x);
  Storage lanes[16];
  store_all(lanes, x);
  for (int i = 0; i < count; ++i) p[i * stride] = lanes[i];
}

#endif

}  // namespace dpm
