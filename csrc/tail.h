// What follows a stack of multiscale convolutions, over tiles in memory: layers of each pixel and a
// linear layer of each image's own, forward and gradient.
//
// Rows of the image pass through all layers one by one, so that activations stay in the L1 cache. The
// gradient computes them again: that takes less time than reading what was kept.
#pragma once

#include "multiscale_layer.h"

namespace dpm {
namespace DPM_ISA {

// Parameters in the order and type of the kernels.
template <class T>
struct PackedPixelLayer {
  int64_t C, F;
  T *weight, *bias;
  T* transposed;  // for the gradient
};

template <class T>
struct PackedTail {
  int num_layers;
  int64_t C, K, P, O;  // channels of the stack, beside it, before and after the linear layer
  T slope;
  PackedPixelLayer<T> layers[Tail::kMaxLayers];
};

// The linear layers of 16 images, or one for all of them.
template <class T>
struct Readout {
  T *weight, *bias;  // in the order of `convolve`, and [O]
  T* transposed;     // for the gradient
};

// The memory that one group of images needs beside the tiles of the stack.
template <class T>
struct TailWorking {
  T* rows[Tail::kMaxLayers + 1];  // the input of each layer and the output of the last
  Tile<T> beside, out;
  Readout<T> readout;
  // For the gradient:
  T* grad_rows[2];
  Tile<T> grad_beside;
  T* zeros;                           // a bias
  T* grad_weights[Tail::kMaxLayers];  // lane by lane, [F][C][16 images]
  T *grad_weight, *grad_bias;         // of the linear layers, [O][P][16 images] and [O][16 images]
};

template <class T>
DPM_INLINE Tile<T> row_of(const Tile<T>& tile, int64_t y) {
  return {tile.at(y, 0), 1, tile.W, tile.C, 0};
}

// Channels first_from ... of each pixel of a row become channels first_to ... of another.
template <class T>
DPM_INLINE void copy_channels(const Tile<T>& from, int64_t first_from, const Tile<T>& to,
                              int64_t first_to, int64_t count) {
  for (int64_t x = 0; x < from.W; ++x) {
    const T* source = from.at(0, x) + first_from * kImages;
    T* target = to.at(0, x) + first_to * kImages;
    for (int64_t k = 0; k < count * kImages; k += kRegisterLanes<T>) {
      store(target + k, load<Register<T>>(source + k));
    }
  }
}

// rows[0], the input of the first layer.
template <class T>
DPM_INLINE Tile<T> joined_row(const PackedTail<T>& tail, const TailWorking<T>& working,
                              const Tile<T>& stack, int64_t y) {
  const Tile<T> row = row_of(stack, y);
  if (!tail.K) return row;
  const Tile<T> joined{working.rows[0], 1, stack.W, tail.C + tail.K, 0};
  copy_channels(row, 0, joined, 0, tail.C);
  copy_channels(row_of(working.beside, y), 0, joined, tail.C, tail.K);
  return joined;
}

// rows[l + 1] from its input.
template <class T>
DPM_INLINE Tile<T> pixel_layer(const PackedTail<T>& tail, const TailWorking<T>& working, int l,
                               const Tile<T>& in) {
  const PackedPixelLayer<T>& layer = tail.layers[l];
  const Tile<T> out{working.rows[l + 1], 1, in.W, layer.F, 0};
  Finish<T> finish{layer.bias, 0};
  finish.leaky = true;
  finish.slope = tail.slope;
  convolve(in, 1, layer.weight, finish, out);
  return out;
}

// working.out from the output of the stack and working.beside. kOfEach: images have linear layers of
// their own; otherwise one layer is that of all.
template <bool kOfEach, class T>
static void tail_forward(const PackedTail<T>& tail, const TailWorking<T>& working,
                         const Tile<T>& stack) {
  for (int64_t y = 0; y < stack.H; ++y) {
    Tile<T> row = joined_row(tail, working, stack, y);
    for (int l = 0; l < tail.num_layers; ++l) row = pixel_layer(tail, working, l, row);
    const Finish<T> finish{working.readout.bias, 0};
    convolve<kOfEach>(row, 1, working.readout.weight, finish, row_of(working.out, y));
  }
}

// grad *= the slope of a leaky layer whose outputs are given.
template <class T>
DPM_INLINE void leaky_gradient(const Tile<T>& out, T slope, const Tile<T>& grad) {
  using V = Register<T>;
  for (int64_t k = 0; k < grad.W * grad.pixel(); k += kRegisterLanes<T>) {
    const V value = load<V>(grad.data + k);
    store(grad.data + k, select(load<V>(out.data + k) > V{}, value, value * slope));
  }
}

// From the gradient of its output, in working.out: those of the stack's output, of working.beside and
// of the linear layers, and added to `sums` those of the layers, [F][C] and [F] of each.
template <class T>
static void tail_gradient(const PackedTail<T>& tail, const TailWorking<T>& working,
                          const Tile<T>& stack, const Tile<T>& grad_stack, T* lanes, T* sums) {
  set_to_zero(working.grad_weight, tail.O * tail.P * kImages);
  set_to_zero(working.grad_bias, tail.O * kImages);
  int64_t end = 0;
  for (int l = 0; l < tail.num_layers; ++l) {
    const PackedPixelLayer<T>& layer = tail.layers[l];
    set_to_zero(working.grad_weights[l], layer.F * layer.C * kImages);
    end += layer.F * (layer.C + 1);
  }
  for (int64_t y = 0; y < stack.H; ++y) {
    Tile<T> rows[Tail::kMaxLayers + 1];
    rows[0] = joined_row(tail, working, stack, y);
    for (int l = 0; l < tail.num_layers; ++l) {
      rows[l + 1] = pixel_layer(tail, working, l, rows[l]);
    }
    const Tile<T> grad_out = row_of(working.out, y);
    correlate(rows[tail.num_layers], 1, grad_out, working.grad_weight, true);
    add_pixels(grad_out, working.grad_bias);
    const Finish<T> plain{working.zeros, 0};
    Tile<T> grad{working.grad_rows[0], 1, stack.W, tail.P, 0};
    convolve<true>(grad_out, 1, working.readout.transposed, plain, grad);
    T* first = sums + end;
    for (int l = tail.num_layers - 1; l >= 0; --l) {
      const PackedPixelLayer<T>& layer = tail.layers[l];
      leaky_gradient(rows[l + 1], tail.slope, grad);
      correlate(rows[l], 1, grad, working.grad_weights[l], true);
      first -= layer.F;
      add_bias_gradient(grad, false, lanes, first);
      first -= layer.F * layer.C;
      T* other = working.grad_rows[grad.data == working.grad_rows[0]];
      const Tile<T> grad_in{other, 1, stack.W, layer.C, 0};
      convolve(grad, 1, layer.transposed, plain, grad_in);
      grad = grad_in;
    }
    copy_channels(grad, 0, row_of(grad_stack, y), 0, tail.C);
    if (tail.K) copy_channels(grad, tail.C, row_of(working.grad_beside, y), 0, tail.K);
  }
  for (int l = 0; l < tail.num_layers; ++l) {
    const int64_t count = tail.layers[l].F * tail.layers[l].C;
    add_sums_of_lanes(working.grad_weights[l], count, sums);
    sums += count + tail.layers[l].F;
  }
}

}  // namespace DPM_ISA
}  // namespace dpm
