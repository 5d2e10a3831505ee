// The reverse kernel p(x_{t-1} | x_t) as a row of coefficients: what the ops `kl` and `step` share.
#pragma once

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

DPM_INLINE ReverseRow<double> widened(const ReverseRow<double>& row) { return row; }
DPM_INLINE ReverseRow<double> widened(const ReverseRow<float>& row) {
  return {row.a, row.b, row.c,    row.e, row.p,   row.q, row.low,     row.high,
          row.s, row.base, row.g, row.c_0, row.d, row.delta_0, row.is_first};
}

#if !defined(__CUDACC__)
// A row that is no variance would give NaN.
DPM_INLINE void check_base(double base) {
  if (base > 0) return;
  char message[64];
  std::snprintf(message, sizeof(message), "rows must have a positive base, got %g", base);
  throw std::invalid_argument(message);
}
#endif

template <typename T>
struct ReverseVariance {
  T growth;  // ln(sigma2_p / base)
  T sigma2;
  T precision;  // 1 / sigma2
  T slope;      // d growth / d (s sigma2_out), 0 where the shift is at its limit
  T per_g;      // d growth / d g
};

// A shift of the log-variance is limited, so that a variance and its inverse are finite.
template <typename R>
constexpr R kMaxShift = sizeof(R) == sizeof(double) ? R(600) : R(60);

// sigma2_p = base exp(v) / (1 - g + g exp(v)) with v = s sigma2_out; base where nothing is learned.
// With exp(-v) instead of exp(v) where v < 0 nothing cancels, whatever g in [0, 1] is.
template <bool kLearned, typename T, typename R>
DPM_INLINE ReverseVariance<T> reverse_variance(const ReverseRow<R>& row, T sigma2_out) {
  if constexpr (kLearned) {
    const T shift = row.s * sigma2_out;
    const T v = min(max(shift, splat<T>(-kMaxShift<R>)), splat<T>(kMaxShift<R>));
    const auto shrinks = v < R(0);
    const T excess = expm1(abs(v));
    const T weighted = select(shrinks, splat<T>(1 - row.g), splat<T>(row.g)) * excess;
    const T bend = 1 + weighted;
    const T up = select(shrinks, splat<T>(R(1)), 1 + excess);
    const T down = select(shrinks, 1 + excess, splat<T>(R(1)));
    const T inverse_bend = 1 / bend;
    const T growth = max(v, T{}) - log1p(weighted);
    const T slope = (1 - row.g) * down * inverse_bend;
    const T per_g = select(shrinks, excess, -excess) * inverse_bend;
    return {growth, row.base * up * inverse_bend, bend / (row.base * up),
            select(v == shift, slope, T{}), per_g};
  } else {
    return {T{}, splat<T>(row.base), splat<T>(1 / row.base), T{}, T{}};
  }
}

}  // namespace dpm
