// Networks of images for 16 of them in the lanes: dpm_fast.networks.ConvDenseNetwork.
#pragma once

#include "dense.h"
#include "pack_conv.h"
#include "trajectory.h"

namespace dpm {
namespace DPM_ISA {

// Parameters in the order in which they are read. An arena without memory counts what they take.
class ImageNetwork {
 public:
  // Groups of a tile share the weights of the dense path, which come from beyond the L2 cache.
  static constexpr int64_t kTileGroups = 4;

  DPM_INLINE ImageNetwork(Arena& arena, const TrajectoryArgs& args)
      : args_(args.network),
        stack_(*args.network.stack),
        sizes_(stack_, false),
        layers_(arena.take<PackedLayer<float>>(stack_.num_layers)),
        dense_(arena.take<PackedDense>(args_.num_layers - 1)),
        x_offsets_(arena.take<int64_t>(args.D)),
        out_offsets_(arena.take<int64_t>(args.D * stack_.tail->O / stack_.layers[0].C)) {
    for (int l = 0; l < stack_.num_layers; ++l) {
      const auto layer = pack<float>(arena, stack_, stack_.layers[l], false);
      if (layers_) layers_[l] = layer;
    }
    tail_ = pack_tail<float>(arena, stack_, false);
    for (int l = 0; l + 1 < args_.num_layers; ++l) {
      const TimedDense& layer = args_.layers[l];
      widest_ = larger(widest_, layer.outputs);
      float* weights = arena.take<float>(layer.outputs * layer.inputs);
      if (!weights) continue;
      pack_dense(layer.weights, layer.outputs, layer.inputs, weights);
      dense_[l] = {layer.inputs, layer.outputs,         weights,
                   layer.bias,   Activation::leaky_relu, args_.slope};
    }
    if (x_offsets_) set_offsets();
  }

  // A thread's images: several groups of 16, evaluated together.
  class Tile {
   public:
    DPM_INLINE Tile(Arena& arena, const ImageNetwork& network, int64_t num_groups)
        : network_(network),
          x_(image(network.stack_.layers[0].C, network.sizes_.halo)),
          beside_(image(network.tail_.K, 0)),
          out_(image(network.tail_.O, 0)),
          scratch_(arena, network.stack_, network.sizes_, false) {
      arena.take<char>(scratch_.num_bytes - arena.used());
      x_.data = arena.take<float>(num_groups * x_.size());
      beside_.data = arena.take<float>(num_groups * beside_.size());
      out_.data = arena.take<float>(num_groups * out_.size());
      for (float*& hidden : hidden_) {
        hidden = arena.take<float>(num_groups * network.widest_ * kImages);
      }
      if (!x_.data) return;
      for (int64_t g = 0; g < num_groups; ++g) fill_halo(of_group(x_, g));  // which nobody changes
    }

    // The lanes of an element, and of an output of the network: mu_out before sigma2_out.
    DPM_INLINE float* x(int64_t group, int64_t d) const {
      return x_.data + group * x_.size() + network_.x_offsets_[d];
    }
    DPM_INLINE const float* out(int64_t group, int64_t k) const {
      return out_.data + group * out_.size() + network_.out_offsets_[k];
    }

    DPM_INLINE void evaluate(int64_t t, int64_t num_groups) {
      dense_path(num_groups);
      set_readout(t);
      for (int64_t g = 0; g < num_groups; ++g) {
        Pyramid<float> in = scratch_.in.with_channels(x_.C);
        in.levels[0] = of_group(x_, g);
        const auto no_signs = [](int) -> uint16_t* { return nullptr; };
        const auto keep_nothing = [](int, const dpm::DPM_ISA::Tile<float>&) {};
        in = stack_forward(network_.form(), network_.layers_, network_.stack_.num_layers, in,
                           scratch_, no_signs, keep_nothing);
        TailWorking<float> working = scratch_.tail;
        working.beside = of_group(beside_, g);
        working.out = of_group(out_, g);
        tail_forward<false>(network_.tail_, working, in[0]);
      }
    }

   private:
    DPM_INLINE dpm::DPM_ISA::Tile<float> image(int64_t channels, int64_t halo) const {
      return {nullptr, network_.stack_.H, network_.stack_.W, channels, halo};
    }
    static DPM_INLINE dpm::DPM_ISA::Tile<float> of_group(dpm::DPM_ISA::Tile<float> tile,
                                                        int64_t group) {
      tile.data += group * tile.size();
      return tile;
    }

    DPM_INLINE void dense_path(int64_t num_groups) const {
      const int num_layers = network_.args_.num_layers - 1;
      Features in{x_.at(0, 0), x_.size(), x_.row(), x_.W * x_.C, x_.H};
      for (int l = 0; l < num_layers; ++l) {
        const PackedDense& layer = network_.dense_[l];
        const bool is_last = l + 1 == num_layers;
        float* const to = is_last ? beside_.data : hidden_[l % 2];
        const int64_t group = is_last ? beside_.size() : network_.widest_ * kImages;
        dense(layer, in, num_groups, to, group);
        in = {to, group, 0, layer.outputs};
      }
    }

    DPM_INLINE void set_readout(int64_t t) const {
      const TimedDense& layer = network_.args_.layers[network_.args_.num_layers - 1];
      const float* weights = layer.weights + t * layer.weights_step;
      const auto weight = [&](int64_t o, int64_t p, int64_t, int64_t) {
        return weights[o * layer.inputs + p];
      };
      pack_kernel(layer.outputs, layer.inputs, 1, x_.W, weight, scratch_.tail.readout.weight);
      for (int64_t o = 0; o < layer.outputs; ++o) {
        scratch_.tail.readout.bias[o] = layer.bias[t * layer.bias_step + o];
      }
    }

    const ImageNetwork& network_;
    dpm::DPM_ISA::Tile<float> x_, beside_, out_;  // of the first group; the others follow
    Scratch<float> scratch_;                      // of one group
    float* hidden_[2];
  };

 private:
  DPM_INLINE Form<float> form() const {
    return {stack_.num_scales, stack_.after_sum, args_.slope};
  }

  DPM_INLINE void set_offsets() {
    const int64_t C = stack_.layers[0].C, O = tail_.O, pixels = stack_.H * stack_.W;
    const dpm::DPM_ISA::Tile<float> x{nullptr, stack_.H, stack_.W, C, sizes_.halo};
    for (int64_t c = 0; c < larger(C, O); ++c) {
      for (int64_t i = 0; i < pixels; ++i) {
        const int64_t row = i / stack_.W + x.halo, column = i % stack_.W + x.halo;
        if (c < C) x_offsets_[c * pixels + i] = row * x.row() + column * x.pixel() + c * kImages;
        if (c < O) out_offsets_[c * pixels + i] = (i * O + c) * kImages;
      }
    }
  }

  const NetworkArgs& args_;
  const MultiscaleConvArgs& stack_;
  const Sizes sizes_;
  PackedLayer<float>* layers_;
  PackedDense* dense_;
  int64_t *x_offsets_, *out_offsets_;
  PackedTail<float> tail_;
  int64_t widest_ = 0;  // of the dense path
};

}  // namespace DPM_ISA
}  // namespace dpm
