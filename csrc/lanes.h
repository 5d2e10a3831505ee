// Arithmetic types: float, double, and vectors of 64 bytes on a CPU (f32x16, i32x16, u32x16, f64x8,
// i64x8, u64x8), with the few operations that let one template serve all.
//
// Such a template chooses by select(mask, a, b), never by `?:`, and reads a scalar as a vector by
// splat<T>(x) or an operator with a T. A 64-byte vector is a native one under AVX-512 and a Pair of
// narrower ones elsewhere, since GCC 12 compares, selects and casts what is wider than a register
// lane by lane. Types therefore differ between instruction sets: they cross no external function.
#pragma once

#include <type_traits>
#include <utility>

#include "common.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace dpm {

// The bits of `from` as another type of the same size.
template <class To, class From>
DPM_INLINE To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "bits: sizes differ");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

// x less zero is x, which compilers know; x plus zero is not where x is -0, and would be computed.
template <class T, class S>
DPM_INLINE T splat(S x) {
  return x - T{};
}

// Integers with as many lanes as T and of the same size; masks of T are the signed ones or bool.
template <class T>
struct Integers;
template <>
struct Integers<float> {
  using Signed = int32_t;
  using Unsigned = uint32_t;
};
template <class T>
using SignedOf = typename Integers<T>::Signed;
template <class T>
using UnsignedOf = typename Integers<T>::Unsigned;

#if defined(__CUDACC__)

template <class T>
DPM_INLINE T select(bool mask, T a, T b) {
  return mask ? a : b;
}

// Each lane's value as an element of To.
template <class To, class From>
DPM_INLINE To convert(From x) {
  return static_cast<To>(x);
}

#else

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // speaks of calls, and everything here is inlined
#endif

template <class Element, int num_bytes>
struct NativeVector {
  typedef Element type __attribute__((vector_size(num_bytes)));
};

// Two halves, computed alike.
template <class V>
struct Pair {
  using Element = std::remove_cv_t<std::remove_reference_t<decltype(std::declval<V>()[0])>>;

  V low, high;

  DPM_INLINE Element operator[](int lane) const {
    constexpr int half = sizeof(V) / sizeof(Element);
    return lane < half ? low[lane] : high[lane - half];
  }
};

#if defined(__AVX512F__)
template <class Element>
using Vector64 = typename NativeVector<Element, 64>::type;
#elif defined(__AVX2__)
template <class Element>
using Vector64 = Pair<typename NativeVector<Element, 32>::type>;
#else
template <class Element>
using Vector64 = Pair<Pair<typename NativeVector<Element, 16>::type>>;
#endif

using f32x16 = Vector64<float>;
using i32x16 = Vector64<int32_t>;
using u32x16 = Vector64<uint32_t>;
using f64x8 = Vector64<double>;
using i64x8 = Vector64<int64_t>;
using u64x8 = Vector64<uint64_t>;

template <>
struct Integers<f32x16> {
  using Signed = i32x16;
  using Unsigned = u32x16;
};
template <class V>
struct Integers<Pair<V>> {
  using Signed = Pair<typename Integers<V>::Signed>;
  using Unsigned = Pair<typename Integers<V>::Unsigned>;
};

#define DPM_PAIR_OPERATOR(op)                                                \
  template <class V>                                                         \
  DPM_INLINE auto operator op(Pair<V> a, Pair<V> b) {                        \
    return Pair<decltype(a.low op b.low)>{a.low op b.low, a.high op b.high}; \
  }                                                                          \
  template <class V>                                                         \
  DPM_INLINE auto operator op(Pair<V> a, typename Pair<V>::Element b) {      \
    return Pair<decltype(a.low op b)>{a.low op b, a.high op b};              \
  }                                                                          \
  template <class V>                                                         \
  DPM_INLINE auto operator op(typename Pair<V>::Element a, Pair<V> b) {      \
    return Pair<decltype(a op b.low)>{a op b.low, a op b.high};              \
  }
DPM_PAIR_OPERATOR(+)
DPM_PAIR_OPERATOR(-)
DPM_PAIR_OPERATOR(*)
DPM_PAIR_OPERATOR(/)
DPM_PAIR_OPERATOR(&)
DPM_PAIR_OPERATOR(|)
DPM_PAIR_OPERATOR(^)
DPM_PAIR_OPERATOR(<<)
DPM_PAIR_OPERATOR(>>)
DPM_PAIR_OPERATOR(==)
DPM_PAIR_OPERATOR(!=)
DPM_PAIR_OPERATOR(<)
DPM_PAIR_OPERATOR(<=)
DPM_PAIR_OPERATOR(>)
DPM_PAIR_OPERATOR(>=)
#undef DPM_PAIR_OPERATOR

template <class V>
DPM_INLINE Pair<V> operator-(Pair<V> a) {
  return {-a.low, -a.high};
}
template <class V>
DPM_INLINE Pair<V> operator~(Pair<V> a) {
  return {~a.low, ~a.high};
}
template <class V, class B>
DPM_INLINE Pair<V>& operator+=(Pair<V>& a, B b) {
  return a = a + b;
}
template <class V, class B>
DPM_INLINE Pair<V>& operator-=(Pair<V>& a, B b) {
  return a = a - b;
}
template <class V, class B>
DPM_INLINE Pair<V>& operator*=(Pair<V>& a, B b) {
  return a = a * b;
}

template <class To, class V>
DPM_INLINE To bits(Pair<V> from) {
  using Half = decltype(To{}.low);
  return {bits<Half>(from.low), bits<Half>(from.high)};
}

// A mask may also be one bool for all lanes.
template <class Mask, class V>
DPM_INLINE V select(Mask mask, V a, V b) {
  return mask ? a : b;
}
template <class Mask, class V>
DPM_INLINE Pair<V> select(Pair<Mask> mask, Pair<V> a, Pair<V> b) {
  return {select(mask.low, a.low, b.low), select(mask.high, a.high, b.high)};
}

// Each lane's value as an element of To.
template <class To, class From>
DPM_INLINE To convert(From x) {
  if constexpr (std::is_arithmetic_v<From>) {
    return static_cast<To>(x);
  } else {
    return __builtin_convertvector(x, To);
  }
}
template <class To, class V>
DPM_INLINE To convert(Pair<V> from) {
  using Half = decltype(To{}.low);
  return {convert<Half>(from.low), convert<Half>(from.high)};
}

// Unaligned loads and stores, one native vector at a time.
template <class V>
struct Memory {
  static DPM_INLINE V load(const void* p) {
    V x;
    __builtin_memcpy(&x, p, sizeof(V));
    return x;
  }
  static DPM_INLINE void store(void* p, V x) { __builtin_memcpy(p, &x, sizeof(V)); }
};
template <class V>
struct Memory<Pair<V>> {
  static DPM_INLINE Pair<V> load(const void* p) {
    return {Memory<V>::load(p), Memory<V>::load(static_cast<const char*>(p) + sizeof(V))};
  }
  static DPM_INLINE void store(void* p, Pair<V> x) {
    Memory<V>::store(p, x.low);
    Memory<V>::store(static_cast<char*>(p) + sizeof(V), x.high);
  }
};

template <class V>
DPM_INLINE V load(const void* p) {
  return Memory<V>::load(p);
}
template <class V>
DPM_INLINE void store(void* p, V x) {
  Memory<V>::store(p, x);
}

// a0 b0 a1 b1 ... of all lanes.
template <class V>
DPM_INLINE Pair<V> interleave(V a, V b) {
  constexpr int num_lanes = sizeof(V) / sizeof(a[0]);
#if defined(__clang__)
  V pair[2];
  for (int i = 0; i < num_lanes; ++i) {
    pair[2 * i / num_lanes][2 * i % num_lanes] = a[i];
    pair[2 * i / num_lanes][2 * i % num_lanes + 1] = b[i];
  }
  return {pair[0], pair[1]};
#else
  decltype(a < b) low, high;  // folded into constants of shuffle instructions
  for (int i = 0; i < num_lanes; ++i) {
    low[i] = i / 2 + i % 2 * num_lanes;
    high[i] = low[i] + num_lanes / 2;
  }
  return {__builtin_shuffle(a, b, low), __builtin_shuffle(a, b, high)};
#endif
}
template <class V>
DPM_INLINE Pair<Pair<V>> interleave(Pair<V> a, Pair<V> b) {
  return {interleave(a.low, b.low), interleave(a.high, b.high)};
}

struct f64x16 {
  f64x8 low, high;
};

DPM_INLINE f64x16 to_double(f32x16 x) {
  float narrow[16];
  double wide[16];
  store(narrow, x);
  for (int i = 0; i < 16; ++i) wide[i] = narrow[i];
  return {load<f64x8>(wide), load<f64x8>(wide + 8)};
}

// Whether a mask is true in every lane.
DPM_INLINE bool all_lanes(i32x16 mask) {
#if defined(__AVX512DQ__)
  return _mm512_movepi32_mask(reinterpret_cast<__m512i>(mask)) == 0xffff;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(reinterpret_cast<__m256>(mask.low & mask.high)) == 0xff;
#else
  uint64_t words[8], all = ~uint64_t{0};
  store(words, mask);
  for (uint64_t word : words) all &= word;
  return all == ~uint64_t{0};
#endif
}

DPM_INLINE f32x16 lane_numbers() {
  constexpr float numbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return load<f32x16>(numbers);
}

// In one order for every instruction set.
DPM_INLINE double sum(f64x8 x) {
  return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}

#endif

}  // namespace dpm
