// Whole reverse trajectories: what the launcher is given.
#pragma once

#include "activation.h"
#include "args.h"
#include "multiscale_conv.h"

namespace dpm {

// A dense layer whose coefficients may depend on t.
struct TimedDense {
  int64_t inputs, outputs;
  const float* weights;  // (outputs, inputs), or (T + 1, outputs, inputs)
  const float* bias;     // (outputs,), or (T + 1, outputs)
  int64_t weights_step, bias_step;  // floats from one timestep to the next, 0 for one layer for all
};

// Features of x and then the readout: normalized radial basis functions, or dense layers; or, of
// images, a stack of convolutions beside the dense layers and then layers of each pixel.
struct NetworkArgs {
  int64_t num_units;     // of radial basis functions, 0 for none
  const float* centers;  // (units, D)
  const float* scales;   // (units,): -log2(e) / (2 width^2)
  int num_layers;        // the last one is the readout, without an activation
  const TimedDense* layers;
  Activation activation;
  float slope;           // of a leaky ReLU
  const MultiscaleConvArgs* stack;  // of N images, with a tail without a linear layer; dense layers
                                    // take and give pixels in the order (y, x, channel) then
  void* packed;          // of a stack on a GPU: room for ResidentImages::packed_bytes
  int64_t packed_bytes;
  bool tf32;             // likewise: one product of 10 bits each, not three
};

struct TrajectoryArgs {
  int64_t N, D;
  int64_t first, last;       // of the timesteps from which steps are taken, descending
  const int64_t* previous;   // (T + 1,): a step from x_t leads to x_previous[t]
  bool mean_at_1;            // the step to x_0 takes the mean, or the likelier bit
  NetworkArgs network;
  bool is_binomial, is_learned;  // bits; whether the network gives sigma2_out after mu_out
  const float* rows;         // (T + 1, kRowColumns or kBernoulliColumns)
  uint64_t seed;
  uint32_t reverse_stream, forward_stream;
  const int64_t* ids;        // (N,)
  const float* x;            // (N, D), x_t at `first`
  Strided y, spread;         // (N, D) of what is observed: sigma2_y, or the probability of a flip
  Strided mask, values;      // (N, D) of known elements; both of these pairs may be absent
  const float* levels;       // (T + 1, 2), to noise known values to their step's level, or none
  float* out;                // (N, D), where the step from `last` leads
  const int64_t* state_of;   // (T + 1,): which of the states x_t is, another number for none
  int64_t num_states;
  float* states;             // (num_states, N, D)

  // Where a step from x_t leads: to an earlier timestep, whatever the table says.
  DPM_INLINE int64_t after(int64_t t) const {
    const int64_t to = previous[t];
    return to < 0 ? 0 : to < t ? to : t - 1;
  }
  // Whether the step to x_to draws random numbers, and whether it noises known elements.
  DPM_INLINE bool is_drawn(int64_t to) const { return to > 0 || !mean_at_1; }
  DPM_INLINE bool is_noised(int64_t to) const { return levels && to > 0; }

  // Where x_t goes, or nowhere.
  DPM_INLINE float* state(int64_t t) const {
    const int64_t i = state_of[t];
    return i >= 0 && i < num_states ? states + i * N * D : nullptr;
  }
};

DPM_DECLARE_CPU(trajectory, TrajectoryArgs)
DPM_DECLARE_CUDA(trajectory, TrajectoryArgs)        // of networks without a stack
DPM_DECLARE_CUDA(image_trajectory, TrajectoryArgs)  // of those that are a stack, no dense layers

}  // namespace dpm
