// What stacks of multiscale convolutions and their tails need before they begin: parameters in the
// order of the kernels, and working memory.
#pragma once

#include "memory.h"
#include "pairs.h"
#include "tail.h"

namespace dpm {
namespace DPM_ISA {

// Sizes that follow from the arguments.
// Numbers that a layer's convolutions work with.
DPM_INLINE int64_t num_points([[maybe_unused]] const MultiscaleConvArgs& args,
                              const ConvLayer& layer, [[maybe_unused]] bool for_gradient) {
#if defined(DPM_PAIRS)
  return 2 * num_offsets(layer.C, layer.K);  // of twice the size
#else
  int64_t most = 0;
  for (int s = 0; s < args.num_scales && args.dtype != DType::float64; ++s) {
    const int64_t H = args.H >> s, W = args.W >> s;
    if (uses_toom_cook<float>(layer.K, layer.C, layer.F, W)) {
      most = larger(most, toom_cook_size(H, W, layer.C, layer.F, for_gradient));
    }
  }
  return most;
#endif
}

struct Sizes {
  int64_t images, groups;               // images of a group
  int64_t halo = 0, width = 0;          // channels of the widest tile
  int64_t sums = 0, points = 0;         // of the layer that needs most of them
  int64_t stack_parameters = 0, parameters;  // of the stack, and with those of its tail
  int64_t widest;                            // channels of any layer

  DPM_INLINE Sizes(const MultiscaleConvArgs& args, bool for_gradient)
      : images(kImages / args.parts), groups((args.N + images - 1) / images) {
    for (int l = 0; l < args.num_layers; ++l) {
      const ConvLayer& layer = args.layers[l];
      halo = larger(halo, layer.K / 2);
      width = larger(width, larger(layer.C, layer.F));
      sums = larger(sums, sums_size(layer.C, layer.F, layer.K));
      points = larger(points, num_points(args, layer, for_gradient));
      for (int s = 0; s < args.num_scales; ++s) {
        stack_parameters += num_weights(layer) + num_biases(args, layer, s);
      }
    }
    parameters = stack_parameters;
    widest = width;
    if (!args.tail) return;
    widest = larger(widest, larger(args.tail->O, args.tail->P));
    for (int l = 0; l < args.tail->num_layers; ++l) {
      const PixelLayer& layer = args.tail->layers[l];
      parameters += layer.F * (layer.C + 1);
      widest = larger(widest, larger(layer.C, layer.F));
    }
    sums = larger(sums, widest);
  }

  static DPM_INLINE int64_t num_weights(const ConvLayer& layer) {
    return layer.F * layer.C * layer.K * layer.K;
  }
  static DPM_INLINE int64_t num_biases(const MultiscaleConvArgs& args, const ConvLayer& layer, int s) {
    return layer.F * (layer.bias_per_location ? (args.H >> s) * (args.W >> s) : 1);
  }
};

template <class T>
static Pyramid<T> take_pyramid(Arena& arena, const MultiscaleConvArgs& args, const Sizes& sizes) {
  Pyramid<T> pyramid{};
  for (int s = 0; s < args.num_scales; ++s) {
    Tile<T>& tile = pyramid.levels[s];
    tile = {nullptr, args.H >> s, args.W >> s, sizes.width, sizes.halo, args.parts};
    tile.data = arena.take<T>(tile.size());
  }
  return pyramid;
}

template <class Storage>
static ScalarOf<Storage> widened(const void* data, int64_t i) {
  const Storage value = static_cast<const Storage*>(data)[i];
  if constexpr (std::is_same_v<Storage, double>) {
    return value;
  } else {
    return to_float(value);
  }
}

// One kernel as `convolve_scale` takes it, from weight(output, input, y, x).
template <class T, class Weight>
static void pack_kernel(int64_t F, int64_t C, int64_t K, int64_t W, Weight weight, T* to) {
  const bool at_points = uses_toom_cook<T>(K, C, F, W);
  for (int64_t f = 0; f < F; ++f) {
    for (int64_t c = 0; c < C; ++c) {
      for (int64_t y = 0; y < K; ++y) {
        if (at_points) {
          const double row[3] = {weight(f, c, y, 0), weight(f, c, y, 1), weight(f, c, y, 2)};
          for (int point = 0; point < kPoints; ++point) {
            to[toom_cook_index(F, C, f, c, y, point)] = T(kernel_at_point(point, row));
          }
          continue;
        }
        for (int64_t x = 0; x < K; ++x) {
          to[packed_index(F, C, K, f, c, y, x)] = T(weight(f, c, y, x));
        }
      }
    }
  }
}

template <class Storage>
static PackedLayer<ScalarOf<Storage>> pack(Arena& arena, const MultiscaleConvArgs& args,
                                    const ConvLayer& layer, bool for_gradient) {
  using T = ScalarOf<Storage>;
  const int64_t C = layer.C, F = layer.F, K = layer.K;
  PackedLayer<T> packed{C, F, K, layer.bias_per_location ? F : 0, {}, {}, {}};
  for (int s = 0; s < args.num_scales; ++s) {
    const int64_t W = args.W >> s, pixels = Sizes::num_biases(args, layer, s) / F;
    T* bias = packed.biases[s] = arena.take<T>(for_gradient ? 0 : pixels * F);
    T* kernel = arena.take<T>(sums_size(C, F, K));
    (for_gradient ? packed.transposed : packed.weights)[s] = kernel;
    if (!kernel) continue;
    const auto weight = [&](int64_t f, int64_t c, int64_t y, int64_t x) {
      return widened<Storage>(layer.weights[s], ((f * C + c) * K + y) * K + x);
    };
    const auto turned = [&](int64_t c, int64_t f, int64_t y, int64_t x) {
      return weight(f, c, K - 1 - y, K - 1 - x);
    };
    if (for_gradient) {
      pack_kernel(C, F, K, W, turned, kernel);
      continue;
    }
#if defined(DPM_PAIRS)
    static_assert(std::is_same_v<Storage, bf16>);
    pack_pairs(F, C, K, weight, kernel);
#else
    pack_kernel(F, C, K, W, weight, kernel);
#endif
    for (int64_t f = 0; f < F; ++f) {
      for (int64_t i = 0; i < pixels; ++i) {
        bias[i * F + f] = widened<Storage>(layer.biases[s], f * pixels + i);
      }
    }
  }
  return packed;
}

template <class Storage>
static PackedTail<ScalarOf<Storage>> pack_tail(Arena& arena, const MultiscaleConvArgs& args,
                                        bool for_gradient) {
  using T = ScalarOf<Storage>;
  if (!args.tail) return {};
  const Tail& tail = *args.tail;
  PackedTail<T> packed{tail.num_layers, args.layers[args.num_layers - 1].F, tail.K, tail.P,
                       tail.O,          static_cast<T>(args.slope),         {}};
  for (int l = 0; l < tail.num_layers; ++l) {
    const int64_t C = tail.layers[l].C, F = tail.layers[l].F;
    const auto weight = [&](int64_t f, int64_t c, int64_t, int64_t) {
      return widened<Storage>(tail.layers[l].weight, f * C + c);
    };
    const auto turned = [&](int64_t c, int64_t f, int64_t, int64_t) { return weight(f, c, 0, 0); };
    PackedPixelLayer<T>& to = packed.layers[l];
    to = {C, F, arena.take<T>(F * C), arena.take<T>(F), arena.take<T>(for_gradient ? F * C : 0)};
    if (!to.weight) continue;
    pack_kernel(F, C, 1, args.W, weight, to.weight);
    for (int64_t f = 0; f < F; ++f) to.bias[f] = widened<Storage>(tail.layers[l].bias, f);
    if (for_gradient) pack_kernel(C, F, 1, args.W, turned, to.transposed);
  }
  return packed;
}

template <class T>
static TailWorking<T> take_tail(Arena& arena, const MultiscaleConvArgs& args, const Sizes& sizes,
                         bool for_gradient) {
  const Tail& tail = *args.tail;
  const auto image = [&](int64_t channels) {
    const Tile<T> tile{nullptr, args.H, args.W, channels, 0, args.parts};
    return Tile<T>{arena.take<T>(tile.size()), args.H, args.W, channels, 0, args.parts};
  };
  const int64_t row = args.W * sizes.widest * kImages, num_weights = tail.O * tail.P * kImages;
  TailWorking<T> working{};
  for (int l = 0; l <= tail.num_layers; ++l) working.rows[l] = arena.take<T>(row);
  working.beside = image(tail.K);
  working.out = image(tail.O);
  working.readout.weight = arena.take<T>(num_weights);
  working.readout.bias = arena.take<T>(tail.O * kImages);
  if (!for_gradient) return working;
  working.readout.transposed = arena.take<T>(num_weights);
  for (T*& grad : working.grad_rows) grad = arena.take<T>(row);
  working.grad_beside = image(tail.K);
  for (int l = 0; l < tail.num_layers; ++l) {
    working.grad_weights[l] = arena.take<T>(tail.layers[l].F * tail.layers[l].C * kImages);
  }
  working.grad_weight = arena.take<T>(num_weights);
  working.grad_bias = arena.take<T>(tail.O * kImages);
  return working;
}

// Working memory of one thread.
template <class T>
struct Scratch {
  Pyramid<T> in, out, other;
  Working<T> working{};
  TailWorking<T> tail{};
  int64_t num_bytes;

  DPM_INLINE Scratch(Arena arena, const MultiscaleConvArgs& args, const Sizes& sizes, bool for_gradient)
      : in(take_pyramid<T>(arena, args, sizes)), out(take_pyramid<T>(arena, args, sizes)) {
    working.points = arena.take<T>(sizes.points);
    if (for_gradient) {
      other = take_pyramid<T>(arena, args, sizes);
      working.lanes = arena.take<T>(sizes.sums * kImages);
      working.sums = arena.take<T>(sizes.sums);
    }
    if (args.tail) tail = take_tail<T>(arena, args, sizes, for_gradient);
    num_bytes = arena.used();
  }
};

// The output of a stack, in tiles of `scratch`, from in[0]. signs(l): where those of layer l go;
// keep(l, tile) is given its output.
template <class T, class Signs, class Keep>
static Pyramid<T> stack_forward(const Form<T>& form, const PackedLayer<T>* layers, int num_layers,
                                Pyramid<T> in, const Scratch<T>& scratch, Signs signs, Keep keep) {
  for (int l = 0; l < num_layers; ++l) {
    Pyramid<T> out = (l % 2 ? scratch.in : scratch.out).with_channels(layers[l].F);
    layer_forward(form, layers[l], in, out, signs(l), scratch.working);
    keep(l, out[0]);
    in = out;
  }
  return in;
}

#if defined(DPM_PAIRS)
// The same from pairs, in[0]; as pairs, or as floats.
static Tile<float> stack_forward_in_pairs(const Form<float>& form, const PackedLayer<float>* layers,
                                          int num_layers, Pyramid<float> in,
                                          const Scratch<float>& scratch, bool as_pairs) {
  for (int l = 0; l < num_layers; ++l) {
    const Pyramid<float>& memory = l % 2 ? scratch.in : scratch.out;
    const Pyramid<float> out = memory.with_channels(layers[l].F);
    const bool is_last = l + 1 == num_layers;
    const Tile<float> result =
        layer_forward_in_pairs(form, layers[l], in, out, as_pairs || !is_last,
                               reinterpret_cast<int64_t*>(scratch.working.points));
    in = memory.with_channels(num_pairs(layers[l].F));
    in.levels[0] = result;
  }
  return in[0];
}
#endif

}  // namespace DPM_ISA
}  // namespace dpm
