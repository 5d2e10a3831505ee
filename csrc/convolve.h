// Convolutions of tiles and their gradients: small blocks of sums that stay in registers.
//
// With 16 images in the lanes, an output of a pixel is one sum over K rows of the image, in each of
// which the taps and channels of a pixel, (x, c), lie next to each other: K C vectors, "columns".
#pragma once

#include "tile.h"

namespace dpm {
namespace DPM_ISA {

// 5 x 4 sums of 32 registers, or 5 x 2 of 16: that leaves room for the pixels and for one weight,
// and a sum is met again late enough for the latency of a multiply-add.
constexpr int kBlockOutputs = 5;
constexpr int kBlockPixels = kRegisterBytes == 64 ? 4 : 2;

// Not a template argument: so few calls are made that looking at these costs nothing.
template <class T>
struct Finish {
  const T* bias;        // [F] with a stride of 0 between pixels, or [H W][F] with F
  int64_t bias_stride;
  bool leaky = false;   // whether what is not positive is multiplied by the slope
  T slope = 1;
  uint16_t* signs = nullptr;  // written if given, [H W][F]: a bit for each image, set if positive
  Tile<T> coarse = {};        // if given, of half the size: then added, each pixel to four,
  T coarse_factor = 1;        // times this
  T factor = 1;               // of the whole
};

// Which lanes are positive, a bit for each.
template <class V>
DPM_INLINE unsigned positive_lanes(V value) {
  const auto mask = value > V{};
#if defined(__AVX512DQ__)
  if constexpr (sizeof(value[0]) == 4) {
    return _mm512_movepi32_mask(reinterpret_cast<__m512i>(mask));
  } else {
    return _mm512_movepi64_mask(reinterpret_cast<__m512i>(mask));
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(value[0]) == 4) {
    return _mm256_movemask_ps(reinterpret_cast<__m256>(mask));
  } else {
    return _mm256_movemask_pd(reinterpret_cast<__m256d>(mask));
  }
#else
  unsigned lanes = 0;
  for (unsigned i = 0; i < sizeof(V) / sizeof(mask[0]); ++i) lanes |= (mask[i] & 1u) << i;
  return lanes;
#endif
}

// Bits of as many images as a register holds, from `lane` on.
DPM_INLINE void store_signs(uint16_t* signs, unsigned bits, int lane, int num_lanes) {
  if (num_lanes == 16) {
    *signs = static_cast<uint16_t>(bits);
  } else if (num_lanes == 8) {
    reinterpret_cast<uint8_t*>(signs)[lane / 8] = static_cast<uint8_t>(bits);
  } else {
    *signs = static_cast<uint16_t>((lane ? *signs : 0u) | bits << lane);
  }
}

// What `finish` says of the sums of a pixel's outputs from the first one on, which is looked at once
// for all of them.
template <class T, int kOutputs>
DPM_INLINE void finish_sums(const Finish<T>& finish, Register<T> (&sum)[kOutputs], int64_t W,
                            int64_t F, int64_t y, int64_t x, int64_t first, int lane) {
  using V = Register<T>;
  if (finish.signs) {
    uint16_t* signs = finish.signs + (y * W + x) * F + first;
    DPM_UNROLL
    for (int o = 0; o < kOutputs; ++o) {
      store_signs(signs + o, positive_lanes(sum[o]), lane, kRegisterLanes<T>);
    }
  }
  if (finish.leaky) {
    const V slope = splat<V>(finish.slope);
    DPM_UNROLL
    for (int o = 0; o < kOutputs; ++o) sum[o] = select(sum[o] > V{}, sum[o], sum[o] * slope);
  }
  if (finish.coarse.data) {
    const T* coarse = finish.coarse.at(y / 2, x / 2) + first * kImages + lane;
    const V factor = splat<V>(finish.coarse_factor);
    DPM_UNROLL
    for (int o = 0; o < kOutputs; ++o) sum[o] += load<V>(coarse + o * kImages) * factor;
  }
  if (finish.factor != 1) {
    const V factor = splat<V>(finish.factor);
    DPM_UNROLL
    for (int o = 0; o < kOutputs; ++o) sum[o] = sum[o] * factor;
  }
}

// Stores them too.
template <class T, int kOutputs>
DPM_INLINE void finish_pixel(const Finish<T>& finish, Register<T> (&sum)[kOutputs],
                             const Tile<T>& out, int64_t y, int64_t x, int64_t first, int lane) {
  finish_sums(finish, sum, out.W, out.C, y, x, first, lane);
  T* to = out.at(y, x) + first * kImages + lane;
  DPM_UNROLL
  for (int o = 0; o < kOutputs; ++o) store(to + o * kImages, sum[o]);
}

// In a register, for several multiply-adds: GCC would load it anew for each of them.
template <class V>
DPM_INLINE V loaded(V value) {
#if defined(__AVX2__)
  asm("" : "+v"(value));
#endif
  return value;
}

// A parameter of all images, or where each has its own, of 16 images.
template <class V, bool kOfEach, class T>
DPM_INLINE V parameter(const T* parameters, int64_t i, int lane) {
  if constexpr (kOfEach) {
    return loaded(load<V>(parameters + i * kImages + lane));
  } else {
    return splat<V>(parameters[i]);
  }
}

// kPixels pixels of `out` from one on, the last ones repeated past the end of the image, and
// where the taps of their kernels begin.
template <class T, int kPixels>
struct PixelBlock {
  const T* from[kPixels];
  int64_t y[kPixels], x[kPixels];
  int64_t first, last;  // of the block, and of the image

  DPM_INLINE PixelBlock(const Tile<T>& in, int64_t K, const Tile<T>& out, int64_t first, int lane)
      : first(first), last(out.H * out.W - 1) {
    DPM_UNROLL
    for (int i = 0; i < kPixels; ++i) {
      if (i == 0) {  // one division: each takes as long as several multiply-adds
        y[i] = number(i) / out.W, x[i] = number(i) % out.W;
      } else {
        const bool is_next = is_there(i), wraps = is_next && x[i - 1] + 1 == out.W;
        y[i] = y[i - 1] + wraps, x[i] = wraps ? 0 : x[i - 1] + is_next;
      }
      from[i] = in.at(y[i] - K / 2, x[i] - K / 2) + lane;
    }
  }

  DPM_INLINE bool is_there(int i) const { return first + i <= last; }
  DPM_INLINE int64_t number(int i) const { return smaller(first + i, last); }
};

// kOutputs outputs of kBlockPixels pixels.
template <class T, int kOutputs, bool kOfEach>
static __attribute__((noinline)) void convolve_block(const Tile<T>& in, int64_t K,
                                                     const T* weights, const Finish<T>& finish,
                                                     const Tile<T>& out, int64_t first_pixel,
                                                     int64_t first_output, int lane) {
  using V = Register<T>;
  PixelBlock<T, kBlockPixels> block(in, K, out, first_pixel, lane);
  V sum[kBlockPixels][kOutputs];
  DPM_UNROLL
  for (int i = 0; i < kBlockPixels; ++i) {
    const int64_t bias = block.number(i) * finish.bias_stride + first_output;
    DPM_UNROLL
    for (int o = 0; o < kOutputs; ++o) {
      sum[i][o] = parameter<V, kOfEach>(finish.bias, bias + o, lane);
    }
  }
  for (int64_t k_y = 0; k_y < K; ++k_y) {
    for (int64_t k = 0; k < K * in.pixel(); k += kImages) {
      V pixels[kBlockPixels];
      DPM_UNROLL
      for (int i = 0; i < kBlockPixels; ++i) pixels[i] = load<V>(block.from[i] + k);
      DPM_UNROLL
      for (int o = 0; o < kOutputs; ++o) {
        const V weight = parameter<V, kOfEach>(weights, o, lane);
        DPM_UNROLL
        for (int i = 0; i < kBlockPixels; ++i) sum[i][o] += weight * pixels[i];
      }
      weights += kOutputs * (kOfEach ? kImages : 1);
    }
    DPM_UNROLL
    for (int i = 0; i < kBlockPixels; ++i) block.from[i] += in.row();
  }
  DPM_UNROLL
  for (int i = 0; i < kBlockPixels; ++i) {
    if (!block.is_there(i)) break;
    finish_pixel(finish, sum[i], out, block.y[i], block.x[i], first_output, lane);
  }
}

// kOutputs gradients of each of kBlockPixels columns, summed over all pixels, lane by lane; `more`:
// added to the sums that are there.
template <class T, int kOutputs>
static __attribute__((noinline)) void correlate_block(const Tile<T>& in, int64_t K,
                                                      const Tile<T>& grad, int64_t k_y,
                                                      int64_t first_column, int64_t first_output,
                                                      int lane, bool more, T* sums) {
  using V = Register<T>;
  const int64_t num_columns = K * in.C;
  sums += (k_y * grad.C + first_output) * num_columns * kImages;
  int64_t columns[kBlockPixels];
  V sum[kOutputs][kBlockPixels] = {};
  DPM_UNROLL
  for (int i = 0; i < kBlockPixels; ++i) {
    columns[i] = smaller(first_column + i, num_columns - 1) * kImages + lane;
    if (!more) continue;
    DPM_UNROLL
    for (int o = 0; o < kOutputs; ++o) {
      sum[o][i] = load<V>(sums + o * num_columns * kImages + columns[i]);
    }
  }
  for (int64_t y = 0; y < grad.H; ++y) {
    const T* from = in.at(y + k_y - K / 2, -(K / 2));
    const T* gradients = grad.at(y, 0) + first_output * kImages + lane;
    for (int64_t x = 0; x < grad.W; ++x) {
      V pixels[kBlockPixels];
      DPM_UNROLL
      for (int i = 0; i < kBlockPixels; ++i) pixels[i] = load<V>(from + columns[i]);
      DPM_UNROLL
      for (int o = 0; o < kOutputs; ++o) {
        const V gradient = loaded(load<V>(gradients + o * kImages));
        DPM_UNROLL
        for (int i = 0; i < kBlockPixels; ++i) sum[o][i] += gradient * pixels[i];
      }
      from += in.pixel();
      gradients += grad.pixel();
    }
  }
  DPM_UNROLL
  for (int o = 0; o < kOutputs; ++o) {
    DPM_UNROLL
    for (int i = 0; i < kBlockPixels; ++i) {
      store(sums + o * num_columns * kImages + columns[i], sum[o][i]);
    }
  }
}

// call(std::integral_constant<int, outputs>, first output) for blocks of outputs.
template <int kBlock = kBlockOutputs, class Call>
DPM_INLINE void for_blocks(int64_t num_outputs, Call call) {
  static_assert(kBlock == 4 || kBlock == 5);
  for (int64_t first = 0; first < num_outputs; first += kBlock) {
    switch (num_outputs - first) {
      case 1: call(std::integral_constant<int, 1>{}, first); break;
      case 2: call(std::integral_constant<int, 2>{}, first); break;
      case 3: call(std::integral_constant<int, 3>{}, first); break;
      case 4: call(std::integral_constant<int, 4>{}, first); break;
      default: call(std::integral_constant<int, kBlock>{}, first);
    }
  }
}

// call(outputs, first output, first lane) for the lanes of each block, one register after another.
template <class T, class Call>
DPM_INLINE void for_output_blocks(int64_t num_outputs, Call call) {
  for_blocks(num_outputs, [&](auto outputs, int64_t first) {
    for (int lane = 0; lane < kImages; lane += kRegisterLanes<T>) call(outputs, first, lane);
  });
}

// out = finish(sum over taps and channels); weights where `packed_index` says. kOfEach: weights and
// biases are those of 16 images, next to each other. The halo of out is left.
template <bool kOfEach = false, class T>
static void convolve(const Tile<T>& in, int64_t K, const T* weights, const Finish<T>& finish,
                     const Tile<T>& out) {
  for (int64_t pixel = 0; pixel < out.H * out.W; pixel += kBlockPixels) {
    for_output_blocks<T>(out.C, [&](auto outputs, int64_t first, int lane) {
      const T* block = weights + first * K * K * in.C * (kOfEach ? kImages : 1);
      convolve_block<T, outputs, kOfEach>(in, K, block, finish, out, pixel, first, lane);
    });
  }
}

// The gradient of the kernels, lane by lane: [K (y)][F][K (x)][C][16 images]; `more`: added to sums.
template <class T>
static void correlate(const Tile<T>& in, int64_t K, const Tile<T>& grad, T* sums,
                      bool more = false) {
  for (int64_t k_y = 0; k_y < K; ++k_y) {
    for_output_blocks<T>(grad.C, [&](auto outputs, int64_t first, int lane) {
      for (int64_t column = 0; column < K * in.C; column += kBlockPixels) {
        correlate_block<T, outputs>(in, K, grad, k_y, column, first, lane, more, sums);
      }
    });
  }
}

// Where a kernel's weight of (output, input, y, x) is for `convolve`: blocks of five outputs, each in
// the order in which it is read.
template <int kBlock = kBlockOutputs>
DPM_INLINE int64_t packed_index(int64_t F, int64_t C, int64_t K, int64_t f, int64_t c, int64_t k_y,
                                int64_t k_x) {
  const int64_t first = f / kBlock * kBlock;
  const int64_t outputs = smaller(kBlock, F - first);
  return first * K * K * C + ((k_y * K + k_x) * C + c) * outputs + (f - first);
}

}  // namespace DPM_ISA
}  // namespace dpm
