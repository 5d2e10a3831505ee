// Binomial diffusion: noising, a reverse step and a term of the bound; the mathematics of one bit.
#pragma once

#include "args.h"
#include "math.h"

namespace dpm {

// Columns of a row, in the order of dpm_fast.reference.BernoulliRow, which says what they mean.
// Two indices are of x_0 and x_t, a single one of x_t.
template <typename R>
struct BernoulliRow {
  R c, is_first, o[2], d[2][2], b[2][2], h[2][2], m[2][2];
};

constexpr int kBernoulliColumns = sizeof(BernoulliRow<float>) / sizeof(float);

template <typename T, typename R, typename Mask>
DPM_INLINE T of_bit(const R (&values)[2], Mask bit) {
  return select(bit, splat<T>(values[1]), splat<T>(values[0]));
}

template <typename T, typename R, typename Mask>
DPM_INLINE T of_bits(const R (&values)[2][2], Mask j, Mask k) {
  return select(j, of_bit<T>(values[1], k), of_bit<T>(values[0], k));
}

template <typename T, typename Mask>
DPM_INLINE T as_bit(Mask mask) {
  return select(mask, splat<T>(1.0f), T{});
}

// x_t of q(x_t | x_0), whose rates for x_0 = 0 and 1 are a row.
template <typename T, typename R>
DPM_INLINE T bernoulli_noised(const R (&rates)[2], T x_0, T u) {
  return as_bit<T>(u <= of_bit<T>(rates, x_0 > 0.5f));
}

// Proportional to p(x_{t-1} = 0 | x_t) and p(x_{t-1} = 1 | x_t), times a factor of logit `shift`.
template <typename T>
struct Odds {
  T zero, one;
};

template <typename T, typename R>
DPM_INLINE Odds<T> bernoulli_odds(const BernoulliRow<R>& row, T x_t, T logit_out, T shift) {
  const auto k = x_t > 0.5f;
  const T offset = of_bit<T>(row.o, k) + shift;
  if (row.c > 0) {
    return {exp(-offset), 1.0f + row.c * sigmoid(of_bit<T>(row.h[0], k) + logit_out)};
  }
  return {exp(-(offset + logit_out)), splat<T>(1.0f)};
}

// A NaN stays one, here and below.
template <typename T>
DPM_INLINE T bernoulli_drawn(const Odds<T>& odds, T u) {
  const T total = odds.zero + odds.one;
  return select(total == total, as_bit<T>(u * total <= odds.one), total);
}

template <typename T>
DPM_INLINE T bernoulli_likelier(const Odds<T>& odds) {
  const T total = odds.zero + odds.one;
  return select(total == total, as_bit<T>(odds.zero < odds.one), total);
}

// What an observed bit adds to the logit if it was flipped with this probability.
template <typename T>
DPM_INLINE T bernoulli_observed(T y, T flip) {
  const T ratio = (1.0f - flip) / flip;
  const T gain = select(ratio > 0.0f, log(ratio), splat<T>(NAN));
  return select(y > 0.5f, gain, -gain);
}

// Nats of one bit, and their derivative.
template <typename T>
struct BitNats {
  T nats, slope;
};

template <typename T>
DPM_INLINE T log1p_minus_identity(T y) {
  return log_tail(y);
}
DPM_INLINE double log1p_minus_identity(double y) {
  const double s = y / (2 + y), z = s * s;  // ln(1 + y) = 2 artanh s
  double series = 0;
  for (int n = 27; n >= 3; n -= 2) series = series * z + 1.0 / n;
  return 2 * s * z * series - y * s;
}

// Where m exp(e) is still finite, and so large that 1 is nothing beside it.
template <typename R>
constexpr R kMaxLogOdds = sizeof(R) == sizeof(double) ? R(700) : R(80);

// ln(1 + m (exp(e) - 1)) - m e for m in [0, 1/2], and its derivative by e.
template <typename R, typename T>
DPM_INLINE BitNats<T> bernoulli_divergence(T m, T e) {
  constexpr R kLargest = kMaxLogOdds<R>;
  const T limited = min(e, splat<T>(kLargest));
  const ExpExcess<T> power = exp_excess(limited);
  const T growth = m * power.expm1;
  const T beyond = max(e - kLargest, T{});
  const T far = log1p(growth) - m * limited + (1.0f - m) * beyond;
  // Near equality each part is of second order in e.
  const T near = m * power.excess + log1p_minus_identity(growth);
  return {select(abs(e) < 0.6f, near, far), (1.0f - m) * (growth / (1.0f + growth))};
}

// ln(1 + exp(e)), and its derivative by e.
template <typename T>
DPM_INLINE BitNats<T> bernoulli_code_length(T e) {
  return {softplus(e), sigmoid(e)};
}

// A term of the bound, and its derivative by the network's output.
template <typename T, typename R>
DPM_INLINE BitNats<T> bernoulli_nats(const BernoulliRow<R>& row, T x_0, T x_t, T logit_out) {
  const auto j = x_0 > 0.5f, k = x_t > 0.5f;
  T z = logit_out, per_out = splat<T>(1.0f);
  if (row.c > 0) {
    const T at = of_bits<T>(row.h, j, k) + select(j, -logit_out, logit_out);
    const T small = exp(-abs(at)), scale = 1.0f / (1.0f + small);
    const T rate = select(at < 0.0f, small * scale, scale);
    const T excess = row.c * rate;
    z = log1p(excess);
    // (1 - 2 j) c rate (1 - rate) / (1 + c rate), where rate + (1 - rate) is (1 + small) scale.
    per_out = (small * scale * scale) * (row.c / (1.0f + excess));
    per_out = select(j, -per_out, per_out);
  }
  const T b = of_bits<T>(row.b, j, k);
  const T e = of_bits<T>(row.d, j, k) + b * z;
  const BitNats<T> term = row.is_first > 0 ? bernoulli_code_length(e)
                                           : bernoulli_divergence<R>(of_bits<T>(row.m, j, k), e);
  return {term.nats, term.slope * b * per_out};
}

struct BernoulliNoiseArgs {
  Extent extent;
  DType dtype;
  Strided x_0;       // (N, C, S)
  Strided x_t;       // (N, C, S)
  const void* rows;  // (N, 2) rates for x_0 = 0 and 1; float, or double for double x
  NoiseSource noise;

  DPM_INLINE bool is_run() const { return dpm::is_run({x_0, x_t}); }
};

struct BernoulliStepArgs {
  Extent extent;
  DType x_dtype, out_dtype;  // of the network's output, and of all else but the mask
  Strided x_t, logit_out;    // (N, C, S)
  Strided mask, values;      // (N, C, S), both or none; mask is of bytes 0 or 1
  Strided y, flip;           // (N, C, S), both or none
  Strided drift;             // (N, C, S), or none
  Strided x_prev;            // (N, C, S); may be x_t itself
  const void* rows;          // (N, kBernoulliColumns) float, or double for double x
  NoiseSource noise;
  bool deterministic;

  DPM_INLINE bool is_run() const {
    return dpm::is_run({x_t, logit_out, mask, values, y, flip, drift, x_prev});
  }
};

struct BernoulliKlArgs {
  Extent extent;
  DType x_dtype, out_dtype;     // of x_0 and x_t; of logit_out and its gradient
  Strided x_0, x_t, logit_out;  // (N, C, S)
  Strided grad_logit_out;       // (N, C, S), or none
  const void* rows;             // (N, kBernoulliColumns) float, or double for double x
  double* nats;                 // (N,)
  double* pieces;               // (N, num_pieces) where there are several

  DPM_INLINE bool is_run() const { return dpm::is_run({x_0, x_t, logit_out, grad_logit_out}); }
};

// Nats of an example whose event has several pieces.
DPM_INLINE void bernoulli_write_pieces(const BernoulliKlArgs& args, int64_t n) {
  const int64_t num_pieces = args.extent.num_pieces();
  double sum = 0;
  for (int64_t piece = 0; piece < num_pieces; ++piece) sum += args.pieces[n * num_pieces + piece];
  args.nats[n] = sum;
}

DPM_DECLARE_CPU(bernoulli_noise, BernoulliNoiseArgs)
DPM_DECLARE_CPU(bernoulli_step, BernoulliStepArgs)
DPM_DECLARE_CPU(bernoulli_kl, BernoulliKlArgs)
DPM_DECLARE_CUDA(bernoulli_noise, BernoulliNoiseArgs)
DPM_DECLARE_CUDA(bernoulli_step, BernoulliStepArgs)
DPM_DECLARE_CUDA(bernoulli_kl, BernoulliKlArgs)

}  // namespace dpm
