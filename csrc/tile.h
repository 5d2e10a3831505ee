// Sixteen images side by side: [H + 2 halo][W + 2 halo][C][16 images], zeros around the image.
//
// The images are the lanes of vectors, so pooling, convolving and activating need neither shuffles
// nor tails, and no channels are padded. Where there are fewer images, each is cut into parts of as
// many rows that lie side by side instead; a part's halo then has rows of its neighbors. Every
// function works on tiles in memory, so that kernels that stay in this layout for longer than one op
// can be made of the same ones.
#pragma once

#include "loop.h"
#include "math.h"
#include "multiscale_conv.h"

namespace dpm {
namespace DPM_ISA {

constexpr int kImages = 16;

// What a register of this instruction set holds.
#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
#elif defined(__AVX2__)
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif
template <class T>
using Register = typename NativeVector<T, kRegisterBytes>::type;
template <class T>
constexpr int kRegisterLanes = kRegisterBytes / sizeof(T);

DPM_INLINE int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }

template <class T>
struct Tile {
  T* data;
  int64_t H, W, C, halo;
  int64_t parts = 1;  // of an image, in neighboring lanes

  DPM_INLINE int64_t pixel() const { return C * kImages; }
  DPM_INLINE int64_t row() const { return (W + 2 * halo) * pixel(); }
  DPM_INLINE int64_t size() const { return (H + 2 * halo) * row(); }

  // The channels of a pixel; y and x start at -halo.
  DPM_INLINE T* at(int64_t y, int64_t x) const {
    return data + (y + halo) * row() + (x + halo) * pixel();
  }
};

// Rows of the halo from those of the neighboring part, `step` lanes away: 1 or -1. Where there is
// none, zeros. A vector that begins a lane early or late has the lanes in their new places.
template <class T>
DPM_INLINE void copy_from_part(const T* from, int64_t size, int64_t step, int64_t parts, T* to) {
  T has_neighbor[kImages];
  for (int64_t lane = 0; lane < kImages; ++lane) {
    const int64_t part = lane % parts + step;
    has_neighbor[lane] = part >= 0 && part < parts && lane < kImages / parts * parts;
  }
  for (int64_t k = 0; k < size; k += kImages) {
    for (int lane = 0; lane < kImages; lane += kRegisterLanes<T>) {
      using V = Register<T>;
      const V value = load<V>(from + k + lane + step);
      store(to + k + lane, select(load<V>(has_neighbor + lane) > V{}, value, V{}));
    }
  }
}

template <class T>
DPM_INLINE void fill_halo(const Tile<T>& tile) {
  const auto zero = [](T* from, const T* end) {
    for (; from < end; from += kRegisterLanes<T>) store(from, Register<T>{});
  };
  zero(tile.data, tile.at(0, 0));
  for (int64_t y = 1; y < tile.H; ++y) zero(tile.at(y - 1, tile.W), tile.at(y, 0));
  zero(tile.at(tile.H - 1, tile.W), tile.data + tile.size());
  if (tile.parts == 1) return;
  const int64_t size = tile.W * tile.pixel();
  for (int64_t y = 0; y < tile.halo; ++y) {
    copy_from_part(tile.at(tile.H - 1 - y, 0), size, -1, tile.parts, tile.at(-1 - y, 0));
    copy_from_part(tile.at(y, 0), size, 1, tile.parts, tile.at(tile.H + y, 0));
  }
}

// Each pixel of `out` is the sum of four of `in`, times a factor. Halo included.
template <class T>
DPM_INLINE void pool(const Tile<T>& in, const Tile<T>& out, T factor) {
  using V = Register<T>;
  for (int64_t y = 0; y < out.H; ++y) {
    for (int64_t x = 0; x < out.W; ++x) {
      const T *top = in.at(2 * y, 2 * x), *bottom = in.at(2 * y + 1, 2 * x);
      T* to = out.at(y, x);
      for (int64_t k = 0; k < out.pixel(); k += kRegisterLanes<T>) {
        const V upper = load<V>(top + k) + load<V>(top + in.pixel() + k);
        const V lower = load<V>(bottom + k) + load<V>(bottom + in.pixel() + k);
        store(to + k, (upper + lower) * factor);
      }
    }
  }
  fill_halo(out);
}

// visit(address, index) for every channel of every pixel, counted in that order.
template <class T, class Visit>
DPM_INLINE void for_channels(const Tile<T>& tile, Visit visit) {
  int64_t index = 0;
  for (int64_t y = 0; y < tile.H; ++y) {
    T* row = tile.at(y, 0);
    for (int64_t i = 0; i < tile.W * tile.C; ++i) visit(row + i * kImages, index++);
  }
}

// 16 x 16 transposed: four rounds of a perfect shuffle.
DPM_INLINE void transpose(f32x16* rows) {
  f32x16 other[kImages];
  const auto shuffle = [](const f32x16* from, f32x16* to) {
    DPM_UNROLL
    for (int i = 0; i < kImages / 2; ++i) {
      const auto pair = interleave(from[i], from[i + kImages / 2]);
      to[2 * i] = pair.low;
      to[2 * i + 1] = pair.high;
    }
  };
  shuffle(rows, other);
  shuffle(other, rows);
  shuffle(rows, other);
  shuffle(other, rows);
}

// The sum of the 16 lanes of each of 16 neighbors in memory, in one order for every instruction set.
DPM_INLINE f32x16 sums_of_lanes(const float* from) {
  f32x16 rows[kImages];
  DPM_UNROLL
  for (int i = 0; i < kImages; ++i) rows[i] = load<f32x16>(from + i * kImages);
  DPM_UNROLL
  for (int half = kImages / 2; half > 0; half /= 2) {
    DPM_UNROLL
    for (int i = 0; i < half; ++i) {
      const auto pair = interleave(rows[i], rows[i + half]);
      rows[i] = pair.low + pair.high;
    }
  }
  return rows[0];
}

// to[i] += the sum of the 16 lanes from[i], i < count.
template <class T>
DPM_INLINE void add_sums_of_lanes(const T* from, int64_t count, T* to) {
  int64_t i = 0;
  if constexpr (std::is_same_v<T, float>) {
    for (; i + kImages <= count; i += kImages) {
      store(to + i, load<f32x16>(to + i) + sums_of_lanes(from + i * kImages));
    }
  }
  for (; i < count; ++i) {
    T sum = 0;
    for (int lane = 0; lane < kImages; ++lane) sum += from[i * kImages + lane];
    to[i] += sum;
  }
}

// Elements of a tensor that follow each other, and where their lanes are in a tile: `step` apart,
// with a jump after every `width` of them.
template <class T>
struct Run {
  int64_t first, stride, length;
  T* lanes;
  int64_t step, width, jump;

  DPM_INLINE T* at(int64_t i) const { return lanes + i * step + i / width * jump; }
};

// visit(Run) for runs as long as the order of the tensor allows.
template <class T, class Visit>
DPM_INLINE void for_runs(const Images& images, const Tile<T>& tile, Visit visit) {
  const int64_t H = tile.H, W = tile.W, C = tile.C;
  const int64_t jump = 2 * tile.halo * tile.pixel();
  if (images.c == 1 && images.x == C && images.y == W * C) {  // channels last
    visit(Run<T>{0, 1, H * W * C, tile.at(0, 0), kImages, W * C, jump});
  } else if (images.y == W * images.x) {  // channels first
    for (int64_t c = 0; c < C; ++c) {
      T* lanes = tile.at(0, 0) + c * kImages;
      visit(Run<T>{c * images.c, images.x, H * W, lanes, tile.pixel(), W, jump});
    }
  } else {
    for (int64_t y = 0; y < H; ++y) {
      for (int64_t x = 0; x < W; ++x) {
        const int64_t first = y * images.y + x * images.x;
        visit(Run<T>{first, images.c, C, tile.at(y, x), kImages, C, 0});
      }
    }
  }
}

// The addresses of 16 elements of a run from i on.
template <class T>
DPM_INLINE void addresses(const Run<T>& run, int64_t i, T** lanes) {
  T* next = run.at(i);
  int64_t left = run.width - i % run.width;
  for (int k = 0; k < kImages; ++k) {
    lanes[k] = next;
    next += run.step;
    if (--left == 0) next += run.jump, left = run.width;
  }
}

// The first 16-element block that ends within the length; the last one overlaps its neighbor.
DPM_INLINE int64_t block_at(int64_t i, int64_t length) { return smaller(i, length - kImages); }

// Which elements of a tensor the lanes of a tile begin with: `count` images from n on.
struct Lanes {
  int count;
  int64_t first[kImages];

  template <class T>
  DPM_INLINE Lanes(const Images& images, int64_t n, int64_t num_images, const Tile<T>& tile)
      : count(static_cast<int>(num_images * tile.parts)) {
    for (int64_t k = 0; k < count; ++k) {
      first[k] = (n + k / tile.parts) * images.n + k % tile.parts * tile.H * images.y;
    }
  }
};

// Images from n on into the lanes of a tile, zeros in the lanes that are left.
template <class Storage, class T>
static void read_images(const Images& images, int64_t n, int64_t num_images, const Tile<T>& tile) {
  const Lanes lanes(images, n, num_images, tile);
  const Storage* base = static_cast<const Storage*>(images.data);
  for_runs(images, tile, [&](const Run<T>& run) {
    const Storage* from = base + run.first;
    if constexpr (std::is_same_v<T, float>) {
      if (run.stride == 1 && run.length >= kImages) {
        for (int64_t i = 0; i < run.length; i += kImages) {
          const int64_t first = block_at(i, run.length);
          f32x16 rows[kImages];
          for (int k = 0; k < kImages; ++k) {
            rows[k] = k < lanes.count ? load_all(from + lanes.first[k] + first) : f32x16{};
          }
          transpose(rows);
          T* to[kImages];
          addresses(run, first, to);
          for (int k = 0; k < kImages; ++k) store(to[k], rows[k]);
        }
        return;
      }
    }
    for (int64_t i = 0; i < run.length; ++i) {
      T* to = run.at(i);
      for (int k = 0; k < kImages; ++k) {
        if (k >= lanes.count) {
          to[k] = 0;
        } else if constexpr (std::is_same_v<T, double>) {
          to[k] = from[lanes.first[k] + i * run.stride];
        } else {
          to[k] = to_float(from[lanes.first[k] + i * run.stride]);
        }
      }
    }
  });
  fill_halo(tile);
}

// The other way.
template <class Storage, class T>
static void write_images(const Tile<T>& tile, const Images& images, int64_t n,
                         int64_t num_images) {
  const Lanes lanes(images, n, num_images, tile);
  Storage* base = static_cast<Storage*>(images.data);
  for_runs(images, tile, [&](const Run<T>& run) {
    Storage* to = base + run.first;
    if constexpr (std::is_same_v<T, float>) {
      if (run.stride == 1 && run.length >= kImages) {
        for (int64_t i = 0; i < run.length; i += kImages) {
          const int64_t first = block_at(i, run.length);
          T* from[kImages];
          addresses(run, first, from);
          f32x16 rows[kImages];
          for (int k = 0; k < kImages; ++k) rows[k] = load<f32x16>(from[k]);
          transpose(rows);
          for (int k = 0; k < lanes.count; ++k) store_all(to + lanes.first[k] + first, rows[k]);
        }
        return;
      }
    }
    for (int64_t i = 0; i < run.length; ++i) {
      const T* from = run.at(i);
      for (int k = 0; k < lanes.count; ++k) {
        Storage& element = to[lanes.first[k] + i * run.stride];
        if constexpr (std::is_same_v<T, double>) {
          element = from[k];
        } else {
          element = from_float<Storage>(from[k]);
        }
      }
    }
  });
}

}  // namespace DPM_ISA
}  // namespace dpm
