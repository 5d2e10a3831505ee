// A stack of multiscale convolutions whose images stay in the shared memory of a block: what its
// launcher is given, and where everything lies. Sizes alone decide that, so a host without a GPU can
// say what a stack needs.
#pragma once

#include <string>
#include <tuple>

#include "multiscale_conv.h"

namespace dpm {

// What a lane loads at once, and the grain of all layouts: 4 channels of 16 bits, or 2 floats.
constexpr int kUnitBytes = 8;
constexpr int kUnitsPerStep = 4;  // of a sum, by one instruction: 16 channels of 16 bits, or 8
constexpr int kColumn = 8;        // features of one instruction
constexpr int kBankedUnits = 16;  // a row of banks: 16 lanes load as many units at once

// One scale of an image, in units: pixel (y, x) begins at (y W + x) stride + y gap. A halo of zeros is
// around it; at the right it is that of the next row at the left.
//
// Loads of fragments meet in no bank. 16 lanes load together, four units from each of four rows of a
// fragment; these are pixels that lie four apart, 4 `stride` units, which for an odd stride are the
// multiples of 4 modulo the 16 units of all banks. A gap that is such a multiple leaves that so where
// a row of the image ends within a fragment. What is left is that the four units be different modulo
// 4, and a sum can be taken in the order that makes them so. (As long as there are units of every
// residue: taps of two units, of 8 channels, cannot fill all steps so.)
struct TileShape {
  int H, W, stride, gap;
  int first;               // unit of pixel (0, 0)
  uint32_t inverse_width;  // 2^31 / W, rounded up
  int64_t num_units;       // of all, halo included; what fits nowhere may be long

  TileShape() = default;
  TileShape(int64_t H, int64_t W, int64_t units_of_pixel, int64_t halo)
      : H(int(H)), W(int(W)), stride(int(units_of_pixel | 1)) {
    gap = int((halo * stride + kBankedUnits - 1) / kBankedUnits * kBankedUnits);
    const int64_t row = W * stride + gap, before = halo * row + halo * stride;
    first = int(before);
    num_units = before + (H + halo) * row;
    inverse_width = uint32_t(((int64_t{1} << 31) + W - 1) / W);
  }
};

// A layer, and where its operands lie in the packed memory, one after the other for each scale:
//   offsets  [num_steps][4] int32, bytes from a pixel's first unit to the one at that place of the sum
//   biases   [num_columns][8] float, zeros where there is one per location
//   weights  [num_steps][num_columns][32 lanes] units, as mma takes them
// The units of all taps are in an order without conflicts (order_units in resident_conv.cuh). Places
// that are left over, fewer than four, have weights of zero and read what another place of the step
// does. (A value that is infinite gives NaN there, where the sum might be infinite.)
struct ResidentLayer {
  int C, F, K, num_scales, num_steps, num_columns;
  float slope;  // of a leaky ReLU; 1 leaves sums as they are
  bool after_sum, bias_per_location;
  int operands[ConvLayer::kMaxScales];         // bytes from the beginning of all
  const void* weights[ConvLayer::kMaxScales];  // as in ConvLayer
  const void* biases[ConvLayer::kMaxScales];

  DPM_INLINE int64_t offset_bytes() const { return int64_t{num_steps} * kUnitsPerStep * 4; }
  DPM_INLINE int64_t bias_bytes() const { return int64_t{num_columns} * kColumn * 4; }
  DPM_INLINE int64_t weight_bytes() const {
    return int64_t{num_steps} * num_columns * 32 * kUnitBytes;
  }
  DPM_INLINE int64_t operand_bytes() const { return offset_bytes() + bias_bytes() + weight_bytes(); }
};

// Where a block keeps what: operands, then tiles, both from the beginning of its shared memory. What
// follows a stack, layers of each pixel and a linear one, are convolutions of 1 x 1 at one scale.
struct ResidentStack {
  static constexpr int kMaxLayers = 16;  // a kernel takes 4 KB of parameters

  int num_layers, num_scales;
  ResidentLayer layers[kMaxLayers];
  TileShape shapes[ConvLayer::kMaxScales];
  int images[2];                      // units; a layer's input and its output, by turns
  int pooled[ConvLayer::kMaxScales];  // the input at the scales from 1 on
  int coarse[ConvLayer::kMaxScales];  // the output there, with what comes from coarser ones
  int64_t operand_bytes, shared_bytes;

  // Layers of a stack and of its tail; there must be at most kMaxLayers.
  static int count_layers(const MultiscaleConvArgs& conv) {
    return conv.num_layers + (conv.tail ? conv.tail->num_layers + 1 : 0);
  }

  // Sizes alone are read here.
  explicit ResidentStack(const MultiscaleConvArgs& conv)
      : num_layers(0), num_scales(conv.num_scales), operand_bytes(0) {
    const int per_unit = kUnitBytes / (conv.dtype == DType::float32 ? 4 : 2);
    int64_t most_units = 0, halo = 0;
    const auto add = [&](const ConvLayer& given, int scales, bool after_sum, double slope) {
      const auto [C, F, K] = std::tie(given.C, given.F, given.K);
      const int64_t units = (C + per_unit - 1) / per_unit, out = (F + per_unit - 1) / per_unit;
      ResidentLayer& layer = layers[num_layers++];
      layer = {int(C), int(F), int(K), scales};
      layer.num_steps = int((K * K * units + kUnitsPerStep - 1) / kUnitsPerStep);
      layer.num_columns = int((F + kColumn - 1) / kColumn);
      layer.slope = float(slope);
      layer.after_sum = after_sum;
      layer.bias_per_location = given.bias_per_location;
      for (int s = 0; s < scales; ++s) {
        layer.operands[s] = int(operand_bytes);
        layer.weights[s] = given.weights[s];
        layer.biases[s] = given.biases[s];
        operand_bytes += layer.operand_bytes();
      }
      most_units = most_units < units ? units : most_units;
      most_units = most_units < out ? out : most_units;
      halo = halo < K / 2 ? K / 2 : halo;
    };
    const auto add_pixel_layer = [&](const PixelLayer& given, double slope) {
      ConvLayer layer{given.C, given.F, 1};
      layer.weights[0] = given.weight;
      layer.biases[0] = given.bias;
      add(layer, 1, false, slope);
    };
    for (int l = 0; l < conv.num_layers; ++l) {
      add(conv.layers[l], num_scales, conv.after_sum, conv.slope);
    }
    if (const Tail* tail = conv.tail) {
      for (int l = 0; l < tail->num_layers; ++l) add_pixel_layer(tail->layers[l], conv.slope);
      add_pixel_layer({tail->P, tail->O, tail->weight, tail->bias}, 1);
    }
    int64_t units = operand_bytes / kUnitBytes;
    const auto place = [&](int s) {
      const int begin = int(units);
      units += shapes[s].num_units;
      return begin;
    };
    for (int s = 0; s < num_scales; ++s) {
      shapes[s] = TileShape(conv.H >> s, conv.W >> s, most_units, halo);
      (s == 0 ? images[0] : pooled[s]) = place(s);
      (s == 0 ? images[1] : coarse[s]) = place(s);
    }
    shared_bytes = units * kUnitBytes;
  }

  // Of a launch: an operand has a block of its own.
  int num_operands() const {
    int count = 0;
    for (int l = 0; l < num_layers; ++l) count += layers[l].num_scales;
    return count;
  }
};

struct ResidentConvArgs {
  MultiscaleConvArgs conv;  // parts = 1; of the layers nothing that is kept for a gradient
  void* packed;             // room for operand_bytes
  bool tf32;                // float32 as one product of 10 bits each, not as three
};

namespace cuda {
void multiscale_conv(const ResidentConvArgs& args, void* stream);
// Shared memory that a block of the current device can have.
int64_t most_shared_bytes();
// Why kernels of this build cannot run on the current device, a GPU older or newer than they were
// compiled for, or with a driver too old for them; empty where they can.
std::string why_unusable();
}  // namespace cuda

}  // namespace dpm
