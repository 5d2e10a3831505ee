// An image in the shared memory of a block with the network that takes it, and what the block does
// to it: device functions for kernels that keep it there. A barrier lies between two of them that
// touch the same tile, and is the caller's where it is not said.
//
// A sum is taken by one warp in an order that sizes of the network alone decide, and an element has
// one thread, so that results depend on neither the batch nor the device.
#pragma once

#include <stdexcept>
#include <string>

#include "process.cuh"
#include "resident_conv.cuh"
#include "resident_images.h"

namespace dpm {

// How a network stores activations and operands, and whether products of floats are made of three:
// those of a readout always are, which torch rounds to tf32 by another switch than convolutions.
template <class ElementOf, bool kSplitOf>
struct Precision {
  using Element = ElementOf;
  static constexpr bool kSplit = kSplitOf, kSplitReadout = std::is_same_v<Element, float>;
};

// f(Precision) of a network.
template <class F>
void with_precision(const NetworkArgs& network, F f) {
  if (network.stack->dtype == DType::bfloat16) return f(Precision<bf16, false>());
  if (network.tf32) return f(Precision<float, false>());
  f(Precision<float, true>());
}

// One thread's view of the image of a block.
template <class Precision>
class ImageTile {
 protected:
  using Element = typename Precision::Element;

  // `last`: the timestep of the first readout outside.
  __device__ __forceinline__ ImageTile(const ResidentImages& images, const void* packed,
                                       int64_t last)
      : images_(images),
        packed_(static_cast<const unsigned char*>(packed)),
        last_packed_(last),
        shared_(dynamic_shared<unsigned char>()),
        x_(reinterpret_cast<float*>(shared_ + images.x)) {}

  // Before all else; a barrier follows.
  __device__ __forceinline__ void begin() const {
    begin_resident(images_.stack, packed_, shared_, images_.shared_bytes);
    __syncthreads();
  }

  // The readout of t, for which a network must not be under way; it is there after
  // wait_for_copies() and a barrier.
  __device__ __forceinline__ void copy_readout(int64_t t) const {
    const int64_t from = images_.readout + (t - last_packed_) * images_.readout_bytes;
    copy_later(reinterpret_cast<float*>(shared_ + images_.readout),
               reinterpret_cast<const float*>(packed_ + from), images_.readout_bytes / 4);
  }

  // The network's input, or its outputs: in one of two places, by turns.
  __device__ __forceinline__ Tile tile(int turn) const {
    return resident_tile(images_.stack, shared_, 0, images_.stack.images[turn]);
  }

  // From the input to the outputs, whose turn is returned; a barrier follows.
  __device__ __forceinline__ int evaluate(int turn) const {
    return convolve_resident<Element, Precision::kSplit, Precision::kSplitReadout>(
        images_.stack, shared_, turn);
  }

  // x_t in float: (C, H, W).
  __device__ __forceinline__ float* x() const { return x_; }
  __device__ __forceinline__ int num_channels() const { return images_.stack.layers[0].C; }

  // visit(element, channel, pixel, begin(group), i) of a thread's groups of four elements.
  template <class Begin, class Visit>
  __device__ __forceinline__ void for_elements(Begin begin, Visit visit) const {
    const auto num_pixels = static_cast<unsigned>(tile(0).num_pixels());
    const unsigned count = num_pixels * static_cast<unsigned>(num_channels());
#pragma unroll 1
    for (unsigned group = threadIdx.x; 4 * group < count; group += blockDim.x) {
      const auto numbers = begin(group);
      DPM_UNROLL
      for (int i = 0; i < 4; ++i) {
        const unsigned d = 4 * group + i, channel = d / num_pixels;
        if (d >= count) continue;
        visit(static_cast<int>(d), static_cast<int>(channel),
              static_cast<int>(d - channel * num_pixels), numbers, i);
      }
    }
  }

  // x of an element, also where the network reads it; a unit is filled up with zeros.
  __device__ __forceinline__ void store(const Tile& in, int d, int channel, int pixel,
                                        float x) const {
    x_[d] = x;
    auto* const channels = reinterpret_cast<Element*>(in.origin + in.at(pixel));
    channels[channel] = from_float<Element>(x);
    if (channel + 1 < num_channels()) return;
    while (++channel % kPerUnit<Element> != 0) channels[channel] = Element{};
  }

  template <class Process>
  __device__ __forceinline__ Outputs outputs(const Tile& out, int channel, int pixel) const {
    const auto* const channels = reinterpret_cast<const Element*>(out.origin + out.at(pixel));
    return Process::outputs(channels + channel, num_channels());
  }

 private:
  const ResidentImages& images_;
  const unsigned char* packed_;
  int64_t last_packed_;
  unsigned char* shared_;
  float* x_;
};

// Readouts of the timesteps from `last` on, a block for each.
template <class Element>
static __global__ void __launch_bounds__(256)
    pack_readouts(const __grid_constant__ ResidentImages images,
                  const __grid_constant__ TimedDense readout, int64_t last,
                  unsigned char* packed) {
  const ResidentStack& stack = images.stack;
  const int64_t t = last + blockIdx.x;
  pack_operand<Element>(stack.layers[stack.num_layers - 1], stack.shapes[0],
                        readout.weights + t * readout.weights_step,
                        readout.bias + t * readout.bias_step,
                        packed + images.readout + int64_t{blockIdx.x} * images.readout_bytes);
}

// The operands of a network for so many timesteps from `last` on, in its memory for them.
template <class Element>
void pack_images(const ResidentImages& images, const NetworkArgs& network, int64_t last,
                 int64_t num_timesteps, cudaStream_t stream) {
  if (!network.packed || network.packed_bytes < images.packed_bytes(num_timesteps)) {
    throw std::invalid_argument("there must be room for the operands of a stack");
  }
  pack<Element>(images.stack, network.packed, stream);
  launch("pack_readouts", pack_readouts<Element>, grid_of(num_timesteps, 1), 256,
         bytes_of_order(images.stack), stream, images, network.layers[0], last,
         static_cast<unsigned char*>(network.packed));
}

inline void check_images(const NetworkArgs& network) {
  if (!network.stack || network.num_layers != 1 ||
      ResidentStack::count_layers(*network.stack) > ResidentStack::kMaxLayers) {
    throw std::invalid_argument("a kernel takes networks of images without a dense path and with "
                                "at most " + std::to_string(ResidentStack::kMaxLayers) + " layers");
  }
}

}  // namespace dpm
