// Probability that a Gaussian gives to the bin of a grey level, and its gradients, in double: it is
// needed at t = 1 alone, where float32 would lose the digits that differences of CDFs need.
#pragma once

#include <cmath>

#include "kl.h"

namespace dpm {

constexpr double kLogSqrt2Pi = 0.91893853320467274178;

// ln of the normal CDF: relative error below 1e-13 for every x.
DPM_INLINE double log_ndtr(double x) {
  constexpr double kSqrtHalf = 0.70710678118654752440;
  if (x > 0) return ::log1p(-0.5 * ::erfc(x * kSqrtHalf));
  if (x > -37) return ::log(0.5 * ::erfc(-x * kSqrtHalf));
  // Asymptotic series of the tail; its first term left out is below 2e-13 here.
  const double y = 1 / (x * x);
  const double series = y * (-1 + y * (3 + y * (-15 + y * (105 - y * 945))));
  return -0.5 * x * x - ::log(-x) - kLogSqrt2Pi + ::log1p(series);
}

// ln(1 - exp(-x)) for x > 0, with full relative accuracy.
DPM_INLINE double log1mexp(double x) {
  return x < 0.69314718055994530942 ? ::log(-::expm1(-x)) : ::log1p(-::exp(-x));
}

// Code length of the bin around x_0, whose decoder has the mean x_0 - difference.
DPM_INLINE KlNats<double> exact_bin_nats(const Bins& bins, double x_0, double difference,
                                         double sigma2) {
  const bool open_below = x_0 < bins.lowest + bins.half_width;
  const bool open_above = x_0 > bins.highest - bins.half_width && !open_below;
  const double precision = 1 / ::sqrt(sigma2);
  const double upper = (difference + bins.half_width) * precision;
  const double lower = (difference - bins.half_width) * precision;
  // As a lower tail, or mirrored into one: there differences keep their digits.
  const bool mirrored = open_above || (!open_below && lower + upper > 0);
  const double inner = mirrored ? -lower : upper, outer = mirrored ? -upper : lower;
  double log_probability = log_ndtr(inner);
  if (!open_below && !open_above) {
    const double gap = log_probability - log_ndtr(outer);
    log_probability += log1mexp(gap > 2.2250738585072014e-308 ? gap : 2.2250738585072014e-308);
  }
  // The density at each end over the probability; none at an open end.
  const auto ratio = [&](double z) {
    return ::exp(-0.5 * z * z - kLogSqrt2Pi - log_probability);
  };
  const double at_upper = open_above ? 0 : ratio(upper), at_lower = open_below ? 0 : ratio(lower);
  const double moment = (open_above ? 0 : upper * at_upper) - (open_below ? 0 : lower * at_lower);
  return {-log_probability, (at_lower - at_upper) * precision, 0.5 * moment, 0};
}

// The same as [iDDPM] computes it: a CDF by tanh, a probability of at least 1e-12.
DPM_INLINE KlNats<double> tanh_bin_nats(const Bins& bins, double x_0, double difference,
                                        double sigma2) {
  constexpr double kScale = 0.79788456080286535588, kCube = 0.044715;  // sqrt(2 / pi)
  const bool open_below = x_0 < bins.lowest + bins.half_width;
  const bool open_above = x_0 > bins.highest - bins.half_width && !open_below;
  const double precision = 1 / ::sqrt(sigma2);
  double cdf[2], density[2], moment[2];
  for (int end = 0; end < 2; ++end) {
    const double z = (difference + (end ? bins.half_width : -bins.half_width)) * precision;
    const double tanh = ::tanh(kScale * (z + kCube * z * z * z));
    cdf[end] = 0.5 * (1 + tanh);
    density[end] = 0.5 * (1 - tanh * tanh) * kScale * (1 + 3 * kCube * z * z);
    moment[end] = z * density[end];
  }
  if (open_below) cdf[0] = density[0] = moment[0] = 0;
  if (open_above) cdf[1] = 1, density[1] = moment[1] = 0;
  const double probability = cdf[1] - cdf[0];
  if (!(probability >= 1e-12)) return {-::log(1e-12), 0, 0, 0};
  return {-::log(probability), (density[0] - density[1]) * precision / probability,
          0.5 * (moment[1] - moment[0]) / probability, 0};
}

DPM_INLINE KlNats<double> bin_nats(Edge edge, const Bins& bins, double x_0, double difference,
                                   double sigma2) {
  return edge == Edge::discretized ? exact_bin_nats(bins, x_0, difference, sigma2)
                                   : tanh_bin_nats(bins, x_0, difference, sigma2);
}

}  // namespace dpm
