// Dense layers, out = f(W in + b), of examples that are the lanes of vectors: [features][16 examples].
//
// A block of outputs of a group of 16 examples (of two groups, where a register holds one) is a block
// of sums that stay in registers, as for convolutions. Blocks come before groups: a block's weights
// then stay in the L1 cache for all groups, and large weights are read once for as many groups as
// there are.
#pragma once

#include "activation.h"
#include "tile.h"

namespace dpm {
namespace DPM_ISA {

// Sums of a block: 12 or 16 registers. Each is met again late enough for the latency of a
// multiply-add, and less than one load comes with each of them.
#if defined(__AVX512F__)
constexpr int kDenseOutputs = 8, kDenseGroups = 2;
#elif defined(__AVX2__)
constexpr int kDenseOutputs = 6, kDenseGroups = 1;
#else
constexpr int kDenseOutputs = 2, kDenseGroups = 1;
#endif

// Features of groups of 16 examples, in runs of features that lie next to each other: pixels of a
// tile lie in as many runs as it has rows. Distances between runs and groups count floats.
struct Features {
  const float* data;
  int64_t group;
  int64_t run, run_length, num_runs = 1;
};

struct PackedDense {
  int64_t inputs, outputs;
  const float* weights;  // as pack_dense has them
  const float* bias;     // [outputs]
  Activation activation = Activation::linear;
  float slope = 0;       // of a leaky ReLU
};

// Blocks of nearly equal size: a small one at the end would wait for the latency of its sums.
struct DenseBlocks {
  int64_t count, size, num_larger;  // the first ones have an output more than `size`

  DPM_INLINE explicit DenseBlocks(int64_t outputs)
      : count((outputs + kDenseOutputs - 1) / kDenseOutputs),
        size(count ? outputs / count : 0),
        num_larger(outputs - count * size) {}
  DPM_INLINE int64_t first(int64_t block) const {
    return block * size + smaller(block, num_larger);
  }
};

// Weights (outputs, inputs) in the order in which they are read: [block][input][output of the block].
DPM_INLINE void pack_dense(const float* weights, int64_t outputs, int64_t inputs, float* to) {
  const DenseBlocks blocks(outputs);
  for (int64_t block = 0; block < blocks.count; ++block) {
    const int64_t first = blocks.first(block), end = blocks.first(block + 1);
    for (int64_t i = 0; i < inputs; ++i) {
      for (int64_t o = first; o < end; ++o) *to++ = weights[o * inputs + i];
    }
  }
}

template <int kOutputs, int kGroups>
static __attribute__((noinline)) void dense_block(const PackedDense& layer, int64_t first,
                                                  const Features& in, int64_t first_group,
                                                  float* out, int64_t out_group) {
  const float* weights = layer.weights + first * layer.inputs;
  f32x16 sum[kOutputs][kGroups];
  DPM_UNROLL
  for (int o = 0; o < kOutputs; ++o) {
    DPM_UNROLL
    for (int g = 0; g < kGroups; ++g) sum[o][g] = splat<f32x16>(layer.bias[first + o]);
  }
  const float* run = in.data + first_group * in.group;
  for (int64_t r = 0; r < in.num_runs; ++r, run += in.run) {
    const float* from = run;
    for (int64_t k = 0; k < in.run_length; ++k, from += kImages, weights += kOutputs) {
      f32x16 x[kGroups];
      DPM_UNROLL
      for (int g = 0; g < kGroups; ++g) x[g] = load<f32x16>(from + g * in.group);
      DPM_UNROLL
      for (int o = 0; o < kOutputs; ++o) {
        const f32x16 weight = splat<f32x16>(weights[o]);
        DPM_UNROLL
        for (int g = 0; g < kGroups; ++g) sum[o][g] += weight * x[g];
      }
    }
  }
  with_cheap_activation(layer.activation, layer.slope, [&](auto f) {
    DPM_UNROLL
    for (int g = 0; g < kGroups; ++g) {
      float* to = out + (first_group + g) * out_group + first * kImages;
      DPM_UNROLL
      for (int o = 0; o < kOutputs; ++o) store(to + o * kImages, f(sum[o][g]));
    }
  });
}

template <int kGroups, int kOutputs = kDenseOutputs>
DPM_INLINE void dense_block_of(int64_t num_outputs, const PackedDense& layer, int64_t first,
                               const Features& in, int64_t group, float* out, int64_t out_group) {
  if constexpr (kOutputs > 0) {
    if (num_outputs == kOutputs) {
      return dense_block<kOutputs, kGroups>(layer, first, in, group, out, out_group);
    }
    dense_block_of<kGroups, kOutputs - 1>(num_outputs, layer, first, in, group, out, out_group);
  }
}

// out, [outputs][16] of each group, groups `out_group` floats apart; not where `in` is.
DPM_INLINE void dense(const PackedDense& layer, const Features& in, int64_t num_groups,
                      float* out, int64_t out_group) {
  const DenseBlocks blocks(layer.outputs);
  for (int64_t block = 0; block < blocks.count; ++block) {
    const int64_t first = blocks.first(block), outputs = blocks.first(block + 1) - first;
    int64_t g = 0;
    for (; g + kDenseGroups <= num_groups; g += kDenseGroups) {
      dense_block_of<kDenseGroups>(outputs, layer, first, in, g, out, out_group);
    }
    if (kDenseGroups > 1 && g < num_groups) {
      dense_block_of<1>(outputs, layer, first, in, g, out, out_group);
    }
  }
  if (is_cheap(layer.activation)) return;
  with_activation(layer.activation, [&](auto f) {
    for (int64_t g = 0; g < num_groups; ++g) {
      float *to = out + g * out_group, *end = to + layer.outputs * kImages;
      for (; to < end; to += kImages) store(to, f(load<f32x16>(to)));
    }
  });
}

}  // namespace DPM_ISA
}  // namespace dpm
