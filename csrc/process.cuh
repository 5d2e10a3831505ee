// Steps of an element of a trajectory, by the kind of its process.
#pragma once

#include "bernoulli.h"
#include "launch.cuh"
#include "noise.h"
#include "step.h"

namespace dpm {

// What is observed of an element, as a process wants it.
struct Observed {
  float first, second;
};

template <bool kLearned>
struct GaussianProcess {
  using Row = ReverseRow<float>;

  static __device__ __forceinline__ Observed observed(float y, float sigma2_y) {
    return {y, sigma2_y};
  }

  static __device__ __forceinline__ Group<float> random4(const ExampleNoise& noise, uint32_t group) {
    return normals4(noise, group);
  }

  // sigma2_out is `apart` floats after mu_out.
  static __device__ __forceinline__ float step(const Row& row, float x, const float* mu_out,
                                               int apart, bool is_observed, Observed observed,
                                               bool is_drawn, float eps) {
    const float sigma2_out = kLearned ? mu_out[apart] : 0.0f;
    Moments<float> p = reverse_moments<kLearned>(row, x, *mu_out, sigma2_out);
    if (is_observed) p = observe(p, observed.first, observed.second);
    return is_drawn ? with_noise(p, eps) : p.mu;
  }

  static __device__ __forceinline__ float noised(const float* level, float value, float eps) {
    return dpm::noised(NoiseRow<float>{level[0], level[1]}, value, eps);
  }
};

struct BinomialProcess {
  using Row = BernoulliRow<float>;

  static __device__ __forceinline__ Observed observed(float y, float flip) {
    return {bernoulli_observed(y, flip), 0.0f};
  }

  static __device__ __forceinline__ Group<float> random4(const ExampleNoise& noise, uint32_t group) {
    return uniforms4(noise, group);
  }

  static __device__ __forceinline__ float step(const Row& row, float x, const float* logit_out, int,
                                               bool is_observed, Observed observed, bool is_drawn,
                                               float u) {
    const float shift = is_observed ? observed.first : 0.0f;
    const Odds<float> odds = bernoulli_odds(row, x, *logit_out, shift);
    return is_drawn ? bernoulli_drawn(odds, u) : bernoulli_likelier(odds);
  }

  static __device__ __forceinline__ float noised(const float* level, float value, float u) {
    const float rates[2] = {level[0], level[1]};
    return bernoulli_noised(rates, value, u);
  }
};

}  // namespace dpm
