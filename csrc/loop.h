// How CPU launchers go through examples: pieces of events in parallel, 16 elements at a time.
#pragma once

#include "args.h"
#include "philox.h"
#include "storage.h"

namespace dpm {

// `count` elements of example n from (c, s) on, neighbors in space. kFull: as many as there are lanes,
// and next to each other in memory. `index` counts from the first element of the loop.
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
  const int64_t stride = kFull ? 1 : tensor.s;
  return static_cast<Storage*>(tensor.data) + e.n * tensor.n + e.c * tensor.c + e.s * stride;
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

// visit(Elements) for the elements of an example from `begin` to `end`, which one piece holds;
// `is_run`: every tensor has spatial neighbors next to each other.
template <class T, class Visit>
DPM_INLINE void for_range(const Extent& extent, bool is_run, int64_t n, int64_t begin, int64_t end,
                          Visit visit) {
  int64_t c = 0, s = begin, left = end - begin;
  if (begin >= extent.S) c = begin / extent.S, s = begin % extent.S;
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

// Likewise for the elements of one piece.
template <class T, class Visit>
DPM_INLINE void for_elements(const Extent& extent, bool is_run, int64_t n, int64_t piece,
                             Visit visit) {
  const int64_t begin = piece * Extent::kPiece;
  for_range<T>(extent, is_run, n, begin, smaller(begin + Extent::kPiece, extent.num_elements()),
               visit);
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

// Elements whose random numbers are made together, and stay in the L1 cache until they are used.
constexpr int64_t kChunk = 1024;
// Elements of an event: with more, lanes are used well by one example.
constexpr int64_t kMostPacked = 16;

// Apart from the loops that use the numbers: both then have the registers for themselves.
template <class Random>
static __attribute__((noinline)) void fill_chunk(const NoiseSource& source, int64_t n,
                                                 int64_t first, int64_t count,
                                                 typename Random::Element* out) {
  fill_blocks<Random>(example_noise(source, n), static_cast<uint32_t>(first / 4), count, out);
}

// Random numbers of one example: those that are there, or chunks of them as they are asked for.
template <class Random>
struct Numbers {
  using Element = typename Random::Element;

  const NoiseSource& source;
  int64_t n;
  Element* out;
  bool is_there;

  // Of `count` elements from `first` on; 16 beyond the last may be read.
  DPM_INLINE const Element* operator()(int64_t first, int64_t count) const {
    if (!is_there) fill_chunk<Random>(source, n, first, count, out);
    return out;
  }
};

// visit(n, piece, Numbers) for every piece of every example, of which small ones share the lanes;
// `is_random`: or all numbers are 0.
template <class Random, class Visit>
DPM_INLINE void for_random(const Extent& extent, const NoiseSource& source, bool is_random,
                           int num_threads, Visit visit) {
  using Element = typename Random::Element;
  const int64_t num_elements = extent.num_elements();
  const bool is_packed = num_elements <= kMostPacked;
  constexpr int kLanes = ManyExamples::kLanes;
  const int num_groups = is_packed ? static_cast<int>((num_elements + 3) / 4) : kLanes;
  const int64_t num_packed = kLanes / num_groups;
  const Extent packs{(extent.N + num_packed - 1) / num_packed, 1, num_packed * num_elements};
  for_pieces(packs, num_threads, [&](int64_t pack, int64_t piece) {
    const int64_t first = pack * num_packed, end = smaller(first + num_packed, extent.N);
    Element numbers[kChunk + 16];
    if (!is_random) {
      const int64_t count = is_packed ? kBlock : smaller(kChunk, num_elements);
      __builtin_memset(numbers, 0, sizeof(Element) * (count + 16));
    } else if (is_packed) {
      fill_blocks<Random>(ManyExamples(source, first, end, num_groups), numbers);
    }
    for (int64_t n = first; n < end; ++n) {
      Element* const out = numbers + (n - first) * 4 * num_groups;
      visit(n, piece, Numbers<Random>{source, n, out, is_packed || !is_random});
    }
  });
}

// visit(Elements, numbers) for the elements of one piece, with a pointer to their random numbers.
template <class T, class Random, class Visit>
DPM_INLINE void for_elements(const Extent& extent, bool is_run, int64_t n, int64_t piece,
                             const Numbers<Random>& numbers, Visit visit) {
  const int64_t begin = piece * Extent::kPiece;
  const int64_t end = smaller(begin + Extent::kPiece, extent.num_elements());
  for (int64_t first = begin; first < end; first += kChunk) {
    const int64_t stop = smaller(first + kChunk, end);
    const auto* of_chunk = numbers(first, stop - first);
    for_range<T>(extent, is_run, n, first, stop,
                 [&](const auto& e) { visit(e, of_chunk + e.index); });
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

// visit(Storage{}) for tensors of these types.
template <class Visit>
DPM_INLINE void with_storage(DType x, DType out, Visit visit) {
  if (x == DType::float64) return visit(double{});
  if (x == DType::float32 && out == DType::float32) return visit(float{});
  visit(Stored{});
}

}  // namespace dpm
