// A network of vectors whose parameters stay in the shared memory of a block, with the examples that
// it evaluates: what lies where. Sizes alone decide that, so a host without a GPU can say what a
// network needs.
#pragma once

#include "trajectory.h"

namespace dpm {

constexpr int kQuad = 4;  // floats of one access: outputs and examples come in such groups

DPM_INLINE int64_t whole_quads(int64_t count) { return (count + kQuad - 1) / kQuad * kQuad; }

// Weights lie as [input][output], outputs filled up with zeros, each in what is there for all
// timesteps or in what belongs to one.
struct ResidentDense {
  TimedDense given;
  int columns;        // outputs, whole quads
  int weights, bias;  // floats from the beginning of either part
};

// In floats: what is there for all timesteps; twice what belongs to one, which a block has while the
// next one arrives; then rows of one number of each example. Rows are numbered.
struct ResidentNetwork {
  static constexpr int kMaxLayers = 16;  // a kernel takes 4 KB of parameters
  static constexpr int kMostExamples = 64;  // of a block, whole quads

  int D, num_units, num_layers;
  ResidentDense layers[kMaxLayers];
  int centers, scales;           // among what is there for all
  int row, levels;               // in what belongs to a timestep
  int64_t num_fixed, num_timed;  // floats; what fits nowhere may be long
  int hidden[2];                 // rows: a layer's input and its output, by turns; x is the first one
  int numbers, noise_of_known;   // of the step, and of known elements
  int observed, known;           // two for each element
  int ids;                       // 64 bits each
  int64_t num_rows;
  int widest;                    // columns of a layer, or radial basis functions

  // Of `network` nothing but sizes is read here; there must be at most kMaxLayers, and no stack.
  ResidentNetwork(int64_t D, const NetworkArgs& network, int row_columns, bool is_observed,
                  bool is_known, bool is_noised)
      : D(int(D)), num_units(int(network.num_units)), num_layers(network.num_layers),
        num_fixed(0), num_timed(0), num_rows(0), widest(num_units) {
    const auto take = [](int64_t& used, int64_t count) {
      const int begin = int(used);
      used += whole_quads(count);
      return begin;
    };
    centers = take(num_fixed, D * num_units);
    scales = take(num_fixed, num_units);
    row = take(num_timed, row_columns);
    levels = take(num_timed, 2);
    for (int l = 0; l < num_layers; ++l) {
      const TimedDense& given = network.layers[l];
      ResidentDense& layer = layers[l];
      layer.given = given;
      layer.columns = int(whole_quads(given.outputs));
      widest = widest < layer.columns ? layer.columns : widest;
      const int64_t size = given.inputs * layer.columns;
      layer.weights = take(given.weights_step ? num_timed : num_fixed, size);
      layer.bias = take(given.bias_step ? num_timed : num_fixed, layer.columns);
    }
    const auto take_rows = [&](int64_t count) {
      const int begin = int(num_rows);
      num_rows += count;
      return begin;
    };
    take_rows(D);
    hidden[0] = take_rows(whole_quads(widest));
    hidden[1] = take_rows(whole_quads(widest));
    numbers = take_rows(whole_quads(D));
    noise_of_known = take_rows(is_noised ? whole_quads(D) : 0);
    observed = take_rows(is_observed ? 2 * D : 0);
    known = take_rows(is_known ? 2 * D : 0);
    ids = take_rows(2);
  }

  // Of shared memory, with so many examples, whole quads.
  DPM_INLINE int64_t bytes(int num_examples) const {
    return 4 * (num_fixed + 2 * num_timed + num_rows * num_examples);
  }
};

}  // namespace dpm
