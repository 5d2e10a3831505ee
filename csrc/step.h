// One reverse step x_t -> x_{t-1}: the mathematics of one element.
#pragma once

#include "args.h"
#include "math.h"
#include "reverse.h"

namespace dpm {

// A mean and a variance.
template <typename T>
struct Moments {
  T mu, sigma2;
};

// Of p(x_{t-1} | x_t).
template <bool kLearned, typename T, typename R>
DPM_INLINE Moments<T> reverse_moments(const ReverseRow<R>& row, T x_t, T mu_out, T sigma2_out) {
  const T sigma2 = reverse_sigma2<kLearned>(row, sigma2_out);
  const T raw = row.p * x_t + row.q * mu_out;
  const T prediction = min(max(raw, splat<T>(row.low)), splat<T>(row.high));
  return {row.a * prediction + row.b * x_t + sigma2 * (row.c * mu_out + row.e * x_t), sigma2};
}

// Of the product with N(y, sigma2_y). An infinite sigma2_y leaves an element as it was, whatever y
// is there; one that is not positive gives NaN.
template <typename T>
DPM_INLINE Moments<T> observe(const Moments<T>& p, T y, T sigma2_y) {
  const T sum = p.sigma2 + sigma2_y;
  const T weight = divide_fast(p.sigma2, sum);
  T left = p.sigma2 * divide_fast(sigma2_y, sum);
#if defined(__CUDACC__)
  left = select(sigma2_y > 1e37f, p.sigma2, left);  // beyond what divide_fast can divide by
#endif
  const auto finite = sigma2_y < INFINITY;
  const T valid = select(sigma2_y > 0, left, splat<T>(NAN));
  return {select(finite, p.mu + weight * (y - p.mu), p.mu), select(finite, valid, p.sigma2)};
}

// x_{t-1}; its mean where eps is 0.
template <typename T>
DPM_INLINE T with_noise(const Moments<T>& p, T eps) {
  return p.mu + sqrt_fast(p.sigma2) * eps;
}

struct StepArgs {
  Extent extent;
  DType x_dtype;                         // of x_t, y, drift, values and x_prev
  DType out_dtype;                       // of mu_out and sigma2_out
  Strided x_t, mu_out, sigma2_out;       // sigma2_out may be absent
  const void* rows;                      // (N, kRowColumns) float, double for double examples
  NoiseSource noise;
  bool deterministic;                    // x_{t-1} is the mean
  Strided y, sigma2_y;                   // both or none; sigma2_y has the type of rows
  Strided drift;                         // may be absent
  Strided mask, values;                  // both or none; mask is of bytes 0 or 1
  Strided x_prev;                        // may be x_t itself

  DPM_INLINE bool is_run() const {
    return dpm::is_run({x_t, mu_out, sigma2_out, y, sigma2_y, drift, mask, values, x_prev});
  }
};

DPM_DECLARE_CPU(step, StepArgs)
DPM_DECLARE_CUDA(step, StepArgs)

}  // namespace dpm
