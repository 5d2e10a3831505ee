// Multiscale convolutions of bfloat16 by the instruction that adds two of its products to a float32:
// twice as many multiplications as float32 has.
//
// Two neighboring channels of an image are a pair: 32 bits, the first channel in the lower half, a
// zero in the upper one where the number of channels is odd. A tile of pairs is a Tile<float> with
// half as many channels, of which nothing but the bits has a meaning; so what only moves bits is that
// of tile.h. Sums are float32 and are rounded to bfloat16 between layers, as torch does it. The
// instruction takes what is smaller than the smallest normal number for 0.
#pragma once

#include "multiscale_layer.h"

namespace dpm {
namespace DPM_ISA {

#if defined(DPM_PAIRS)

// 4 x 4 sums of 32 registers, more of which gain nothing; outputs are even, being stored in pairs.
constexpr int kPairOutputs = 4;
constexpr int kPairPixels = 4;

DPM_INLINE int64_t num_pairs(int64_t channels) { return (channels + 1) / 2; }

// A tile of pairs in the memory of one of as many channels.
DPM_INLINE Tile<float> pairs_of(Tile<float> tile) {
  tile.C = num_pairs(tile.C);
  return tile;
}

DPM_INLINE f32x16 first_of_pairs(u32x16 pairs) { return float_of_bf16<f32x16>(pairs); }
DPM_INLINE f32x16 second_of_pairs(u32x16 pairs) { return bits<f32x16>(pairs & 0xffff0000u); }

// Rounded to nearest even.
DPM_INLINE f32x16 pairs_from(f32x16 first, f32x16 second) {
  constexpr uint16_t kHalves[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                    8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i halves = bits<__m512i>(_mm512_cvtne2ps_pbh(second, first));
  return bits<f32x16>(_mm512_permutexvar_epi16(load<__m512i>(kHalves), halves));
}

// A tile becomes one of pairs, in its own memory, without a halo.
static Tile<float> to_pairs(const Tile<float>& tile) {
  const Tile<float> pairs = pairs_of(tile);
  for (int64_t y = 0; y < tile.H; ++y) {
    for (int64_t x = 0; x < tile.W; ++x) {
      const float* from = tile.at(y, x);
      float* to = pairs.at(y, x);
      for (int64_t c = 0; c < tile.C; c += 2, from += 2 * kImages, to += kImages) {
        const f32x16 first = load<f32x16>(from);
        store(to, pairs_from(first, c + 1 < tile.C ? load<f32x16>(from + kImages) : f32x16{}));
      }
    }
  }
  return pairs;
}

// What is subnormal is 0 here too, as it is to the instructions that multiply and round.
DPM_INLINE f32x16 normal_or_zero(f32x16 x) {
  return select(abs(x) < 0x1p-126f, f32x16{}, x);
}

// As `pool`, the mean of four pixels.
static void pool_pairs(const Tile<float>& in, const Tile<float>& out) {
  for (int64_t y = 0; y < out.H; ++y) {
    for (int64_t x = 0; x < out.W; ++x) {
      const float *top = in.at(2 * y, 2 * x), *bottom = in.at(2 * y + 1, 2 * x);
      float* to = out.at(y, x);
      for (int64_t k = 0; k < out.pixel(); k += kImages) {
        const u32x16 a = load<u32x16>(top + k), b = load<u32x16>(top + in.pixel() + k);
        const u32x16 c = load<u32x16>(bottom + k), d = load<u32x16>(bottom + in.pixel() + k);
        const auto mean = [&](auto of_pairs) {
          return ((of_pairs(a) + of_pairs(b)) + (of_pairs(c) + of_pairs(d))) * 0.25f;
        };
        store(to + k,
              pairs_from(mean([](u32x16 pairs) { return normal_or_zero(first_of_pairs(pairs)); }),
                         mean([](u32x16 pairs) { return normal_or_zero(second_of_pairs(pairs)); })));
      }
    }
  }
  fill_halo(out);
}

// Which weights a block of pixels meets, counted through K rows of K C, and where their pixels are.
struct Taps {
  int64_t first, end;
  const int64_t* offsets;
};

// kOutputs outputs of a block of pixels, stored as floats or as pairs.
template <int kOutputs, bool kAsPairs>
static __attribute__((noinline)) void convolve_pairs_block(
    const PixelBlock<float, kPairPixels>& block, const Taps& taps, const float* weights,
    const Finish<float>& finish, const Tile<float>& out, int64_t first_output) {
  const float* from[kPairPixels];
  f32x16 sum[kPairPixels][kOutputs];
  DPM_UNROLL
  for (int i = 0; i < kPairPixels; ++i) {
    from[i] = block.from[i];
    const float* bias = finish.bias + block.number(i) * finish.bias_stride + first_output;
    DPM_UNROLL
    for (int o = 0; o < kOutputs; ++o) sum[i][o] = splat<f32x16>(bias[o]);
  }
  weights += taps.first * kOutputs;
  const int64_t* const end = taps.offsets + taps.end;
  for (const int64_t* offset = taps.offsets + taps.first; offset < end; ++offset) {
    __m512bh pixels[kPairPixels];
    DPM_UNROLL
    for (int i = 0; i < kPairPixels; ++i) pixels[i] = load<__m512bh>(from[i] + *offset);
    DPM_UNROLL
    for (int o = 0; o < kOutputs; ++o) {
      const u32x16 weight = loaded(splat<u32x16>(bits<uint32_t>(weights[o])));
      DPM_UNROLL
      for (int i = 0; i < kPairPixels; ++i) {
        sum[i][o] = _mm512_dpbf16_ps(sum[i][o], bits<__m512bh>(weight), pixels[i]);
      }
    }
    weights += kOutputs;
  }
  DPM_UNROLL
  for (int i = 0; i < kPairPixels; ++i) {
    if (!block.is_there(i)) break;
    const int64_t y = block.y[i], x = block.x[i];
    finish_sums(finish, sum[i], out.W, out.C, y, x, first_output, 0);
    float* to = out.at(y, x) + (kAsPairs ? first_output / 2 : first_output) * kImages;
    DPM_UNROLL
    for (int o = 0; o < kOutputs; o += 1 + kAsPairs, to += kImages) {
      if constexpr (kAsPairs) {
        store(to, pairs_from(sum[i][o], o + 1 < kOutputs ? sum[i][o + 1] : f32x16{}));
      } else {
        store(to, sum[i][o]);
      }
    }
  }
}

// How many numbers `convolve_pairs` works with.
DPM_INLINE int64_t num_offsets(int64_t C, int64_t K) { return K * K * num_pairs(C); }

// As `convolve`, with F outputs, of pairs and their weights. One loop over all weights of a block,
// for which the offsets are: the ends of three are mispredicted, which cost a prototype 3 %.
template <bool kAsPairs>
static void convolve_pairs(const Tile<float>& in, int64_t K, int64_t F, const float* weights,
                           const Finish<float>& finish, const Tile<float>& out, int64_t* offsets) {
  const int64_t length = K * in.C;
  for (int64_t k = 0; k < K * length; ++k) {
    offsets[k] = k / length * in.row() + k % length * kImages;
  }
  for (int64_t pixel = 0; pixel < out.H * out.W; pixel += kPairPixels) {
    const PixelBlock<float, kPairPixels> block(in, K, out, pixel, 0);
    Taps taps{0, K * length, offsets};
    if (in.parts == 1) {  // whose rows beyond the image are zeros: no sum of finite weights changes
      taps.first = larger(0, K / 2 - block.y[kPairPixels - 1]) * length;
      taps.end = smaller(K, out.H + K / 2 - block.y[0]) * length;
    }
    for_blocks<kPairOutputs>(F, [&](auto outputs, int64_t first) {
      const float* of_block = weights + first * K * length;
      convolve_pairs_block<outputs, kAsPairs>(block, taps, of_block, finish, out, first);
    });
  }
}

// A kernel as `convolve_pairs` takes it, from weight(output, input, y, x).
template <class Weight>
static void pack_pairs(int64_t F, int64_t C, int64_t K, Weight weight, float* to) {
  const int64_t P = num_pairs(C);
  for (int64_t f = 0; f < F; ++f) {
    for (int64_t c = 0; c < C; c += 2) {
      for (int64_t y = 0; y < K; ++y) {
        for (int64_t x = 0; x < K; ++x) {
          const uint32_t first = bf16_of_float<float>(weight(f, c, y, x));
          const uint32_t second = c + 1 < C ? bf16_of_float<float>(weight(f, c + 1, y, x)) : 0;
          to[packed_index<kPairOutputs>(F, P, K, f, c / 2, y, x)] =
              bits<float>(first | second << 16);
        }
      }
    }
  }
}

// As `layer_forward`, from pairs and to them, or to floats where these are wanted. `offsets`: memory
// for num_offsets.
static Tile<float> layer_forward_in_pairs(const Form<float>& form, const PackedLayer<float>& layer,
                                          const Pyramid<float>& in, const Pyramid<float>& out,
                                          bool as_pairs, int64_t* offsets) {
  for (int s = 1; s < form.num_scales; ++s) pool_pairs(in[s - 1], in[s]);
  for (int s = form.num_scales - 1; s >= 0; --s) {
    Finish<float> finish{layer.biases[s], layer.bias_stride};
    finish.leaky = !form.after_sum;
    finish.slope = form.slope;
    if (s + 1 < form.num_scales) finish.coarse = out[s + 1];
    if (s == 0) finish.factor = form.mean();
    if (s == 0 && as_pairs && !form.after_sum) {
      const Tile<float> pairs = pairs_of(out[0]);
      convolve_pairs<true>(in[0], layer.K, layer.F, layer.weights[0], finish, pairs, offsets);
    } else {
      convolve_pairs<false>(in[s], layer.K, layer.F, layer.weights[s], finish, out[s],
                            offsets);
    }
  }
  if (form.after_sum) {
    softplus_of(out[0]);
    if (as_pairs) to_pairs(out[0]);
  }
  const Tile<float> result = as_pairs ? pairs_of(out[0]) : out[0];
  fill_halo(result);
  return result;
}

#endif

}  // namespace DPM_ISA
}  // namespace dpm
