// The CPU launchers of `multiscale_conv`: a whole stack of layers for 16 images at a time, which stay
// in the layout of tile.h from the first layer to the last.
#include "multiscale_conv.h"

#include <omp.h>

#include "memory.h"
#include "multiscale_layer.h"

namespace dpm {
namespace DPM_ISA {
namespace {

// Gradients of parameters are summed along so many chains of groups at most, then over the chains:
// the order must not depend on the number of threads, and every chain takes memory.
constexpr int64_t kMaxChains = 64;

// Sizes that follow from the arguments.
struct Sizes {
  int64_t images, groups;               // images of a group
  int64_t halo = 0, width = 0;          // channels of the widest tile
  int64_t sums = 0, points = 0;         // of the layer that needs most of them
  int64_t parameters = 0;               // of all layers

  Sizes(const MultiscaleConvArgs& args, bool for_gradient)
      : images(kImages / args.parts), groups((args.N + images - 1) / images) {
    for (int l = 0; l < args.num_layers; ++l) {
      const ConvLayer& layer = args.layers[l];
      halo = larger(halo, layer.K / 2);
      width = larger(width, larger(layer.C, layer.F));
      sums = larger(sums, sums_size(layer.C, layer.F, layer.K));
      for (int s = 0; s < args.num_scales; ++s) {
        const int64_t H = args.H >> s, W = args.W >> s;
        if (args.dtype != DType::float64 && uses_toom_cook<float>(layer.K, layer.C, layer.F, W)) {
          points = larger(points, toom_cook_size(H, W, layer.C, layer.F, for_gradient));
        }
        parameters += num_weights(layer) + num_biases(args, layer, s);
      }
    }
  }

  static int64_t num_weights(const ConvLayer& layer) {
    return layer.F * layer.C * layer.K * layer.K;
  }
  static int64_t num_biases(const MultiscaleConvArgs& args, const ConvLayer& layer, int s) {
    return layer.F * (layer.bias_per_location ? (args.H >> s) * (args.W >> s) : 1);
  }
};

template <class T>
Pyramid<T> take_pyramid(Arena& arena, const MultiscaleConvArgs& args, const Sizes& sizes) {
  Pyramid<T> pyramid{};
  for (int s = 0; s < args.num_scales; ++s) {
    Tile<T>& tile = pyramid.levels[s];
    tile = {nullptr, args.H >> s, args.W >> s, sizes.width, sizes.halo, args.parts};
    tile.data = arena.take<T>(tile.size());
  }
  return pyramid;
}

template <class Storage>
ScalarOf<Storage> widened(const void* data, int64_t i) {
  const Storage value = static_cast<const Storage*>(data)[i];
  if constexpr (std::is_same_v<Storage, double>) {
    return value;
  } else {
    return to_float(value);
  }
}

// One kernel as `convolve_scale` takes it, from weight(output, input, y, x).
template <class T, class Weight>
void pack_kernel(int64_t F, int64_t C, int64_t K, int64_t W, Weight weight, T* to) {
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
PackedLayer<ScalarOf<Storage>> pack(Arena& arena, const MultiscaleConvArgs& args,
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
    pack_kernel(F, C, K, W, weight, kernel);
    for (int64_t f = 0; f < F; ++f) {
      for (int64_t i = 0; i < pixels; ++i) {
        bias[i * F + f] = widened<Storage>(layer.biases[s], f * pixels + i);
      }
    }
  }
  return packed;
}

// Working memory of one thread.
template <class T>
struct Scratch {
  Pyramid<T> in, out, other;
  Working<T> working{};
  int64_t num_bytes;

  Scratch(Arena arena, const MultiscaleConvArgs& args, const Sizes& sizes, bool for_gradient)
      : in(take_pyramid<T>(arena, args, sizes)), out(take_pyramid<T>(arena, args, sizes)) {
    working.points = arena.take<T>(sizes.points);
    if (for_gradient) {
      other = take_pyramid<T>(arena, args, sizes);
      working.lanes = arena.take<T>(sizes.sums * kImages);
      working.sums = arena.take<T>(sizes.sums);
    }
    num_bytes = arena.used();
  }
};

// What all threads read, and the memory of all.
template <class Storage>
class Plan {
 public:
  using T = ScalarOf<Storage>;

  const MultiscaleConvArgs& args;
  const Sizes sizes;
  const bool for_gradient;
  const int num_chains;  // as many parts of the batch, which are independent of each other
  const int num_threads;
  const Form<T> form;
  PackedLayer<T>* layers;
  T* zeros;  // a bias
  T* sums;   // gradients of all parameters, [chains][parameters]

  Plan(const MultiscaleConvArgs& args, bool for_gradient, int num_threads)
      : args(args),
        sizes(args, for_gradient),
        for_gradient(for_gradient),
        num_chains(static_cast<int>(smaller(sizes.groups, for_gradient ? kMaxChains : INT32_MAX))),
        num_threads(static_cast<int>(smaller(num_threads, num_chains))),
        form{args.num_scales, args.after_sum, static_cast<T>(args.slope)},
        num_shared_bytes_(take(Arena(nullptr))),
        num_bytes_of_thread_(Scratch<T>(Arena(nullptr), args, sizes, for_gradient).num_bytes),
        memory_(num_shared_bytes_ + this->num_threads * num_bytes_of_thread_) {
    take(Arena(memory_.data()));
  }

  Scratch<T> scratch(int thread) const {
    char* base = memory_.data() + num_shared_bytes_ + thread * num_bytes_of_thread_;
    return {Arena(base), args, sizes, for_gradient};
  }

  // A tile of a group that a layer has kept, or will.
  Tile<T> kept(int layer, int64_t group) const {
    Tile<T> tile{nullptr, args.H, args.W, args.layers[layer].F, sizes.halo, args.parts};
    tile.data = static_cast<T*>(args.layers[layer].out) + group * tile.size();
    return tile;
  }
  uint16_t* signs(int layer, int64_t group) const {
    int64_t num_signs = 0;
    for (int s = 0; s < args.num_scales; ++s) {
      num_signs += (args.H >> s) * (args.W >> s) * args.layers[layer].F;
    }
    uint16_t* signs = args.layers[layer].signs;
    return signs ? signs + group * num_signs : nullptr;
  }
  int64_t num_images(int64_t group) const {
    return smaller(sizes.images, args.N - group * sizes.images);
  }

 private:
  // Fills what has memory; returns how much is needed.
  int64_t take(Arena arena) {
    layers = arena.take<PackedLayer<T>>(args.num_layers);
    for (int l = 0; l < args.num_layers; ++l) {
      const PackedLayer<T> packed = pack<Storage>(arena, args, args.layers[l], for_gradient);
      if (layers) layers[l] = packed;
    }
    zeros = arena.take<T>(sizes.width);
    for (int64_t i = 0; zeros && i < sizes.width; ++i) zeros[i] = 0;
    sums = arena.take<T>(for_gradient ? num_chains * sizes.parameters : 0);
    return arena.used();
  }

  int64_t num_shared_bytes_, num_bytes_of_thread_;
  Memory64 memory_;
};

template <class Storage, class T>
void group_forward(const Plan<Storage>& plan, const Scratch<T>& scratch, int64_t group) {
  const MultiscaleConvArgs& args = plan.args;
  Pyramid<T> in = scratch.in.with_channels(args.layers[0].C);
  const int64_t first = group * plan.sizes.images, num_images = plan.num_images(group);
  read_images<Storage>(args.x, first, num_images, in[0]);
  for (int l = 0; l < args.num_layers; ++l) {
    Pyramid<T> out = (l % 2 ? scratch.in : scratch.out).with_channels(args.layers[l].F);
    if (args.layers[l].out) out.levels[0] = plan.kept(l, group);
    layer_forward(plan.form, plan.layers[l], in, out, plan.signs(l, group), scratch.working);
    in = out;
  }
  write_images<Storage>(in[0], args.out, first, num_images);
}

// Adds the gradients of parameters to those of a chain.
template <class Storage, class T>
void group_gradient(const Plan<Storage>& plan, const Scratch<T>& scratch, int64_t group, T* sums) {
  const MultiscaleConvArgs& args = plan.args;
  const int64_t first = group * plan.sizes.images, num_images = plan.num_images(group);
  Pyramid<T> grad = scratch.out, other = scratch.other;
  grad = grad.with_channels(args.layers[args.num_layers - 1].F);
  read_images<Storage>(args.grad_out, first, num_images, grad[0]);
  sums += plan.sizes.parameters;
  for (int l = args.num_layers - 1; l >= 0; --l) {
    const ConvLayer& layer = args.layers[l];
    Pyramid<T> in = scratch.in.with_channels(layer.C);
    if (l > 0) {
      in.levels[0] = plan.kept(l - 1, group);
    } else {
      read_images<Storage>(args.x, first, num_images, in[0]);
    }
    sums_gradient(plan.form, plan.kept(l, group), plan.signs(l, group), grad);
    for (int s = 1; s < args.num_scales; ++s) pool(in[s - 1], in[s], T(0.25));
    for (int s = args.num_scales - 1; s >= 0; --s) {  // `sums` goes through the layers backward
      sums -= Sizes::num_biases(args, layer, s);
      if (layer.grad_biases[s]) {
        add_bias_gradient(grad[s], layer.bias_per_location, scratch.working.lanes, sums);
      }
      sums -= Sizes::num_weights(layer);
      if (layer.grad_weights[s]) {
        add_weight_gradient(in[s], layer.K, grad[s], scratch.working, sums);
      }
    }
    if (l > 0 || args.grad_x.data) {
      const Pyramid<T> grad_in = other.with_channels(layer.C);
      input_gradient(plan.form, plan.layers[l], plan.zeros, grad, grad_in, scratch.working);
      other = grad;
      grad = grad_in;
    }
  }
  if (args.grad_x.data) {
    write_images<Storage>(grad[0], args.grad_x, first, num_images);
  }
}

// gradients[to(i)] = element i of the sums, added up over the chains in float64.
template <class Storage, class Index>
void add_chains(const Plan<Storage>& plan, int64_t first, int64_t count, void* gradients,
                Index to) {
  using T = ScalarOf<Storage>;
  constexpr int kChunk = 64;
  if (!gradients) return;
  for (int64_t i = 0; i < count; i += kChunk) {
    const int length = static_cast<int>(smaller(kChunk, count - i));
    double total[kChunk] = {};
    for (int chain = 0; chain < plan.num_chains; ++chain) {
      const T* sums = plan.sums + chain * plan.sizes.parameters + first + i;
      for (int k = 0; k < length; ++k) total[k] += sums[k];
    }
    for (int k = 0; k < length; ++k) {
      auto& element = static_cast<Storage*>(gradients)[to(i + k)];
      if constexpr (std::is_same_v<Storage, double>) {
        element = total[k];
      } else {
        element = from_float<Storage>(static_cast<float>(total[k]));
      }
    }
  }
}

template <class Storage>
void write_parameter_gradients(const Plan<Storage>& plan) {
  const MultiscaleConvArgs& args = plan.args;
  int64_t first = 0;
  for (int l = 0; l < args.num_layers; ++l) {
    const ConvLayer& layer = args.layers[l];
    const int64_t C = layer.C, F = layer.F, K = layer.K;
    for (int s = 0; s < args.num_scales; ++s) {
      const int64_t num_weights = Sizes::num_weights(layer);
      add_chains(plan, first, num_weights, layer.grad_weights[s], [&](int64_t i) {
        const int64_t c = i % C, k_x = i / C % K, f = i / (C * K) % F, k_y = i / (C * K * F);
        return ((f * C + c) * K + k_y) * K + k_x;
      });
      first += num_weights;
      const int64_t num_biases = Sizes::num_biases(args, layer, s), pixels = num_biases / F;
      add_chains(plan, first, num_biases, layer.grad_biases[s],
                 [&](int64_t i) { return i % F * pixels + i / F; });
      first += num_biases;
    }
  }
}

template <class Storage>
void forward(const MultiscaleConvArgs& args, int num_threads) {
  const Plan<Storage> plan(args, false, num_threads);
#pragma omp parallel num_threads(plan.num_threads) if (plan.num_threads > 1)
  {
    const auto scratch = plan.scratch(omp_get_thread_num());
#pragma omp for schedule(static)
    for (int64_t group = 0; group < plan.sizes.groups; ++group) {
      group_forward(plan, scratch, group);
    }
  }
}

template <class Storage>
void gradient(const MultiscaleConvArgs& args, int num_threads) {
  const Plan<Storage> plan(args, true, num_threads);
  const int64_t groups = plan.sizes.groups, parameters = plan.sizes.parameters;
#pragma omp parallel num_threads(plan.num_threads) if (plan.num_threads > 1)
  {
    const auto scratch = plan.scratch(omp_get_thread_num());
#pragma omp for schedule(static)
    for (int chain = 0; chain < plan.num_chains; ++chain) {
      auto* sums = plan.sums + chain * parameters;
      for (int64_t i = 0; i < parameters; ++i) sums[i] = 0;
      const int64_t end = (chain + 1) * groups / plan.num_chains;
      for (int64_t group = chain * groups / plan.num_chains; group < end; ++group) {
        group_gradient(plan, scratch, group, sums);
      }
    }
  }
  write_parameter_gradients(plan);
}

template <class Visit>
void with_type(DType dtype, Visit visit) {
  switch (dtype) {
    case DType::float32: return visit(float{});
    case DType::bfloat16: return visit(bf16{});
    case DType::float16: return visit(f16{});
    case DType::float64: return visit(double{});
  }
}

}  // namespace

void multiscale_conv(const MultiscaleConvArgs& args, int num_threads) {
  with_type(args.dtype, [&](auto type) { forward<decltype(type)>(args, num_threads); });
}

void multiscale_conv_gradient(const MultiscaleConvArgs& args, int num_threads) {
  with_type(args.dtype, [&](auto type) { gradient<decltype(type)>(args, num_threads); });
}

}  // namespace DPM_ISA
}  // namespace dpm
