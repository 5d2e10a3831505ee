// One multiscale convolution of a group of 16 images, forward and gradient, over tiles in memory.
#pragma once

#include "toom_cook.h"

namespace dpm {
namespace DPM_ISA {

// A tile of each scale, all with as many channels as asked for.
template <class T>
struct Pyramid {
  Tile<T> levels[ConvLayer::kMaxScales];

  DPM_INLINE const Tile<T>& operator[](int scale) const { return levels[scale]; }

  DPM_INLINE Pyramid with_channels(int64_t C) const {
    Pyramid result = *this;
    for (Tile<T>& tile : result.levels) tile.C = C;
    return result;
  }
};

// Parameters in the order and type of the kernels.
template <class T>
struct PackedLayer {
  int64_t C, F, K;
  int64_t bias_stride;  // between pixels
  T* weights[ConvLayer::kMaxScales];     // for the layer itself,
  T* biases[ConvLayer::kMaxScales];
  T* transposed[ConvLayer::kMaxScales];  // or for the gradient of its input
};

// What all layers of a stack share.
template <class T>
struct Form {
  int num_scales;
  bool after_sum;
  T slope;

  DPM_INLINE T mean() const { return after_sum ? T{1} : T{1} / num_scales; }
};

// The memory that a layer works in beside its tiles.
template <class T>
struct Working {
  T* points;  // of toom_cook_size
  T* lanes;   // of sums_size, for gradients
  T* sums;    // likewise, a 16th
};

// How many sums the gradient of a kernel is made of.
DPM_INLINE int64_t sums_size(int64_t C, int64_t F, int64_t K) {
  return larger(K * K, 3 * kPoints) * C * F;
}

// The faster of two ways. Weights are in the order of the one that `uses_toom_cook` says.
template <class T>
DPM_INLINE void convolve_scale(const Tile<T>& in, int64_t K, const T* weights,
                               const Finish<T>& finish, const Tile<T>& out,
                               const Working<T>& working) {
  if constexpr (std::is_same_v<T, float>) {
    if (uses_toom_cook<T>(K, in.C, out.C, out.W)) {
      return convolve_toom_cook(in, weights, finish, out, working.points);
    }
  }
  convolve(in, K, weights, finish, out);
}

template <class T>
DPM_INLINE void set_to_zero(T* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) values[i] = 0;
}

// values[i] = f(values[i], lane) for the 16 images.
template <class Call>
DPM_INLINE void for_images(float* values, Call f) {
  store(values, f(load<f32x16>(values), 0));
}
template <class Call>
DPM_INLINE void for_images(double* values, Call f) {
  for (int i = 0; i < kImages; ++i) values[i] = f(values[i], i);
}

// Which of the bits from `lane` on are set: a mask of T.
template <class T>
DPM_INLINE auto lane_mask(unsigned bits, int lane) {
  if constexpr (std::is_same_v<T, double>) {
    return (bits >> lane & 1u) != 0;
  } else {
    constexpr uint32_t kBits[16] = {1u << 0,  1u << 1,  1u << 2,  1u << 3, 1u << 4,  1u << 5,
                                    1u << 6,  1u << 7,  1u << 8,  1u << 9, 1u << 10, 1u << 11,
                                    1u << 12, 1u << 13, 1u << 14, 1u << 15};
    return (load<u32x16>(kBits) & bits) != 0u;
  }
}

template <class T>
DPM_INLINE void softplus_of(const Tile<T>& tile) {
  for_channels(tile, [](T* values, int64_t) {
    for_images(values, [](auto z, int) { return softplus(z); });
  });
}

// out[0] = layer(in[0]), with its halo; the other levels are working memory. Signs are kept for the
// gradient, [scale][H W][F], if there is a place for them.
template <class T>
static void layer_forward(const Form<T>& form, const PackedLayer<T>& layer, const Pyramid<T>& in,
                          const Pyramid<T>& out, uint16_t* signs, const Working<T>& working) {
  int64_t first_sign[ConvLayer::kMaxScales] = {};
  for (int s = 1; s < form.num_scales; ++s) {
    pool(in[s - 1], in[s], T(0.25));
    first_sign[s] = first_sign[s - 1] + out[s - 1].H * out[s - 1].W * layer.F;
  }
  for (int s = form.num_scales - 1; s >= 0; --s) {
    Finish<T> finish{layer.biases[s], layer.bias_stride};
    finish.leaky = !form.after_sum;
    finish.slope = form.slope;
    finish.signs = signs ? signs + first_sign[s] : nullptr;
    if (s + 1 < form.num_scales) finish.coarse = out[s + 1];
    if (s == 0) finish.factor = form.mean();
    convolve_scale(in[s], layer.K, layer.weights[s], finish, out[s], working);
  }
  if (form.after_sum) softplus_of(out[0]);
  fill_halo(out[0]);
}

// From the gradient of the layer's output, in grad[0], that of each scale's sums, in grad[s], with
// halos.
template <class T>
static void sums_gradient(const Form<T>& form, const Tile<T>& out, const uint16_t* signs,
                          const Pyramid<T>& grad) {
  if (form.after_sum) {
    for_channels(grad[0], [&](T* values, int64_t) {
      const T* softplus = out.data + (values - grad[0].data);
      for_images(values, [&](auto gradient, int lane) {  // times a sigmoid: 1 - exp(-softplus)
        return gradient * -expm1(-load<decltype(gradient)>(softplus + lane));
      });
    });
  }
  for (int s = 1; s < form.num_scales; ++s) pool(grad[s - 1], grad[s], T{1});
  for (int s = 0; s < form.num_scales; ++s) {
    if (form.after_sum) {
      if (s == 0) fill_halo(grad[s]);
      continue;
    }
    for_channels(grad[s], [&](T* values, int64_t i) {
      for_images(values, [&](auto gradient, int lane) {
        using V = decltype(gradient);
        const T mean = form.mean();
        return gradient *
               select(lane_mask<V>(signs[i], lane), splat<V>(mean), splat<V>(mean * form.slope));
      });
    });
    signs += grad[s].H * grad[s].W * grad[s].C;
    fill_halo(grad[s]);
  }
}

// grad_weights += the gradient of a kernel, [K (y)][F][K (x)][C].
template <class T>
static void add_weight_gradient(const Tile<T>& in, int64_t K, const Tile<T>& grad,
                                const Working<T>& working, T* grad_weights) {
  if constexpr (std::is_same_v<T, float>) {
    if (uses_toom_cook<T>(K, in.C, grad.C, grad.W)) {
      const int64_t count = 3 * grad.C * kPoints * in.C;
      correlate_toom_cook(in, grad, working.points, working.lanes);
      set_to_zero(working.sums, count);
      add_sums_of_lanes(working.lanes, count, working.sums);
      return add_gradient_at_points(working.sums, 3 * grad.C, in.C, grad_weights);
    }
  }
  correlate(in, K, grad, working.lanes);
  add_sums_of_lanes(working.lanes, K * K * in.C * grad.C, grad_weights);
}

// sums += the gradient of a bias of each channel, lane by lane: [F][16 images].
template <class T>
static void add_pixels(const Tile<T>& grad, T* sums) {
  using V = Register<T>;
  for (int64_t y = 0; y < grad.H; ++y) {
    for (int64_t x = 0; x < grad.W; ++x) {
      const T* from = grad.at(y, x);
      for (int64_t k = 0; k < grad.pixel(); k += kRegisterLanes<T>) {
        store(sums + k, load<V>(sums + k) + load<V>(from + k));
      }
    }
  }
}

// grad_bias += the gradient of a bias, [F] or [H W][F].
template <class T>
static void add_bias_gradient(const Tile<T>& grad, bool per_location, T* lanes,
                              T* grad_bias) {
  if (per_location) {
    const int64_t count = grad.W * grad.C;
    for (int64_t y = 0; y < grad.H; ++y) {
      add_sums_of_lanes(grad.at(y, 0), count, grad_bias + y * count);
    }
    return;
  }
  set_to_zero(lanes, grad.pixel());
  add_pixels(grad, lanes);
  add_sums_of_lanes(lanes, grad.C, grad_bias);
}

// grad_in[0] = the gradient of the layer's input, without a halo, from those of each scale's sums.
template <class T>
static void input_gradient(const Form<T>& form, const PackedLayer<T>& layer, const T* zeros,
                           const Pyramid<T>& grad, const Pyramid<T>& grad_in,
                           const Working<T>& working) {
  for (int s = form.num_scales - 1; s >= 0; --s) {
    Finish<T> finish{zeros, 0};
    if (s + 1 < form.num_scales) finish.coarse = grad_in[s + 1];
    finish.coarse_factor = T(0.25);
    convolve_scale(grad[s], layer.K, layer.transposed[s], finish, grad_in[s], working);
  }
}

}  // namespace DPM_ISA
}  // namespace dpm
