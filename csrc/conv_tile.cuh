// Images in shared memory and what a block does to them: device functions for kernels that keep them
// there. Every thread of the block comes to each function; a barrier lies between two of them that
// touch the same tile, and is the caller's.
#pragma once

#include "launch.cuh"
#include "math.h"
#include "mma.cuh"
#include "resident_conv.h"

namespace dpm {

template <class Element>
constexpr int kPerUnit = kUnitBytes / sizeof(Element);

DPM_INLINE int ceil_div(int a, int b) { return (a + b - 1) / b; }

struct Tile {
  TileShape shape;
  uint2* origin;  // pixel (0, 0)

  __device__ __forceinline__ int num_pixels() const { return shape.H * shape.W; }
  // Both below 2^15, as no shared memory holds more pixels.
  __device__ __forceinline__ int row_of(int pixel) const {
    return static_cast<int>(__umulhi(2u * pixel, shape.inverse_width));
  }
  __device__ __forceinline__ int at(int pixel) const {
    return pixel * shape.stride + row_of(pixel) * shape.gap;
  }
};

__device__ __forceinline__ float widen(float x) { return x; }
template <class Element>
__device__ __forceinline__ float widen(Element x) {
  return unpack<Element>(x.bits).low;
}

// Two neighboring channels, of which the first has an even number.
template <class Element>
__device__ __forceinline__ Pair32 load_pair(const uint2* pixel, int channel) {
  if constexpr (std::is_same_v<Element, float>) {
    const uint2 both = pixel[channel / 2];
    return {__uint_as_float(both.x), __uint_as_float(both.y)};
  } else {
    return unpack<Element>(reinterpret_cast<const uint32_t*>(pixel)[channel / 2]);
  }
}

template <class Element>
__device__ __forceinline__ void store_pair(uint2* pixel, int channel, Pair32 pair) {
  if constexpr (std::is_same_v<Element, float>) {
    pixel[channel / 2] = {__float_as_uint(pair.low), __float_as_uint(pair.high)};
  } else {
    reinterpret_cast<uint32_t*>(pixel)[channel / 2] = pack<Element>(pair.low, pair.high);
  }
}

// Calls visit(pixel, unit) for this thread's share of all, neighbors in memory side by side.
template <class Visit>
__device__ __forceinline__ void for_units(int num_pixels, int units, bool channels_last,
                                          Visit visit) {
#pragma unroll 1
  for (int i = threadIdx.x; i < num_pixels * units; i += blockDim.x) {
    const int run = channels_last ? units : num_pixels;
    const int slow = i / run, fast = i - slow * run;
    visit(channels_last ? slow : fast, channels_last ? fast : slow);
  }
}

// Whether a unit of channels can be loaded or stored at once in an image outside.
template <class Element>
bool in_units(const Images& images, int64_t channels) {
  constexpr int kCount = kPerUnit<Element>;
  return images.c == 1 && channels % kCount == 0 && images.n % kCount == 0 &&
         images.y % kCount == 0 && images.x % kCount == 0 &&
         reinterpret_cast<uintptr_t>(images.data) % kUnitBytes == 0;
}

template <class Element>
__device__ __forceinline__ Element* address(const Images& images, int64_t n, const Tile& tile,
                                            int pixel, int channel) {
  const int y = tile.row_of(pixel), x = pixel - y * tile.shape.W;
  return static_cast<Element*>(images.data) + n * images.n + y * images.y + x * images.x +
         channel * images.c;
}

// tile = image n; the last unit is filled up with zeros.
template <class Element>
__device__ __forceinline__ void load_image(const Images& images, int64_t n, int C, bool whole_units,
                                           const Tile& tile) {
  constexpr int kCount = kPerUnit<Element>;
  struct alignas(kUnitBytes) Unit {
    Element channel[kCount];
  };
  for_units(tile.num_pixels(), ceil_div(C, kCount), images.c == 1, [&](int pixel, int unit) {
    const Element* from = address<Element>(images, n, tile, pixel, unit * kCount);
    Unit out{};
    if (whole_units) {
      out = *reinterpret_cast<const Unit*>(from);
    } else {
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        if (unit * kCount + k < C) out.channel[k] = from[k * images.c];
      }
    }
    reinterpret_cast<Unit*>(tile.origin)[tile.at(pixel) + unit] = out;
  });
}

// Image n = tile.
template <class Element>
__device__ __forceinline__ void store_image(const Tile& tile, const Images& images, int64_t n,
                                            int F, bool whole_units) {
  constexpr int kCount = kPerUnit<Element>;
  struct alignas(kUnitBytes) Unit {
    Element channel[kCount];
  };
  for_units(tile.num_pixels(), ceil_div(F, kCount), images.c == 1, [&](int pixel, int unit) {
    const Unit in = reinterpret_cast<const Unit*>(tile.origin)[tile.at(pixel) + unit];
    Element* to = address<Element>(images, n, tile, pixel, unit * kCount);
    if (whole_units) {
      *reinterpret_cast<Unit*>(to) = in;
    } else {
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        if (unit * kCount + k < F) to[k * images.c] = in.channel[k];
      }
    }
  });
}

// coarse = means of 2 x 2 pixels, rounded as they are stored.
template <class Element>
__device__ __forceinline__ void pool_tile(const Tile& fine, int C, const Tile& coarse) {
  for_units(coarse.num_pixels(), ceil_div(C, kPerUnit<Element>), true, [&](int pixel, int unit) {
    const int y = coarse.row_of(pixel), x = pixel - y * coarse.shape.W;
    const int row = fine.shape.W * fine.shape.stride + fine.shape.gap;
    const uint2* from = fine.origin + 2 * (y * row + x * fine.shape.stride) + unit;
    uint2* to = coarse.origin + coarse.at(pixel) + unit;
#pragma unroll
    for (int c = 0; c < kPerUnit<Element>; c += 2) {
      const Pair32 a = load_pair<Element>(from, c);
      const Pair32 b = load_pair<Element>(from + fine.shape.stride, c);
      const Pair32 d = load_pair<Element>(from + row, c);
      const Pair32 e = load_pair<Element>(from + row + fine.shape.stride, c);
      store_pair<Element>(to, c, {((a.low + b.low) + (d.low + e.low)) * 0.25f,
                                  ((a.high + b.high) + (d.high + e.high)) * 0.25f});
    }
  });
}

// What the sums of a scale, bias included, become.
struct Finish {
  const void* bias_of_locations;  // (F, H, W) outside, or none
  bool has_coarse;                // the map of the next scale is added, each pixel to four
  Tile coarse;
  bool is_finest, after_sum;
  float slope, mean;

  template <class Element>
  __device__ __forceinline__ Pair32 of(Pair32 z, const Tile& out, int F, int pixel,
                                       int channel) const {
    if (bias_of_locations) {
      const auto bias = static_cast<const Element*>(bias_of_locations) + pixel;
      const int64_t size = out.num_pixels();
      if (channel < F) z.low += widen(bias[channel * size]);
      if (channel + 1 < F) z.high += widen(bias[(channel + 1) * size]);
    }
    if (!after_sum) {
      z.low = z.low > 0 ? z.low : slope * z.low;
      z.high = z.high > 0 ? z.high : slope * z.high;
    }
    if (has_coarse) {
      const int y = out.row_of(pixel), x = pixel - y * out.shape.W;
      const int at = (y / 2) * (coarse.shape.W * coarse.shape.stride + coarse.shape.gap) +
                     (x / 2) * coarse.shape.stride;
      const Pair32 up = load_pair<Element>(coarse.origin + at, channel);
      z.low += up.low;
      z.high += up.high;
    }
    if (!is_finest) return z;
    if (after_sum) return {softplus(z.low), softplus(z.high)};
    return {z.low * mean, z.high * mean};
  }
};

// What a layer multiplies one scale by, in shared memory; see ResidentLayer.
struct Operand {
  int F, num_steps, num_columns;
  const int* offsets;
  const float* biases;
  const uint2* weights;
};

// The registers of an operand as mma takes them: rounded to tf32 if they are float, ...
template <class Element>
__device__ __forceinline__ uint32_t rounded(uint32_t x) {
  return std::is_same_v<Element, float> ? tf32_of_float(__uint_as_float(x)) : x;
}
// ... and what that left, to be multiplied too.
__device__ __forceinline__ uint32_t rest(uint32_t x, uint32_t rounded) {
  return tf32_of_float(__uint_as_float(x) - __uint_as_float(rounded));
}

// What a warp has at a time: fragments of 16 pixels, which share the loads of weights, by columns of
// 8 features, which share those of pixels. Shared memory is the bottleneck: a step of these reads 16
// rows of banks of pixels, 6 of weights and 1 of offsets for 12 products. More of either would spill,
// as more than two fragments would beside the registers of a split.
template <bool kSplit>
constexpr int kFragments = kSplit ? 2 : 4;
constexpr int kMostColumns = 3;

// A warp's share: kFragments of pixels from `first` on, kColumns of features from `column` on.
template <class Element, bool kSplit, int kColumns>
__device__ __forceinline__ void convolve_fragments(const Tile& in, const Operand& operand,
                                                   const Finish& finish, const Tile& out,
                                                   int first, int column) {
  constexpr int kCount = kFragments<kSplit>;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  // Row r of a fragment is its pixel 4 (r mod 4) + r / 4; see TileShape.
  int pixels[kCount][2];
  const unsigned char* from[kCount][2];
#pragma unroll
  for (int m = 0; m < kCount; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int last = in.num_pixels() - 1;
      const int pixel = first + 16 * m + 4 * (g % 4) + g / 4 + 2 * half;
      pixels[m][half] = pixel;
      from[m][half] = reinterpret_cast<const unsigned char*>(in.origin) +
                      kUnitBytes * in.at(pixel < last ? pixel : last);
    }
  }
  float sums[kCount][kColumns][4];
#pragma unroll
  for (int n = 0; n < kColumns; ++n) {
    const float* bias = operand.biases + (column + n) * kColumn + 2 * t;
#pragma unroll
    for (int m = 0; m < kCount; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[m][n][i] = bias[i % 2];
    }
  }
  const int* offset = operand.offsets + t;
  const uint2* weight = operand.weights + column * 32 + lane;
#pragma unroll 1
  for (int step = 0; step < operand.num_steps; ++step) {
    uint32_t a[kCount][4], b[kColumns][2];
    uint32_t a_rest[kCount][4], b_rest[kColumns][2];
#pragma unroll
    for (int m = 0; m < kCount; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint2 unit = *reinterpret_cast<const uint2*>(from[m][half] + *offset);
        a[m][half] = rounded<Element>(unit.x);
        a[m][half + 2] = rounded<Element>(unit.y);
        if constexpr (kSplit) {
          a_rest[m][half] = rest(unit.x, a[m][half]);
          a_rest[m][half + 2] = rest(unit.y, a[m][half + 2]);
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      const uint2 unit = weight[n * 32];
      b[n][0] = rounded<Element>(unit.x);
      b[n][1] = rounded<Element>(unit.y);
      if constexpr (kSplit) {
        b_rest[n][0] = rest(unit.x, b[n][0]);
        b_rest[n][1] = rest(unit.y, b[n][1]);
      }
    }
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int m = 0; m < kCount; ++m) {
        if constexpr (kSplit) {
          // Tensor cores truncate as they add: the long sum is left to the rounding of float.
          float part[4] = {};
          mma<Element>(part, a_rest[m], b[n]);
          mma<Element>(part, a[m], b_rest[n]);
          mma<Element>(part, a[m], b[n]);
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[m][n][i] += part[i];
        } else {
          mma<Element>(sums[m][n], a[m], b[n]);
        }
      }
    }
    offset += kUnitsPerStep;
    weight += operand.num_columns * 32;
  }
  const int stored = ceil_div(operand.F, kPerUnit<Element>) * kPerUnit<Element>;
#pragma unroll
  for (int m = 0; m < kCount; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int pixel = pixels[m][half];
      if (pixel >= out.num_pixels()) continue;
      uint2* to = out.origin + out.at(pixel);
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        const int channel = (column + n) * kColumn + 2 * t;
        if (channel >= stored) continue;
        const Pair32 sum{sums[m][n][2 * half], sums[m][n][2 * half + 1]};
        store_pair<Element>(to, channel,
                            finish.of<Element>(sum, out, operand.F, pixel, channel));
      }
    }
  }
}

// out = finish(the convolution of `in`), both of one shape, by the warps of the block. kSplit: each
// product of floats is made of three, to float's precision.
template <class Element, bool kSplit>
__device__ __forceinline__ void convolve_tile(const Tile& in, const Operand& operand,
                                              const Finish& finish, const Tile& out) {
  const int warp = threadIdx.x / 32, num_warps = blockDim.x / 32;
  const int num_parts = ceil_div(operand.num_columns, kMostColumns);
  const int width = ceil_div(operand.num_columns, num_parts);
  const int num_shares = ceil_div(in.num_pixels(), 16 * kFragments<kSplit>) * num_parts;
#pragma unroll 1
  for (int share = warp; share < num_shares; share += num_warps) {
    const int first = share / num_parts * 16 * kFragments<kSplit>;
    const int column = share % num_parts * width;
    const int left = operand.num_columns - column;
    const auto convolve = [&](auto columns) {
      convolve_fragments<Element, kSplit, columns>(in, operand, finish, out, first, column);
    };
    switch (left < width ? left : width) {
      case 1: convolve(std::integral_constant<int, 1>{}); break;
      case 2: convolve(std::integral_constant<int, 2>{}); break;
      default: convolve(std::integral_constant<int, kMostColumns>{});
    }
  }
}

}  // namespace dpm
