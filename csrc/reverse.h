// The reverse kernel p(x_{t-1} | x_t) as a row of coefficients: what the ops `kl` and `step` share.
#pragma once

#include <cmath>
#include <cstdio>
#include <stdexcept>

#include "common.h"
#include "math.h"

namespace dpm {

// Columns of a row, in the order of dpm_fast.reference.ReverseRow, which says what they mean.
constexpr int kRowColumns = 15;

template <typename R>
struct ReverseRow {
  R a, b, c, e, p, q, low, high, s, base, g, c_0, d, delta_0, is_first;
};

// A GPU has few units for double, and every thread would compute it.
DPM_INLINE double exp_of_delta(double delta) { return ::exp(delta); }
DPM_INLINE float exp_of_delta(float delta) {
#if defined(__CUDACC__)
  return ::expf(delta);
#else
  return float(::exp(double(delta)));
#endif
}

// A row and what follows from it once for all elements.
template <typename R>
struct Row : ReverseRow<R> {
  R h;              // 1 - g
  R inverse_base;   // 1 / base
  R ratio;          // exp(delta_0) = sigma2_q / base
  bool is_clamped;  // or the predicted x_0 passes as it is
  bool is_scaled;   // the mean has a part that the variance multiplies
  bool is_exponential;  // g = 0: ln(sigma2_p / base) is v itself

  template <typename Stored>
  DPM_INLINE explicit Row(const ReverseRow<Stored>& row)
      : ReverseRow<R>{R(row.a),    R(row.b),       R(row.c), R(row.e),   R(row.p),
                      R(row.q),    R(row.low),     R(row.high), R(row.s), R(row.base),
                      R(row.g),    R(row.c_0),     R(row.d), R(row.delta_0), R(row.is_first)},
        h(1 - R(row.g)),
        inverse_base(1 / R(row.base)),
        ratio(exp_of_delta(R(row.delta_0))),
        is_clamped(row.low > -INFINITY || row.high < INFINITY),
        is_scaled(row.c != 0 || row.e != 0),
        is_exponential(row.g == 0) {}
};

#if !defined(__CUDACC__)
// Rows that would give NaN, or leave out a learned variance; the words are those of
// dpm_fast/ops/common.py.
template <typename R>
DPM_INLINE void check_variances(const ReverseRow<R>* rows, int64_t N, bool is_learned, bool zero) {
  char message[128];
  for (int64_t n = 0; n < N; ++n) {
    const double base = rows[n].base, s = rows[n].s;
    if (!(zero ? base >= 0 : base > 0)) {
      std::snprintf(message, sizeof(message), "rows must have %s, got %g",
                    zero ? "a base that is not negative" : "a positive base", base);
    } else if (!is_learned && s != 0) {
      std::snprintf(message, sizeof(message),
                    "sigma2_out must be given where rows have a learned variance, "
                    "got None with s = %g", s);
    } else {
      continue;
    }
    throw std::invalid_argument(message);
  }
}
#endif

// sigma2_p = base / u with u = g + (1 - g) exp(-v), v = s sigma2_out: nothing cancels, whatever g in
// [0, 1] is. Where nothing is learned, v = 0 and u = 1.
template <typename T>
struct ReverseVariance {
  T growth;     // ln(sigma2_p / base) = -ln u
  T u;
  T precision;  // 1 / sigma2_p
  T shrink;     // exp(-v)
  T passes;     // 1, or 0 where the shift is at its limit
};

// A shift of the log-variance is limited, so that a variance and its inverse are finite.
template <typename R>
constexpr R kMaxShift = sizeof(R) == sizeof(double) ? R(600) : R(60);

// Whether all shifts are so small that neither exp nor log needs a reduction of its argument. Their
// steps then change no bit; a CPU can leave them out for 16 lanes at once.
DPM_INLINE bool is_small(double) { return false; }
#if defined(__CUDACC__)
DPM_INLINE bool is_small(float) { return false; }
#else
template <typename T>
DPM_INLINE bool is_small(T v) {
  if constexpr (std::is_same_v<T, f32x16>) {
    return all_lanes(abs(v) < 0.34f);  // below ln(2) / 2, and exp(0.34) < sqrt(2)
  } else {
    return false;
  }
}
#endif

template <bool kLearned, typename T, typename R>
DPM_INLINE ReverseVariance<T> reverse_variance(const Row<R>& row, T sigma2_out) {
  const T one = splat<T>(R(1));
  if constexpr (!kLearned) {
    return {T{}, one, splat<T>(row.inverse_base), one, T{}};
  } else {
    const T shift = row.s * sigma2_out;
    if (is_small(shift)) {
      if constexpr (!std::is_same_v<T, double>) {
        const T above_one = exp_tail(-shift) - shift;
        const T shrink = above_one + 1.0f, u = row.g + row.h * shrink;
        const T less_one = row.h * above_one;
        const T growth = row.is_exponential ? shift : -(log_tail(less_one) + less_one);
        return {growth, u, u * row.inverse_base, shrink, one};
      }
    }
    const T v = min(max(shift, splat<T>(-kMaxShift<R>)), splat<T>(kMaxShift<R>));
    const auto shrink = exponential(-v);
    const T u = row.g + row.h * shrink.exp;
    const T growth = row.is_exponential ? v : -log(u, row.h * shrink.expm1);
    return {growth, u, u * row.inverse_base, shrink.exp, select(v == shift, one, T{})};
  }
}

// exp(s sigma2_out), the shift limited.
template <typename T, typename R>
DPM_INLINE T exp_of_shift(R s, T sigma2_out) {
  const T shift = s * sigma2_out;
  if constexpr (!std::is_same_v<T, double>) {
    if (is_small(shift)) return shift + exp_tail(shift) + 1.0f;
  }
  const T v = min(max(shift, splat<T>(-kMaxShift<R>)), splat<T>(kMaxShift<R>));
  if constexpr (std::is_same_v<T, double>) {
    return exp(v);
  } else {
    const auto [r, scale] = reduce_exp(v, false);
    return scale * (r + exp_tail(r) + 1.0f);
  }
}

// sigma2_p alone. Nothing cancels: 1 - g and g exp(v) are not negative.
template <bool kLearned, typename T, typename R>
DPM_INLINE T reverse_sigma2(const ReverseRow<R>& row, T sigma2_out) {
  if constexpr (kLearned) {
    const T scaled = exp_of_shift(row.s, sigma2_out);
    if (row.g == 0) return row.base * scaled;
    return divide_fast(row.base * scaled, (1 - row.g) + row.g * scaled);
  } else {
    return splat<T>(row.base);
  }
}

}  // namespace dpm
