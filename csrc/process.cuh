// Steps of an element of a trajectory and terms of its bound, by the kind of its process.
#pragma once

#include "bernoulli.h"
#include "kl.h"
#include "launch.cuh"
#include "noise.h"
#include "step.h"
#include "storage.h"

namespace dpm {

// What is observed of an element, as a process wants it.
struct Observed {
  float first, second;
};

// Of a network for an element: mu_out and sigma2_out, or the logit.
struct Outputs {
  float first, second;
};

template <bool kLearned>
struct GaussianProcess {
  using Row = ReverseRow<float>;
  using RowOfTerms = dpm::Row<float>;

  static __device__ __forceinline__ Observed observed(float y, float sigma2_y) {
    return {y, sigma2_y};
  }

  static __device__ __forceinline__ Group<float> random4(const ExampleNoise& noise, uint32_t group) {
    return normals4(noise, group);
  }

  // sigma2_out is `apart` elements after mu_out.
  template <class Element>
  static __device__ __forceinline__ Outputs outputs(const Element* mu_out, int apart) {
    return {to_float(*mu_out), kLearned ? to_float(mu_out[apart]) : 0.0f};
  }

  static __device__ __forceinline__ float step(const Row& row, float x, Outputs out,
                                               bool is_observed, Observed observed, bool is_drawn,
                                               float eps) {
    Moments<float> p = reverse_moments<kLearned>(row, x, out.first, out.second);
    if (is_observed) p = observe(p, observed.first, observed.second);
    return is_drawn ? with_noise(p, eps) : p.mu;
  }

  static __device__ __forceinline__ float noised(const float* level, float value, float eps) {
    return dpm::noised(NoiseRow<float>{level[0], level[1]}, value, eps);
  }

  // NaN of a row that is no variance.
  static __device__ __forceinline__ float nats(const RowOfTerms& row, float x_0, float x_t,
                                               Outputs out) {
    const auto variance = reverse_variance<kLearned>(row, out.second);
    const auto mean = kl_mean(row, variance, x_0, x_t, out.first);
    const float nats = kl_nats(row, variance, mean.difference).nats;
    return row.base > 0 ? nats : NAN;
  }
};

struct BinomialProcess {
  using Row = BernoulliRow<float>;
  using RowOfTerms = Row;

  static __device__ __forceinline__ Observed observed(float y, float flip) {
    return {bernoulli_observed(y, flip), 0.0f};
  }

  static __device__ __forceinline__ Group<float> random4(const ExampleNoise& noise, uint32_t group) {
    return uniforms4(noise, group);
  }

  template <class Element>
  static __device__ __forceinline__ Outputs outputs(const Element* logit_out, int) {
    return {to_float(*logit_out), 0.0f};
  }

  static __device__ __forceinline__ float step(const Row& row, float x, Outputs out,
                                               bool is_observed, Observed observed, bool is_drawn,
                                               float u) {
    const float shift = is_observed ? observed.first : 0.0f;
    const Odds<float> odds = bernoulli_odds(row, x, out.first, shift);
    return is_drawn ? bernoulli_drawn(odds, u) : bernoulli_likelier(odds);
  }

  static __device__ __forceinline__ float noised(const float* level, float value, float u) {
    const float rates[2] = {level[0], level[1]};
    return bernoulli_noised(rates, value, u);
  }

  static __device__ __forceinline__ float nats(const RowOfTerms& row, float x_0, float x_t,
                                               Outputs out) {
    return bernoulli_nats(row, x_0, x_t, out.first).nats;
  }
};

// f(process): of a kernel that serves all of them.
template <class F>
__device__ __forceinline__ void with_process(bool is_binomial, bool is_learned, F f) {
  if (is_binomial) {
    f(BinomialProcess());
  } else if (is_learned) {
    f(GaussianProcess<true>());
  } else {
    f(GaussianProcess<false>());
  }
}

}  // namespace dpm
