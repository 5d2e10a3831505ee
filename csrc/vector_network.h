// Networks of vectors for 16 examples in the lanes: dpm_fast.networks.RBFNetwork and MLP.
#pragma once

#include "dense.h"
#include "memory.h"
#include "trajectory.h"

namespace dpm {
namespace DPM_ISA {

// Parameters in the order in which they are read, for t = last ... first. An arena without memory
// counts what they take.
class VectorNetwork {
 public:
  // Two groups share the weights that come from the L2 cache, more would not fit in L1.
  static constexpr int64_t kTileGroups = 2;

  template <class Args>  // of `trajectory` or `bound_terms`
  DPM_INLINE VectorNetwork(Arena& arena, const Args& args)
      : args_(args.network), D_(args.D), last_(args.last) {
    packed_ = arena.take<float*>(args_.num_layers);
    const int64_t num_zeros = args_.num_units ? args_.layers[0].outputs : 0;
    zeros_ = arena.take<float>(num_zeros);
    for (int64_t k = 0; zeros_ && k < num_zeros; ++k) zeros_[k] = 0;
    for (int l = 0; l < args_.num_layers; ++l) {
      const TimedDense& layer = args_.layers[l];
      width_ = larger(width_, larger(layer.inputs, layer.outputs));
      const int64_t times = layer.weights_step ? args.first - args.last + 1 : 1;
      const int64_t size = layer.outputs * layer.inputs;
      float* weights = arena.take<float>(times * size);
      if (!weights) continue;
      packed_[l] = weights;
      for (int64_t i = 0; i < times; ++i) {
        const float* from = layer.weights + (args.last + i) * layer.weights_step;
        pack_dense(from, layer.outputs, layer.inputs, weights + i * size);
      }
    }
  }

  // A thread's examples: several groups of 16, evaluated together.
  class Tile {
   public:
    DPM_INLINE Tile(Arena& arena, const VectorNetwork& network, int64_t num_groups)
        : network_(network),
          group_(network.width_ * kImages),
          x_(arena.take<float>(num_groups * group_)),
          out_(arena.take<float>(num_groups * group_)),
          other_(arena.take<float>(num_groups * group_)),
          scales_(arena.take<float>(network.args_.num_units ? num_groups * kImages : 0)) {}

    // The lanes of an element, and of an output of the network: mu_out before sigma2_out.
    DPM_INLINE float* x(int64_t group, int64_t d) const {
      return x_ + group * group_ + d * kImages;
    }
    DPM_INLINE const float* out(int64_t group, int64_t k) const {
      return out_ + group * group_ + k * kImages;
    }

    DPM_INLINE void evaluate(int64_t t, int64_t num_groups) {
      const NetworkArgs& args = network_.args_;
      const float* in = x_;
      if (args.num_units) {
        for (int64_t g = 0; g < num_groups; ++g) {
          store(scales_ + g * kImages, network_.radial(x(g, 0), other_ + g * group_));
        }
        in = other_;
      }
      for (int l = 0; l < args.num_layers; ++l) {
        const PackedDense layer = network_.layer(l, t);
        dense(layer, {in, group_, 0, layer.inputs}, num_groups, out_, group_);
        if (l + 1 == args.num_layers) break;
        float* const result = out_;
        out_ = other_;
        in = other_ = result;
      }
      if (!args.num_units) return;
      const TimedDense& readout = args.layers[0];
      const float* bias = readout.bias + t * readout.bias_step;
      for (int64_t g = 0; g < num_groups; ++g) {
        const f32x16 scale = load<f32x16>(scales_ + g * kImages);
        for (int64_t k = 0; k < readout.outputs; ++k) {
          float* value = out_ + g * group_ + k * kImages;
          store(value, load<f32x16>(value) * scale + bias[k]);
        }
      }
    }

   private:
    const VectorNetwork& network_;
    int64_t group_;
    float *x_, *out_, *other_;
    float* scales_;  // normalize radial basis functions
  };

 private:
  DPM_INLINE PackedDense layer(int l, int64_t t) const {
    const TimedDense& layer = args_.layers[l];
    const int64_t size = layer.weights_step ? layer.outputs * layer.inputs : 0;
    const bool is_last = l + 1 == args_.num_layers;
    return {layer.inputs, layer.outputs, packed_[l] + (t - last_) * size,
            args_.num_units ? zeros_ : layer.bias + t * layer.bias_step,
            is_last ? Activation::linear : args_.activation, args_.slope};
  }

  // 1 / sum over units of exp(-|x - c|^2 / 2 w^2), which go to [units][16].
  DPM_INLINE f32x16 radial(const float* x, float* features) const {
    const int64_t K = args_.num_units;
    f32x16 sum{};
    for (int64_t k = 0; k < K; ++k) {
      const f32x16 height = exp2_of_negative(exponent(x, k));
      store(features + k * kImages, height);
      sum += height;
    }
    const auto is_near = sum > 1e-30f;
    if (!all_lanes(is_near)) {  // far from every center: relative to the nearest one then
      f32x16 nearest = splat<f32x16>(-INFINITY);
      for (int64_t k = 0; k < K; ++k) nearest = max(nearest, exponent(x, k));
      sum = f32x16{};
      for (int64_t k = 0; k < K; ++k) {
        const f32x16 height = exp2_of_negative(exponent(x, k) - nearest);
        const f32x16 kept = select(is_near, load<f32x16>(features + k * kImages), height);
        store(features + k * kImages, kept);
        sum += kept;
      }
    }
    return 1.0f / sum;
  }

  // Of 2.
  DPM_INLINE f32x16 exponent(const float* x, int64_t k) const {
    const float* center = args_.centers + k * D_;
    f32x16 square{};
    for (int64_t d = 0; d < D_; ++d) {
      const f32x16 distance = load<f32x16>(x + d * kImages) - center[d];
      square += distance * distance;
    }
    return square * args_.scales[k];
  }

  const NetworkArgs& args_;
  int64_t D_, last_, width_ = 1;
  float** packed_;
  float* zeros_;  // a bias before the outputs of radial basis functions are normalized
};

}  // namespace DPM_ISA
}  // namespace dpm
