// 3 x 3 convolutions of tiles with half the multiplications: four neighbors of a row at a time from
// six products, where the definition takes twelve (Toom and Cook; Winograd's minimal filtering).
//
// With d six pixels of a row, w a row of a kernel and y four outputs, y = A'((G w) * (B d)); products
// are summed over kernel rows and channels before A' is applied. Rows of B, G and A belong to the
// points 0, 1, -1, 1/2, -2 and infinity, of which errors are 1.5 times those of the definition (root
// mean square, 20 channels, normal data; 2.4 times with 2 and -2 in place of 1/2 and -2).
#pragma once

#include "convolve.h"

namespace dpm {
namespace DPM_ISA {

constexpr int kPoints = 6;
constexpr int kRun = 4;  // outputs of a row at a time
// Rows of an image whose B d are in memory: a block of four runs reaches over four rows and two more.
constexpr int kRing = kBlockPixels == 4 ? 8 : 4;

DPM_INLINE int64_t num_runs(int64_t W) { return (W + kRun - 1) / kRun; }

// Whether it pays. Measured for 28 x 28 images on Zen 4: with 1 input or output channel it takes 1.2
// to 1.9 times as long, with 2 it gains 8 %, with 4 28 % and with 20 70 %. Runs that reach beyond the
// image are in vain.
template <class T>
DPM_INLINE bool uses_toom_cook(int64_t K, int64_t C, int64_t F, int64_t W) {
  return std::is_same_v<T, float> && K == 3 && C > 1 && F > 1 && 4 * W >= 3 * kRun * num_runs(W);
}

// (G w)_i of a kernel row w.
DPM_INLINE double kernel_at_point(int i, const double* w) {
  switch (i) {
    case 0: return w[0];
    case 1: return (w[0] + w[1] + w[2]) / 3;
    case 2: return (w[0] - w[1] + w[2]) / -3;
    case 3: return (w[0] + w[1] / 2 + w[2] / 4) / -0.9375;
    case 4: return (w[0] - 2 * w[1] + 4 * w[2]) / 15;
    default: return w[2];
  }
}

// Where rows at their points go, `plane` apart: [blocks of channels][runs][channels of a block][16
// images]. For `convolve_toom_cook` all channels are one block.
template <class T>
struct PointRows {
  T* data;
  int64_t plane, C, block, num_runs;

  // The channels of a block: `first` and those after it.
  DPM_INLINE int64_t size(int64_t first) const { return smaller(block, C - first); }
  DPM_INLINE T* at(int64_t first, int64_t run) const {
    return data + (first * num_runs + run * size(first)) * kImages;
  }
};

// B d of a row of pixels, the first of its runs being `first_run`; zeros beyond the halo.
template <class T>
static void row_at_points(const Tile<T>& in, int64_t y, const PointRows<T>& to,
                          int64_t first_run) {
  using V = Register<T>;
  const int64_t plane = to.plane;
  for (int64_t run = 0; run < num_runs(in.W); ++run) {
    const T* from = in.at(y, run * kRun - 1);
    const int64_t valid = in.W + 1 - (run * kRun - 1);
    for (int64_t first = 0; first < in.C; first += to.block) {
      T* out = to.at(first, first_run + run);
      T* const end = out + to.size(first) * kImages;
      for (; out < end; out += kRegisterLanes<T>, from += kRegisterLanes<T>) {
        V d[kPoints];
        DPM_UNROLL
        for (int j = 0; j < kPoints; ++j) d[j] = j < valid ? load<V>(from + j * in.pixel()) : V{};
        const V odd = d[3] - d[1], even = d[4] - d[2];
        store(out, d[0] + d[4] + odd * T(1.5) - d[2] * T(2));
        store(out + plane, d[4] - d[1] + d[2] * T(0.5) + d[3] * T(2.5));
        store(out + 2 * plane, d[4] + d[1] - d[2] * T(2.5) + d[3] * T(0.5));
        store(out + 3 * plane, even + odd * T(2));
        store(out + 4 * plane, even - odd * T(0.5));
        store(out + 5 * plane, d[5] + d[1] + even * T(1.5) - d[3] * T(2));
      }
    }
  }
}

// Products at one point: kOutputs outputs of kBlockPixels runs, `stride` apart. `from`: the runs in
// each of three rows; `offset`: of the point and the lane.
template <class T, int kOutputs>
static __attribute__((noinline)) void products_at_point(const T* const (*from)[kBlockPixels],
                                                        int64_t offset, int64_t row_length,
                                                        const T* weights, T* to, int64_t stride) {
  using V = Register<T>;
  V sum[kOutputs][kBlockPixels] = {};
  for (int k_y = 0; k_y < 3; ++k_y) {
    const T* runs[kBlockPixels];
    DPM_UNROLL
    for (int i = 0; i < kBlockPixels; ++i) runs[i] = from[k_y][i] + offset;
    for (int64_t k = 0; k < row_length; k += kImages) {
      V pixels[kBlockPixels];
      DPM_UNROLL
      for (int i = 0; i < kBlockPixels; ++i) pixels[i] = load<V>(runs[i] + k);
      DPM_UNROLL
      for (int o = 0; o < kOutputs; ++o) {
        const V weight = splat<V>(weights[o]);
        DPM_UNROLL
        for (int i = 0; i < kBlockPixels; ++i) sum[o][i] += weight * pixels[i];
      }
      weights += kOutputs;
    }
  }
  DPM_UNROLL
  for (int o = 0; o < kOutputs; ++o) {
    DPM_UNROLL
    for (int i = 0; i < kBlockPixels; ++i) store(to + i * stride + o * kImages, sum[o][i]);
  }
}

// The pixels of a run from their products, `plane` apart from point to point. What `finish` asks for
// is looked at once for all of them.
template <class T, bool kSigns, bool kCoarse>
static __attribute__((noinline)) void finish_run(const T* products, int64_t plane,
                                                 const Finish<T>& finish, const Tile<T>& out,
                                                 int64_t y, int64_t x) {
  using V = Register<T>;
  const int count = static_cast<int>(smaller(kRun, out.W - x));
  const int64_t pixel = y * out.W + x, F = out.C, length = out.pixel();
  const V slope = splat<V>(finish.leaky ? finish.slope : T{1}), factor = splat<V>(finish.factor);
  const T* bias = finish.bias + pixel * finish.bias_stride;
  uint16_t* const signs = kSigns ? finish.signs + pixel * F : nullptr;
  const T* const coarse = kCoarse ? finish.coarse.at(y / 2, x / 2) : nullptr;
  T* const to = out.at(y, x);
  for (int64_t o = 0; o < F; ++o) {
    for (int lane = 0; lane < kImages; lane += kRegisterLanes<T>) {
      const int64_t offset = o * kImages + lane;
      V m[kPoints];
      DPM_UNROLL
      for (int point = 0; point < kPoints; ++point) {
        m[point] = load<V>(products + point * plane + offset);
      }
      const V even = m[1] + m[2], odd = m[1] - m[2];
      const V values[kRun] = {
          m[0] + even + m[3] + m[4], odd + m[3] * T(0.5) - m[4] * T(2),
          even + m[3] * T(0.25) + m[4] * T(4), odd + m[3] * T(0.125) - m[4] * T(8) + m[5]};
      DPM_UNROLL
      for (int j = 0; j < kRun; ++j) {
        if (j == count) break;
        V value = values[j] + splat<V>(bias[j * finish.bias_stride + o]);
        if (kSigns) {
          store_signs(signs + j * F + o, positive_lanes(value), lane, kRegisterLanes<T>);
        }
        value = select(value > V{}, value, value * slope);
        if (kCoarse) {
          value += load<V>(coarse + j / 2 * length + offset) * finish.coarse_factor;
        }
        store(to + j * length + offset, value * factor);
      }
    }
  }
}

// As `convolve`, of 3 x 3 kernels at their points. The pixels of a block of runs at one point stay in
// the L1 cache until all products with them are made. `memory`: [kRing][points][runs][C][16 images],
// then [points][runs of a block][F][16 images].
template <class T>
static void convolve_toom_cook(const Tile<T>& in, const T* weights, const Finish<T>& finish,
                               const Tile<T>& out, T* memory) {
  const int64_t runs = num_runs(out.W), num_blocks = out.H * runs;
  const int64_t plane = runs * in.pixel(), row = kPoints * plane;
  const int64_t products_plane = kBlockPixels * out.pixel();
  T* products = memory + kRing * row;
  int64_t rows_done = 0;
  for (int64_t run = 0; run < num_blocks; run += kBlockPixels) {
    const int64_t last_y = smaller((run + kBlockPixels - 1) / runs, out.H - 1);
    for (; rows_done < last_y + 3; ++rows_done) {
      T* to = memory + rows_done % kRing * row;
      row_at_points(in, rows_done - 1, PointRows<T>{to, plane, in.C, in.C, runs}, 0);
    }
    const T* from[3][kBlockPixels];
    for (int i = 0; i < kBlockPixels; ++i) {
      const int64_t block = smaller(run + i, num_blocks - 1), y = block / runs;
      for (int k_y = 0; k_y < 3; ++k_y) {
        from[k_y][i] = memory + (y + k_y) % kRing * row + block % runs * in.pixel();
      }
    }
    for (int point = 0; point < kPoints; ++point) {
      for_output_blocks<T>(out.C, [&](auto outputs, int64_t first, int lane) {
        const T* block = weights + (point * out.C + first) * 3 * in.C;
        T* to = products + point * products_plane + first * kImages + lane;
        products_at_point<T, outputs>(from, point * plane + lane, in.pixel(), block, to,
                                      out.pixel());
      });
    }
    for (int64_t i = 0; i < smaller(kBlockPixels, num_blocks - run); ++i) {
      const auto finish_as = [&](auto signs, auto coarse) {
        finish_run<T, signs, coarse>(products + i * out.pixel(), products_plane, finish, out,
                                     (run + i) / runs, (run + i) % runs * kRun);
      };
      const std::true_type yes;
      const std::false_type no;
      if (finish.signs) {
        finish.coarse.data ? finish_as(yes, yes) : finish_as(yes, no);
      } else {
        finish.coarse.data ? finish_as(no, yes) : finish_as(no, no);
      }
    }
  }
}

// A g of a row of gradients, as `row_at_points`.
template <class T>
static void gradients_at_points(const Tile<T>& grad, int64_t y, const PointRows<T>& to,
                                int64_t first_run) {
  using V = Register<T>;
  const int64_t plane = to.plane;
  for (int64_t run = 0; run < num_runs(grad.W); ++run) {
    const T* from = grad.at(y, run * kRun);
    const int64_t valid = grad.W - run * kRun;
    for (int64_t first = 0; first < grad.C; first += to.block) {
      T* out = to.at(first, first_run + run);
      T* const end = out + to.size(first) * kImages;
      for (; out < end; out += kRegisterLanes<T>, from += kRegisterLanes<T>) {
        V g[kRun];
        DPM_UNROLL
        for (int j = 0; j < kRun; ++j) g[j] = j < valid ? load<V>(from + j * grad.pixel()) : V{};
        const V even = g[0] + g[2], odd = g[1] + g[3];
        store(out, g[0]);
        store(out + plane, even + odd);
        store(out + 2 * plane, even - odd);
        store(out + 3 * plane, g[0] + g[1] * T(0.5) + g[2] * T(0.25) + g[3] * T(0.125));
        store(out + 4 * plane, g[0] - g[1] * T(2) + g[2] * T(4) - g[3] * T(8));
        store(out + 5 * plane, g[3]);
      }
    }
  }
}

// kOutputs x kBlockPixels (outputs x channels) sums of products over `count` runs, lane by lane,
// added to those there are unless they are the first. Of fewer channels the last is repeated.
template <class T, int kOutputs>
static __attribute__((noinline)) void products_block(const T* pixels, int64_t num_channels,
                                                     const T* gradients, int64_t count,
                                                     bool is_first, T* sums,
                                                     int64_t output_stride) {
  using V = Register<T>;
  int64_t channels[kBlockPixels];
  V sum[kOutputs][kBlockPixels] = {};
  DPM_UNROLL
  for (int i = 0; i < kBlockPixels; ++i) {
    channels[i] = smaller(i, num_channels - 1) * kImages;
    if (is_first) continue;
    DPM_UNROLL
    for (int o = 0; o < kOutputs; ++o) {
      sum[o][i] = load<V>(sums + o * output_stride + channels[i]);
    }
  }
  for (int64_t run = 0; run < count; ++run) {
    V values[kBlockPixels];
    DPM_UNROLL
    for (int i = 0; i < kBlockPixels; ++i) values[i] = load<V>(pixels + channels[i]);
    DPM_UNROLL
    for (int o = 0; o < kOutputs; ++o) {
      const V gradient = loaded(load<V>(gradients + o * kImages));
      DPM_UNROLL
      for (int i = 0; i < kBlockPixels; ++i) sum[o][i] += gradient * values[i];
    }
    pixels += num_channels * kImages;
    gradients += kOutputs * kImages;
  }
  DPM_UNROLL
  for (int o = 0; o < kOutputs; ++o) {
    DPM_UNROLL
    for (int i = 0; i < kBlockPixels; ++i) store(sums + o * output_stride + channels[i], sum[o][i]);
  }
}

// Rows of an image whose pixels at one point, and gradients, stay in a core's L2 (of 512 KB at least)
// while all products with them are made.
DPM_INLINE int64_t strip_rows(int64_t H, int64_t W, int64_t channels) {
  const int64_t row_bytes = num_runs(W) * channels * kImages * int64_t{sizeof(float)};
  return smaller(H, 1 + 131072 / row_bytes);
}

// Runs whose gradients of a block of outputs (10 KB), with the pixels that they meet, stay in the L1
// cache.
constexpr int64_t kCachedRuns = 64;

// As `correlate`, the gradient of the kernels at their points: [K (y)][F][points][C][16 images].
// What a block of sums meets lies together: neighbors that are all channels apart would share a few
// lines of the L1 cache. `memory`: that of `toom_cook_size`.
template <class T>
static void correlate_toom_cook(const Tile<T>& in, const Tile<T>& grad, T* memory, T* sums) {
  const int64_t runs = num_runs(grad.W), C = in.C, F = grad.C;
  const int64_t strip = strip_rows(grad.H, grad.W, C);
  const int64_t plane = (strip + 2) * runs * in.pixel(), grad_plane = strip * runs * grad.pixel();
  const PointRows<T> pixels{memory, plane, C, kBlockPixels, (strip + 2) * runs};
  const PointRows<T> gradients{memory + kPoints * plane, grad_plane, F, kBlockOutputs,
                               strip * runs};
  for (int64_t first_y = 0; first_y < grad.H; first_y += strip) {
    const int64_t rows = smaller(strip, grad.H - first_y);
    for (int64_t y = 0; y < rows + 2; ++y) row_at_points(in, first_y + y - 1, pixels, y * runs);
    for (int64_t y = 0; y < rows; ++y) {
      gradients_at_points(grad, first_y + y, gradients, y * runs);
    }
    for (int point = 0; point < kPoints; ++point) {
      for (int64_t k_y = 0; k_y < 3; ++k_y) {
        for (int64_t run = 0; run < rows * runs; run += kCachedRuns) {
          const int64_t count = smaller(kCachedRuns, rows * runs - run);
          const bool is_first = first_y == 0 && run == 0;
          for_blocks(F, [&](auto outputs, int64_t first) {
            const T* from = gradients.at(first, run) + point * grad_plane;
            T* to = sums + (((k_y * F + first) * kPoints + point) * C) * kImages;
            for (int64_t c = 0; c < C; c += kBlockPixels) {
              const T* of_channels = pixels.at(c, k_y * runs + run) + point * plane;
              for (int lane = 0; lane < kImages; lane += kRegisterLanes<T>) {
                products_block<T, outputs>(of_channels + lane, pixels.size(c), from + lane, count,
                                           is_first, to + c * kImages + lane,
                                           kPoints * C * kImages);
              }
            }
          });
        }
      }
    }
  }
}

// grad_weights [rows][3][C] += G' of gradients at the points, [rows][points][C].
template <class T>
DPM_INLINE void add_gradient_at_points(const T* at_points, int64_t rows, int64_t C,
                                       T* grad_weights) {
  for (int64_t i = 0; i < rows; ++i) {
    const T* u = at_points + i * kPoints * C;
    T* w = grad_weights + i * 3 * C;
    for (int64_t c = 0; c < C; ++c) {
      const T one = u[c + C] * T(1 / 3.0), minus_one = u[c + 2 * C] * T(-1 / 3.0);
      const T half = u[c + 3 * C] * T(-1 / 0.9375), minus_two = u[c + 4 * C] * T(1 / 15.0);
      w[c] += u[c] + one + minus_one + half + minus_two;
      w[c + C] += one - minus_one + half * T(0.5) - minus_two * T(2);
      w[c + 2 * C] += one + minus_one + half * T(0.25) + minus_two * T(4) + u[c + 5 * C];
    }
  }
}

// Elements of working memory for a layer of C and F channels, which the gradient of the input takes
// the other way round.
DPM_INLINE int64_t toom_cook_size(int64_t H, int64_t W, int64_t C, int64_t F, bool for_gradient) {
  const int64_t strip = strip_rows(H, W, C), runs = num_runs(W);
  const int64_t forward = (kRing * runs + kBlockPixels) * larger(C, F);
  const int64_t gradient = for_gradient ? ((strip + 2) * C + strip * F) * runs : 0;
  return kPoints * larger(forward, gradient) * kImages;
}

// Where the weight of (output, input, kernel row, point) is for `convolve_toom_cook`.
DPM_INLINE int64_t toom_cook_index(int64_t F, int64_t C, int64_t f, int64_t c, int64_t k_y,
                                   int point) {
  const int64_t first = f / kBlockOutputs * kBlockOutputs;
  const int64_t outputs = smaller(kBlockOutputs, F - first);
  return (point * F + first) * 3 * C + (k_y * C + c) * outputs + (f - first);
}

}  // namespace DPM_ISA
}  // namespace dpm
