// Terms of the bound at consecutive timesteps, network included: what the launchers are given.
#pragma once

#include "trajectory.h"

namespace dpm {

struct BoundTermsArgs {
  int64_t N, D;
  int64_t first, last;      // timesteps, descending by one
  NetworkArgs network;
  bool is_binomial, is_learned;  // bits; whether the network gives sigma2_out after mu_out
  const float* rows;        // (T + 1, kRowColumns or kBernoulliColumns)
  const float* levels;      // (T + 1, 2) of the forward process
  uint64_t seed;
  uint32_t forward_stream;
  const int64_t* ids;       // (N,) of the noise
  const float* x_0;         // (N, D)
  double* nats;             // (first - last + 1, N)

  DPM_INLINE int64_t num_timesteps() const { return first - last + 1; }
};

// Timesteps of a block, descending.
struct Run {
  int64_t first, last;
};

// A block of a GPU takes its examples through a run of timesteps, for which it first fetches the
// network: so many are worth that, and so many blocks, of all that a GPU holds at a time, keep it
// busy to the end.
constexpr int64_t kLeastRun = 8;
constexpr int64_t kRounds = 4;

struct Runs {
  int64_t length;  // timesteps of each, but the last one

  static int64_t most(int64_t num_timesteps) { return (num_timesteps + kLeastRun - 1) / kLeastRun; }

  // Of `num_tiles` tiles of examples, where a GPU holds so many blocks at a time.
  Runs(int64_t num_timesteps, int64_t num_tiles, int64_t num_places) {
    const int64_t wanted = (kRounds * num_places + num_tiles - 1) / num_tiles;
    length = (num_timesteps + wanted - 1) / wanted;
    length = length < kLeastRun ? kLeastRun : length;
  }

  unsigned count(int64_t num_timesteps) const {
    return static_cast<unsigned>((num_timesteps + length - 1) / length);
  }

  DPM_INLINE Run operator()(const BoundTermsArgs& args, int64_t number) const {
    const int64_t first = args.first - number * length, end = first - length + 1;
    return {first, end < args.last ? args.last : end};
  }
};

DPM_DECLARE_CPU(bound_terms, BoundTermsArgs)         // of networks without a stack
DPM_DECLARE_CUDA(bound_terms, BoundTermsArgs)        // likewise
DPM_DECLARE_CUDA(image_bound_terms, BoundTermsArgs)  // of those that are a stack, no dense layers

}  // namespace dpm
