// Probability that a Gaussian gives to the bin of a grey level, and its gradients, in double: it is
// needed at t = 1 alone, where float32 would lose the digits that differences of CDFs need.
#pragma once

#include <cmath>

#include "kl.h"

namespace dpm {

constexpr double kSqrtHalf = 0.70710678118654752440, kLog2Pi = 1.8378770664093454836;
constexpr double kTwoOverPi = 0.63661977236758134308;

// exp(a^2) erfc(a) for a >= 0: relative error below 1e-13.
DPM_INLINE double scaled_erfc(double a) {
  if (a < 25) return ::exp(a * a) * ::erfc(a);
  const double y = 0.5 / (a * a);  // asymptotic series, the first term left out is 1e-13
  return (1 - y * (1 - y * (3 - y * 15))) / (a * 1.7724538509055160273);
}

// Code length of the bin around x_0, whose decoder has the mean x_0 - difference. With z in units
// of sigma the bin is [inner - width, inner], mirrored or not so that it is a lower tail.
DPM_INLINE KlNats<double> exact_bin_nats(const Bins& bins, double x_0, double difference,
                                         double sigma2) {
  const bool open_below = x_0 < bins.lowest + bins.half_width;
  const bool open_above = x_0 > bins.highest - bins.half_width && !open_below;
  const bool one_sided = open_below || open_above;
  const double sigma = ::sqrt(sigma2);
  const double middle = difference / sigma, width = 2 * bins.half_width / sigma;
  if (!one_sided && width * (1 + ::fabs(middle)) < 1e-3) {
    // Density at the middle times the width, and the curvature of the density.
    const double square = middle * middle, curvature = width * width / 12;
    const double nats =
        0.5 * (square + kLog2Pi) - ::log(width) + 0.5 * curvature * (1 - square);
    return {nats, middle * (1 - curvature) / sigma,
            0.5 * (1 - square + curvature * (2 * square - 1)), 0};
  }
  const double sign = open_above || (!open_below && middle > 0) ? -1 : 1;
  const double inner = 0.5 * width + sign * middle;
  double nats, at_inner, at_outer = 0;  // at_...: density there over the probability of the bin
  if (inner > 0) {
    const double near = inner * kSqrtHalf, far = width * kSqrtHalf - near;
    const double outside = ::erfc(near) + (one_sided ? 0 : ::erfc(far));
    nats = -::log1p(-0.5 * outside);
    const double density = ::sqrt(0.25 * kTwoOverPi) / (1 - 0.5 * outside);
    at_inner = density * ::exp(-near * near);
    if (!one_sided) at_outer = density * ::exp(-far * far);
  } else {
    const double a = -inner * kSqrtHalf, scaled = scaled_erfc(a);
    nats = a * a - ::log(0.5 * scaled);
    at_inner = ::sqrt(kTwoOverPi) / scaled;
    if (!one_sided) {
      const double fall = width * (0.5 * width + 2 * kSqrtHalf * a);  // of ln density, to outer
      const double log_ratio = fall + ::log(scaled / scaled_erfc(a + width * kSqrtHalf));
      const double missing = ::log(-::expm1(-log_ratio));
      nats -= missing;
      at_inner *= ::exp(-missing);
      at_outer = at_inner * ::exp(-fall);
    }
  }
  return {nats, sign * (at_outer - at_inner) / sigma,
          0.5 * ((at_inner - at_outer) * inner + at_outer * width), 0};
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
  if (probability < 1e-12) return {-::log(1e-12), 0, 0, 0};
  return {-::log(probability), (density[0] - density[1]) * precision / probability,
          0.5 * (moment[1] - moment[0]) / probability, 0};
}

DPM_INLINE KlNats<double> bin_nats(Edge edge, const Bins& bins, double x_0, double difference,
                                   double sigma2) {
  return edge == Edge::discretized ? exact_bin_nats(bins, x_0, difference, sigma2)
                                   : tanh_bin_nats(bins, x_0, difference, sigma2);
}

}  // namespace dpm
