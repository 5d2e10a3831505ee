// A stack of multiscale convolutions and the layers of each pixel that follow it, forward and
// gradient: what the launchers are given.
#pragma once

#include "args.h"

namespace dpm {

// Addresses are 0 for what is not there. Scale s has the sides H >> s and W >> s.
struct ConvLayer {
  static constexpr int kMaxScales = 8;

  int64_t C, F, K;
  bool bias_per_location;
  const void* weights[kMaxScales];  // (F, C, K, K) each
  const void* biases[kMaxScales];   // (F,), or (F, H_s, W_s)
  void* grad_weights[kMaxScales];
  void* grad_biases[kMaxScales];
  // Kept for the gradient, of groups of 16 / parts images, H being the rows of a part:
  void* out;        // (groups, H + 2 halo, W + 2 halo, F, 16), float or double; halo max(K) / 2
  uint16_t* signs;  // (groups, sum over s of H_s W_s F), a bit for each lane
};

// A tensor (N, C, H, W); strides count elements.
struct Images {
  void* data;
  int64_t n, c, y, x;
};

// A layer of each pixel, leaky.
struct PixelLayer {
  int64_t C, F;
  const void* weight;  // (F, C)
  const void* bias;    // (F,)
  void *grad_weight, *grad_bias;
};

// What follows a stack: layers of each pixel of its output and of images beside it, whose channels
// come last; then a linear layer of each example's own, in float or double.
struct Tail {
  static constexpr int kMaxLayers = 8;

  int num_layers;
  PixelLayer layers[kMaxLayers];
  int64_t K;                      // channels beside those of the stack, or 0
  Images beside, grad_beside;     // (N, K, H, W)
  int64_t O, P;
  const void *weight, *bias;      // (N, O, P) and (N, O)
  void *grad_weight, *grad_bias;
};

struct MultiscaleConvArgs {
  int64_t N, H, W;  // H of a part
  int64_t parts;    // into which the rows of an image are cut, 1 to 16; 1 for biases per location
  int num_scales, num_layers;
  const ConvLayer* layers;
  const Tail* tail;      // may be absent
  DType dtype;           // of all tensors but those kept and of the tail's linear layer
  bool after_sum;        // softplus of the sum; otherwise leaky ReLU of each scale, and their mean
  double slope;          // of the leaky ReLU
  Images x, out;         // (N, C, H, W), and (N, F, H, W) or (N, O, H, W); a gradient has no `out`
  Images grad_out, grad_x;
};

DPM_DECLARE_CPU(multiscale_conv, MultiscaleConvArgs)
DPM_DECLARE_CPU(multiscale_conv_gradient, MultiscaleConvArgs)
// Of bfloat16 of which nothing is kept for the gradient.
namespace avx512_bf16 { void multiscale_conv(const MultiscaleConvArgs&, int num_threads); }

}  // namespace dpm
