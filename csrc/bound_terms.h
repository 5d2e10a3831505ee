// Terms of the bound at a run of timesteps, network included: what the launcher is given.
#pragma once

#include "trajectory.h"

namespace dpm {

struct BoundTermsArgs {
  int64_t N, D;
  int64_t first, last;      // timesteps, descending by one
  NetworkArgs network;      // without a stack
  bool is_binomial, is_learned;  // bits; whether the network gives sigma2_out after mu_out
  const float* rows;        // (T + 1, kRowColumns or kBernoulliColumns)
  const float* levels;      // (T + 1, 2) of the forward process
  uint64_t seed;
  uint32_t forward_stream;
  const int64_t* ids;       // (N,) of the noise
  const float* x_0;         // (N, D)
  double* nats;             // (first - last + 1, N)
};

DPM_DECLARE_CPU(bound_terms, BoundTermsArgs)
DPM_DECLARE_CUDA(bound_terms, BoundTermsArgs)

}  // namespace dpm
