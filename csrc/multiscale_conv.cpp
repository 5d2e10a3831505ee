// The CPU launchers of `multiscale_conv`: a whole stack of layers, and its tail, for 16 images at a
// time, which stay in the layout of tile.h from the first layer to the last.
#include "multiscale_conv.h"

#include <omp.h>

#include <cstring>

#include "pack_conv.h"

namespace dpm {
namespace DPM_ISA {
namespace {

// Gradients of parameters are summed along so many chains of groups at most, then over the chains:
// the order must not depend on the number of threads, and every chain takes memory.
constexpr int64_t kMaxChains = 64;

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
  PackedTail<T> tail;
  T* zeros;  // a bias, even where each image has its own
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
    tail = pack_tail<Storage>(arena, args, for_gradient);
    zeros = arena.take<T>(sizes.widest * kImages);
    if (zeros) set_to_zero(zeros, sizes.widest * kImages);
    sums = arena.take<T>(for_gradient ? num_chains * sizes.parameters : 0);
    return arena.used();
  }

  int64_t num_shared_bytes_, num_bytes_of_thread_;
  Memory64 memory_;
};

// The linear layers of a group's images, zeros in the lanes that are left.
template <class T>
void read_readout(const MultiscaleConvArgs& args, int64_t first, int64_t num_images,
                  const Readout<T>& to) {
  const Tail& tail = *args.tail;
  const int64_t O = tail.O, P = tail.P;
  for (int64_t lane = 0; lane < kImages; ++lane) {
    const bool is_there = lane < num_images * args.parts;
    const int64_t n = first + lane / args.parts;
    for (int64_t o = 0; o < O; ++o) {
      to.bias[o * kImages + lane] = is_there ? static_cast<const T*>(tail.bias)[n * O + o] : 0;
      for (int64_t p = 0; p < P; ++p) {
        const T weight = is_there ? static_cast<const T*>(tail.weight)[(n * O + o) * P + p] : 0;
        to.weight[packed_index(O, P, 1, o, p, 0, 0) * kImages + lane] = weight;
        if (!to.transposed) continue;
        to.transposed[packed_index(P, O, 1, p, o, 0, 0) * kImages + lane] = weight;
      }
    }
  }
}

// Sums over the parts of each image: gradients[n][i] from lanes [i][16].
template <class T>
void write_sums_of_parts(const T* lanes, int64_t count, int64_t parts, int64_t first,
                         int64_t num_images, void* gradients) {
  if (!gradients) return;
  for (int64_t n = 0; n < num_images; ++n) {
    for (int64_t i = 0; i < count; ++i) {
      T sum = 0;
      for (int64_t part = 0; part < parts; ++part) sum += lanes[i * kImages + n * parts + part];
      static_cast<T*>(gradients)[(first + n) * count + i] = sum;
    }
  }
}

// Past the caches, which would read from memory first what is overwritten: only the gradient reads
// it again.
template <class T>
void copy_to_memory(const T* from, int64_t size, T* to) {
#if defined(__AVX2__)
  if (reinterpret_cast<uintptr_t>(to) % kRegisterBytes == 0) {  // as torch allocates
    for (int64_t i = 0; i < size; i += kRegisterLanes<T>) {
#if defined(__AVX512F__)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), load<__m512i>(from + i));
#else
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i), load<__m256i>(from + i));
#endif
    }
    _mm_sfence();  // such stores are not in order
    return;
  }
#endif
  std::memcpy(to, from, size * sizeof(T));
}

// What follows the stack, if anything does, and the output.
template <class Storage, class T>
void finish_group(const Plan<Storage>& plan, const Scratch<T>& scratch, int64_t group,
                  const Tile<T>& stack) {
  const MultiscaleConvArgs& args = plan.args;
  const int64_t first = group * plan.sizes.images, num_images = plan.num_images(group);
  if (!args.tail) return write_images<Storage>(stack, args.out, first, num_images);
  read_readout(args, first, num_images, scratch.tail.readout);
  if (args.tail->K) {
    read_images<Storage>(args.tail->beside, first, num_images, scratch.tail.beside);
  }
  tail_forward<true>(plan.tail, scratch.tail, stack);
  write_images<Storage>(scratch.tail.out, args.out, first, num_images);
}

#if defined(DPM_PAIRS)

// Whether pairs of channels lie in memory as they do in a tile; and these, as if they were floats.
bool are_pairs(const Images& images, int64_t channels) {
  const bool even = channels % 2 == 0 && (images.n | images.y | images.x) % 2 == 0;
  return even && images.c == 1 && reinterpret_cast<uintptr_t>(images.data) % sizeof(float) == 0;
}
Images pairs_of(const Images& images) {
  return {images.data, images.n / 2, 1, images.y / 2, images.x / 2};
}

void group_forward(const Plan<bf16>& plan, const Scratch<float>& scratch, int64_t group) {
  const MultiscaleConvArgs& args = plan.args;
  const int64_t first = group * plan.sizes.images, num_images = plan.num_images(group);
  const int64_t C = args.layers[0].C, F = args.layers[args.num_layers - 1].F;
  const Pyramid<float> in = scratch.in.with_channels(num_pairs(C));
  if (are_pairs(args.x, C)) {
    read_images<float>(pairs_of(args.x), first, num_images, in[0]);
  } else {
    const Tile<float> wide = scratch.in.with_channels(C)[0];
    read_images<bf16>(args.x, first, num_images, wide);
    fill_halo(to_pairs(wide));
  }
  const bool as_pairs = !args.tail && are_pairs(args.out, F);
  const Tile<float> out = stack_forward_in_pairs(plan.form, plan.layers, args.num_layers, in,
                                                 scratch, as_pairs);
  if (as_pairs) return write_images<float>(out, pairs_of(args.out), first, num_images);
  finish_group(plan, scratch, group, out);
}

#else

template <class Storage, class T>
void group_forward(const Plan<Storage>& plan, const Scratch<T>& scratch, int64_t group) {
  const MultiscaleConvArgs& args = plan.args;
  Pyramid<T> in = scratch.in.with_channels(args.layers[0].C);
  read_images<Storage>(args.x, group * plan.sizes.images, plan.num_images(group), in[0]);
  in = stack_forward(
      plan.form, plan.layers, args.num_layers, in, scratch,
      [&](int l) { return plan.signs(l, group); },
      [&](int l, const Tile<T>& out) {
        if (args.layers[l].out) copy_to_memory(out.data, out.size(), plan.kept(l, group).data);
      });
  finish_group(plan, scratch, group, in[0]);
}

#endif

// The gradient of a stack's output from that of its tail's; adds gradients of parameters to `sums`.
template <class Storage, class T>
void group_tail_gradient(const Plan<Storage>& plan, const Scratch<T>& scratch, int64_t group,
                         const Tile<T>& grad, T* sums) {
  const MultiscaleConvArgs& args = plan.args;
  const Tail& tail = *args.tail;
  const int64_t first = group * plan.sizes.images, num_images = plan.num_images(group);
  TailWorking<T> working = scratch.tail;
  working.zeros = plan.zeros;
  read_readout(args, first, num_images, working.readout);
  if (tail.K) read_images<Storage>(tail.beside, first, num_images, working.beside);
  read_images<Storage>(args.grad_out, first, num_images, working.out);
  tail_gradient(plan.tail, working, plan.kept(args.num_layers - 1, group), grad,
                scratch.working.lanes, sums);
  if (tail.K && tail.grad_beside.data) {
    write_images<Storage>(working.grad_beside, tail.grad_beside, first, num_images);
  }
  const auto write = [&](const T* lanes, int64_t count, void* gradients) {
    write_sums_of_parts(lanes, count, args.parts, first, num_images, gradients);
  };
  write(working.grad_weight, tail.O * tail.P, tail.grad_weight);
  write(working.grad_bias, tail.O, tail.grad_bias);
}

// Adds the gradients of parameters to those of a chain.
template <class Storage, class T>
void group_gradient(const Plan<Storage>& plan, const Scratch<T>& scratch, int64_t group, T* sums) {
  const MultiscaleConvArgs& args = plan.args;
  const int64_t first = group * plan.sizes.images, num_images = plan.num_images(group);
  Pyramid<T> grad = scratch.out, other = scratch.other;
  grad = grad.with_channels(args.layers[args.num_layers - 1].F);
  sums += plan.sizes.stack_parameters;
  if (args.tail) {
    group_tail_gradient(plan, scratch, group, grad[0], sums);
  } else {
    read_images<Storage>(args.grad_out, first, num_images, grad[0]);
  }
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
  const auto in_order = [](int64_t i) { return i; };
  for (int l = 0; args.tail && l < args.tail->num_layers; ++l) {
    const PixelLayer& layer = args.tail->layers[l];
    add_chains(plan, first, layer.F * layer.C, layer.grad_weight, in_order);
    first += layer.F * layer.C;
    add_chains(plan, first, layer.F, layer.grad_bias, in_order);
    first += layer.F;
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

#if !defined(DPM_PAIRS)
template <class Visit>
void with_type(DType dtype, Visit visit) {
  switch (dtype) {
    case DType::float32: return visit(float{});
    case DType::bfloat16: return visit(bf16{});
    case DType::float16: return visit(f16{});
    case DType::float64: return visit(double{});
  }
}
#endif

}  // namespace

#if defined(DPM_PAIRS)

void multiscale_conv(const MultiscaleConvArgs& args, int num_threads) {
  forward<bf16>(args, num_threads);
}

#else

void multiscale_conv(const MultiscaleConvArgs& args, int num_threads) {
  with_type(args.dtype, [&](auto type) { forward<decltype(type)>(args, num_threads); });
}

void multiscale_conv_gradient(const MultiscaleConvArgs& args, int num_threads) {
  with_type(args.dtype, [&](auto type) { gradient<decltype(type)>(args, num_threads); });
}

#endif

}  // namespace DPM_ISA
}  // namespace dpm
