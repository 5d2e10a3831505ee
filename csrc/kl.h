// One term of the bound per example, and its gradients: the mathematics of one element.
#pragma once

#include "args.h"
#include "math.h"
#include "reverse.h"

namespace dpm {

// mu_q - mu_p of one element, and the parts of mu_p that gradients need.
template <typename T>
struct KlMean {
  T difference;
  T prediction;          // clamp(p x_t + q mu_out)
  T sigma2;              // sigma2_p, 0 unless it multiplies a part of the mean:
  T scaled;              // sigma2_p (c mu_out + e x_t)
  T free, below, above;  // 1 where the clamp lets pass, or holds at its low or high end
};

template <typename T, typename R>
DPM_INLINE KlMean<T> kl_mean(const Row<R>& row, const ReverseVariance<T>& variance, T x_0, T x_t,
                             T mu_out) {
  const T one = splat<T>(R(1));
  KlMean<T> mean{{}, row.p * x_t + row.q * mu_out, {}, {}, one, {}, {}};
  if (row.is_clamped) {
    mean.below = select(mean.prediction < row.low, one, T{});
    mean.above = select(mean.prediction > row.high, one, T{});
    mean.free = one - mean.below - mean.above;
    mean.prediction = min(max(mean.prediction, splat<T>(row.low)), splat<T>(row.high));
  }
  mean.difference = row.c_0 * x_0 + row.d * x_t - row.a * mean.prediction;
  if (row.is_scaled) {
    mean.sigma2 = divide_fast(splat<T>(row.base), variance.u);
    mean.scaled = mean.sigma2 * (row.c * mu_out + row.e * x_t);
    mean.difference = mean.difference - mean.scaled;
  }
  return mean;
}

// Nats of one element and their partial derivatives.
template <typename T>
struct KlNats {
  T nats;
  T per_difference;    // with respect to mu_q - mu_p
  T per_log_variance;  // with respect to ln sigma2_p where it scales the difference
  T per_delta;         // with respect to delta = ln(sigma2_q / sigma2_p)
};

// 1/2 [exp(delta) - 1 - delta + difference^2 / sigma2_p] for t >= 2, and at t = 1, where delta is
// -ln sigma2_p, 1/2 [ln 2 pi - delta + difference^2 / sigma2_p].
template <typename T, typename R>
DPM_INLINE KlNats<T> kl_nats(const Row<R>& row, const ReverseVariance<T>& variance, T difference) {
  const T delta = row.delta_0 - variance.growth;
  const T weighted = difference * variance.precision;
  const T square = R(0.5) * difference * weighted;
  if (row.is_first > R(0)) {
    const T log_variance = R(0.5) * (R(1.8378770664093454836) - delta);
    return {log_variance + square, weighted, -square, splat<T>(R(-0.5))};
  }
  const T excess = expm1_minus_identity(delta, row.ratio * variance.u);
  return {R(0.5) * excess + square, weighted, -square, R(0.5) * (excess + delta)};
}

// Gradients with respect to the element's inputs.
template <typename T>
struct KlGradient {
  T x_0, x_t, mu_out, sigma2_out;
};

template <typename T>
DPM_INLINE T per_growth(const KlNats<T>& term, const KlMean<T>& mean) {
  return term.per_log_variance - term.per_delta - term.per_difference * mean.scaled;
}

template <typename T, typename R>
DPM_INLINE KlGradient<T> kl_gradient(const Row<R>& row, const ReverseVariance<T>& variance,
                                     const KlMean<T>& mean, const KlNats<T>& term) {
  const T through = row.a * mean.free;
  // d growth / d v = (1 - g) exp(-v) / u
  T slope = variance.passes;
  if (!row.is_exponential) slope = slope * divide_fast(row.h * variance.shrink, variance.u);
  return {
      term.per_difference * row.c_0,
      term.per_difference * (row.d - through * row.p - mean.sigma2 * row.e),
      -term.per_difference * (through * row.q + mean.sigma2 * row.c),
      per_growth(term, mean) * slope * row.s,
  };
}

// One element's share of the gradient with respect to the row, column by column.
template <typename T, typename R>
DPM_INLINE void kl_row_gradient(const Row<R>& row, const ReverseVariance<T>& variance,
                                const KlMean<T>& mean, const KlNats<T>& term, T x_0, T x_t,
                                T mu_out, T sigma2_out, T (&out)[kRowColumns]) {
  const T per_mu_p = -term.per_difference;
  const T per_prediction = per_mu_p * row.a;
  const T per_scaled = divide_fast(per_mu_p * row.base, variance.u);
  const T growth = per_growth(term, mean);
  const T per_u = divide_fast(growth, variance.u);
  out[0] = per_mu_p * mean.prediction;                                       // a
  out[1] = T{};                                                              // b
  out[2] = per_scaled * mu_out;                                              // c
  out[3] = per_scaled * x_t;                                                 // e
  out[4] = per_prediction * mean.free * x_t;                                 // p
  out[5] = per_prediction * mean.free * mu_out;                              // q
  out[6] = per_prediction * mean.below;                                      // low
  out[7] = per_prediction * mean.above;                                      // high
  out[8] = per_u * row.h * variance.shrink * variance.passes * sigma2_out;   // s
  out[9] = (growth + term.per_delta) * row.inverse_base;                     // base, delta_0 held
  out[10] = per_u * (variance.shrink - R(1));                                // g
  out[11] = term.per_difference * x_0;                                       // c_0
  out[12] = term.per_difference * x_t;                                       // d
  out[13] = term.per_delta;                                                  // delta_0
  out[14] = T{};                                                             // is_first
}

// Where the decoder of t = 1 gives the probability of a bin instead of a density.
enum class Edge : int { decoder, discretized, discretized_tanh };

// Bins [x - half_width, x + half_width] in model scale, open at the lowest and highest level.
struct Bins {
  double half_width, lowest, highest;
};

// Sums over one piece of an event: nats, then the gradient with respect to the row.
constexpr int kKlSums = 1 + kRowColumns;

struct KlArgs {
  Extent extent;
  DType x_dtype, out_dtype;              // of x_0 and x_t; of mu_out and sigma2_out
  Strided x_0, x_t, mu_out;              // (N, C, S)
  Strided sigma2_out;                    // (N, C, S), or none for a constant variance
  const void* rows;                      // (N, kRowColumns) float, or double for double x
  Edge edge;
  Bins bins;
  double* nats;                          // (N,)
  Strided grad_x_0, grad_x_t;            // (N, C, S) of x_dtype, each or none
  Strided grad_mu_out, grad_sigma2_out;  // (N, C, S) of out_dtype, each or none
  double* grad_rows;                     // (N, kRowColumns), or none
  double* pieces;                        // (N, num_pieces, kKlSums) where there are several

  DPM_INLINE bool is_run() const {
    return dpm::is_run({x_0, x_t, mu_out, sigma2_out, grad_x_0, grad_x_t, grad_mu_out,
                        grad_sigma2_out});
  }

  DPM_INLINE bool wants_gradients() const {
    return grad_x_0.data || grad_x_t.data || grad_mu_out.data || grad_sigma2_out.data || grad_rows;
  }
};

DPM_INLINE void kl_write(const KlArgs& args, int64_t n, const double* sums) {
  args.nats[n] = sums[0];
  if (!args.grad_rows) return;
  for (int k = 0; k < kRowColumns; ++k) args.grad_rows[n * kRowColumns + k] = sums[1 + k];
}

// One of the sums of an example whose event has several pieces.
DPM_INLINE void kl_write_pieces(const KlArgs& args, int64_t n, int k) {
  const int64_t num_pieces = args.extent.num_pieces();
  const double* from = args.pieces + n * num_pieces * kKlSums + k;
  double sum = 0;
  for (int64_t piece = 0; piece < num_pieces; ++piece) sum += from[piece * kKlSums];
  (k == 0 ? args.nats + n : args.grad_rows + n * kRowColumns + k - 1)[0] = sum;
}

DPM_DECLARE_CPU(kl, KlArgs)
DPM_DECLARE_CUDA(kl, KlArgs)

}  // namespace dpm
