// How CPU launchers go through examples: pieces of events in parallel, 16 elements at a time.
#pragma once

#include "args.h"
#include "philox.h"
#include "storage.h"

namespace dpm {

// `count` elements of example n from (c, s) on, neighbors in space. kFull: as many as there are lanes,
// and next to each other in memory. `index` counts within the piece.
template <bool kFull>
struct Elements {
  int64_t n, c, s;
  int count;
  int index = 0;
};

// Not std::min: a copy of it could be merged into the code of another instruction set.
DPM_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
constexpr int kLanes = sizeof(T) / (std::is_same_v<T, double> ? 8 : 4);

// How tensors are stored, as far as a loop is compiled for it: all float, all double, or as their
// DType says, which is looked at anew for every 16 elements.
struct Stored {};

template <class Storage>
using VectorOf = std::conditional_t<std::is_same_v<Storage, double>, double, f32x16>;
template <class Storage>
using ScalarOf = std::conditional_t<std::is_same_v<Storage, double>, double, float>;

template <class Storage, bool kFull>
DPM_INLINE Storage* at(const Strided& tensor, const Elements<kFull>& e) {
  return static_cast<Storage*>(tensor.data) + e.n * tensor.n + e.c * tensor.c + e.s * tensor.s;
}

// A tail, or neighbors that are not next to each other: rare, so kept out of the loops.
template <class Storage>
static __attribute__((noinline)) f32x16 load_apart(const Storage* from, int64_t stride, int count) {
  return load16(from, stride, count);
}
template <class Storage>
static __attribute__((noinline)) void store_apart(Storage* to, f32x16 value, int64_t stride,
                                                  int count) {
  store16(to, value, stride, count);
}

template <class Storage, bool kFull>
DPM_INLINE f32x16 load_as(const Strided& tensor, const Elements<kFull>& e) {
  const auto* from = at<Storage>(tensor, e);
  if constexpr (kFull) return load16(from);
  if constexpr (kHasMasks && std::is_same_v<Storage, float>) {
    if (tensor.s == 1) return load_first(from, e.count);
  }
  return load_apart(from, tensor.s, e.count);
}
template <class Storage, bool kFull>
DPM_INLINE void store_as(const Strided& tensor, const Elements<kFull>& e, f32x16 value) {
  auto* to = at<Storage>(tensor, e);
  if constexpr (kFull) return store16(to, value);
  if constexpr (kHasMasks && std::is_same_v<Storage, float>) {
    if (tensor.s == 1) return store_first(to, value, e.count);
  }
  store_apart(to, value, tensor.s, e.count);
}

template <class Storage, bool kFull>
DPM_INLINE VectorOf<Storage> load(const Strided& tensor, DType dtype, const Elements<kFull>& e) {
  if constexpr (std::is_same_v<Storage, double>) {
    return *at<double>(tensor, e);
  } else if constexpr (std::is_same_v<Storage, float>) {
    return load_as<float>(tensor, e);
  } else {
    if (dtype == DType::bfloat16) return load_as<bf16>(tensor, e);
    if (dtype == DType::float16) return load_as<f16>(tensor, e);
    return load_as<float>(tensor, e);
  }
}

// Nothing where there is no tensor.
template <class Storage, bool kFull>
DPM_INLINE void store(const Strided& tensor, DType dtype, const Elements<kFull>& e,
                      VectorOf<Storage> value) {
  if (!tensor.data) return;
  if constexpr (std::is_same_v<Storage, double>) {
    *at<double>(tensor, e) = value;
  } else if constexpr (std::is_same_v<Storage, float>) {
    store_as<float>(tensor, e, value);
  } else {
    if (dtype == DType::bfloat16) {
      store_as<bf16>(tensor, e, value);
    } else if (dtype == DType::float16) {
      store_as<f16>(tensor, e, value);
    } else {
      store_as<float>(tensor, e, value);
    }
  }
}

// Where a tensor of bytes 0 and 1 has 1: a mask for select().
template <class T, bool kFull>
DPM_INLINE auto load_mask(const Strided& tensor, const Elements<kFull>& e) {
  const uint8_t* from = at<uint8_t>(tensor, e);
  if constexpr (std::is_same_v<T, double>) {
    return *from != 0;
  } else {
    float lanes[16] = {};
    if constexpr (kFull) {
      for (int i = 0; i < 16; ++i) lanes[i] = from[i];
    } else {
      for (int i = 0; i < e.count; ++i) lanes[i] = from[i * tensor.s];
    }
    return dpm::load<T>(lanes) != 0.0f;
  }
}

// One element of any storage, in double: for what is rare.
DPM_INLINE double load_one(const Strided& tensor, DType dtype, const Elements<false>& e) {
  switch (dtype) {
    case DType::bfloat16: return to_float(*at<bf16>(tensor, e));
    case DType::float16: return to_float(*at<f16>(tensor, e));
    case DType::float32: return *at<float>(tensor, e);
    default: return *at<double>(tensor, e);
  }
}

DPM_INLINE void store_one(const Strided& tensor, DType dtype, const Elements<false>& e,
                          double value) {
  if (!tensor.data) return;
  switch (dtype) {
    case DType::bfloat16: *at<bf16>(tensor, e) = from_float<bf16>(float(value)); break;
    case DType::float16: *at<f16>(tensor, e) = from_float<f16>(float(value)); break;
    case DType::float32: *at<float>(tensor, e) = float(value); break;
    default: *at<double>(tensor, e) = value;
  }
}

// A sum in float64, lane by lane and then across lanes, in a fixed order; float32 values are added
// four at a time before they are widened.
template <class T>
class Sum {
 public:
  DPM_INLINE void add(T value, int count) {
    if constexpr (std::is_same_v<T, double>) {
      sum_ += value;
    } else {
      if (count < 16) value = select(lane_numbers() < static_cast<float>(count), value, T{});
      pending_ = pending_ + value;
      if (++num_pending_ == 4) widen();
    }
  }

  DPM_INLINE double total() {
    if constexpr (!std::is_same_v<T, double>) widen();
    return sum_ + sum(low_ + high_);
  }

 private:
  DPM_INLINE void widen() {
    const f64x16 wide = to_double(pending_);
    low_ = low_ + wide.low;
    high_ = high_ + wide.high;
    pending_ = T{};
    num_pending_ = 0;
  }

  double sum_ = 0;
  f64x8 low_{}, high_{};
  T pending_{};
  int num_pending_ = 0;
};

// visit(Elements) for the elements of one piece of an example; `is_run`: every tensor has spatial
// neighbors next to each other.
template <class T, class Visit>
DPM_INLINE void for_elements(const Extent& extent, bool is_run, int64_t n, int64_t piece,
                             Visit visit) {
  const int64_t begin = piece * Extent::kPiece;
  const int64_t end = smaller(begin + Extent::kPiece, extent.num_elements());
  int64_t c = begin / extent.S, s = begin % extent.S, left = end - begin;
  int index = 0;
  while (left > 0) {
    const int64_t stop = smaller(extent.S, s + left);
    left -= stop - s;
    if constexpr (kLanes<T> > 1) {
      for (; is_run && s + kLanes<T> <= stop; s += kLanes<T>, index += kLanes<T>) {
        visit(Elements<true>{n, c, s, kLanes<T>, index});
      }
    }
    while (s < stop) {
      const int count = static_cast<int>(smaller(kLanes<T>, stop - s));
      visit(Elements<false>{n, c, s, count, index});
      s += count;
      index += count;
    }
    ++c, s = 0;
  }
}

// As many floats as T has lanes, or one of them as a double.
template <class T>
DPM_INLINE T lanes_as(const float* lanes) {
  if constexpr (std::is_same_v<T, double>) {
    return *lanes;
  } else {
    return dpm::load<T>(lanes);
  }
}

// visit(Elements, random) likewise, random numbers being those of draw(noise, group), 64 at a time:
// normals64 or uniforms64.
template <class T, class Draw, class Visit>
DPM_INLINE void for_elements_with_noise(const Extent& extent, bool is_run, int64_t n, int64_t piece,
                                        const ExampleNoise& noise, Draw draw, Visit visit) {
  const int64_t begin = piece * Extent::kPiece;
  const int64_t end = smaller(begin + Extent::kPiece, extent.num_elements());
  int64_t c = begin / extent.S, s = begin % extent.S;
  for (int64_t first = begin; first < end; first += 64) {
    const Block<f32x16> random = draw(noise, static_cast<uint32_t>(first / 4));
    if constexpr (kLanes<T> == 16) {
      if (is_run && s + 64 <= extent.S && first + 64 <= end) {
        DPM_UNROLL
        for (int i = 0; i < 4; ++i) visit(Elements<true>{n, c, s + 16 * i, 16}, random.x[i]);
        s += 64;
        if (s == extent.S) ++c, s = 0;
        continue;
      }
    }
    float lanes[64 + 16];
    store(lanes, random);
    const int count = static_cast<int>(smaller(64, end - first));
    for (int i = 0; i < count;) {
      const int here = static_cast<int>(smaller(smaller(kLanes<T>, count - i), extent.S - s));
      const T numbers = lanes_as<T>(lanes + i);
      if (kLanes<T> > 1 && is_run && here == kLanes<T>) {
        visit(Elements<true>{n, c, s, here}, numbers);
      } else {
        visit(Elements<false>{n, c, s, here}, numbers);
      }
      i += here;
      s += here;
      if (s == extent.S) ++c, s = 0;
    }
  }
}

// visit(n, piece) for every piece of every example, on as many threads as there is work for.
template <class Visit>
DPM_INLINE void for_pieces(const Extent& extent, int num_threads, Visit visit) {
  constexpr int64_t kElementsPerThread = 2048;  // fewer take less time than waking a thread
  const int64_t num_pieces = extent.num_pieces(), total = extent.N * num_pieces;
  const int64_t worth = 1 + extent.N * extent.num_elements() / kElementsPerThread;
  const int threads = static_cast<int>(smaller(worth, num_threads));
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t i = 0; i < total; ++i) visit(i / num_pieces, i % num_pieces);
}

// visit(Storage{}) for tensors of these types.
template <class Visit>
DPM_INLINE void with_storage(DType x, DType out, Visit visit) {
  if (x == DType::float64) return visit(double{});
  if (x == DType::float32 && out == DType::float32) return visit(float{});
  visit(Stored{});
}

}  // namespace dpm
