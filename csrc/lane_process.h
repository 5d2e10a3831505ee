// Steps of an element of a trajectory and terms of its bound, for 16 examples in the lanes, by the
// kind of its process.
#pragma once

#include "bernoulli.h"
#include "kl.h"
#include "lane_noise.h"
#include "lanes.h"
#include "noise.h"
#include "step.h"

namespace dpm {
namespace DPM_ISA {

// Lanes of one element of what is observed, as a process wants it.
struct Observed {
  f32x16 first, second;
};

template <bool kLearned>
struct GaussianProcess {
  static constexpr bool kHasVariance = kLearned;  // whether networks give one
  using Random = Normals;
  using Row = ReverseRow<float>;
  using RowOfTerms = dpm::Row<float>;

  static DPM_INLINE Observed observed(f32x16 y, f32x16 sigma2_y) { return {y, sigma2_y}; }

  static DPM_INLINE f32x16 step(const Row& row, f32x16 x, f32x16 mu_out, const float* sigma2_out,
                                const Observed* observed, const float* eps) {
    const f32x16 sigma2 = kLearned ? load<f32x16>(sigma2_out) : f32x16{};
    Moments<f32x16> p = reverse_moments<kLearned>(row, x, mu_out, sigma2);
    if (observed) p = observe(p, observed->first, observed->second);
    return eps ? with_noise(p, load<f32x16>(eps)) : p.mu;
  }

  // levels: signal and spread.
  static DPM_INLINE f32x16 noised(const float* level, f32x16 value, f32x16 eps) {
    return dpm::noised(NoiseRow<float>{level[0], level[1]}, value, eps);
  }

  static DPM_INLINE f32x16 nats(const RowOfTerms& row, f32x16 x_0, f32x16 x_t, f32x16 mu_out,
                                const float* sigma2_out) {
    const f32x16 sigma2 = kLearned ? load<f32x16>(sigma2_out) : f32x16{};
    const ReverseVariance<f32x16> variance = reverse_variance<kLearned>(row, sigma2);
    return kl_nats(row, variance, kl_mean(row, variance, x_0, x_t, mu_out).difference).nats;
  }
};

struct BinomialProcess {
  static constexpr bool kHasVariance = false;
  using Random = Uniforms;
  using Row = BernoulliRow<float>;
  using RowOfTerms = Row;

  static DPM_INLINE Observed observed(f32x16 y, f32x16 flip) {
    return {bernoulli_observed(y, flip), f32x16{}};
  }

  static DPM_INLINE f32x16 step(const Row& row, f32x16 x, f32x16 logit_out, const float*,
                                const Observed* observed, const float* u) {
    const f32x16 shift = observed ? observed->first : f32x16{};
    const Odds<f32x16> odds = bernoulli_odds(row, x, logit_out, shift);
    return u ? bernoulli_drawn(odds, load<f32x16>(u)) : bernoulli_likelier(odds);
  }

  // levels: the rates for values 0 and 1.
  static DPM_INLINE f32x16 noised(const float* level, f32x16 value, f32x16 u) {
    const float rates[2] = {level[0], level[1]};
    return bernoulli_noised(rates, value, u);
  }

  static DPM_INLINE f32x16 nats(const RowOfTerms& row, f32x16 x_0, f32x16 x_t, f32x16 logit_out,
                                const float*) {
    return bernoulli_nats(row, x_0, x_t, logit_out).nats;
  }
};

}  // namespace DPM_ISA
}  // namespace dpm
