// How CPU launchers go through examples: pieces of events in parallel, 16 elements at a time.
#pragma once

#include "args.h"
#include "storage.h"

namespace dpm {

// `count` elements of example n from (c, s) on, neighbors in space.
struct Elements {
  int64_t n, c, s;
  int count;
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

template <class Storage>
DPM_INLINE Storage* at(const Strided& tensor, const Elements& e) {
  return static_cast<Storage*>(tensor.data) + e.n * tensor.n + e.c * tensor.c + e.s * tensor.s;
}

template <class Storage>
DPM_INLINE VectorOf<Storage> load(const Strided& tensor, DType dtype, const Elements& e) {
  if constexpr (std::is_same_v<Storage, double>) {
    return *at<double>(tensor, e);
  } else if constexpr (std::is_same_v<Storage, float>) {
    return load16(at<float>(tensor, e), tensor.s, e.count);
  } else {
    if (dtype == DType::bfloat16) return load16(at<bf16>(tensor, e), tensor.s, e.count);
    if (dtype == DType::float16) return load16(at<f16>(tensor, e), tensor.s, e.count);
    return load16(at<float>(tensor, e), tensor.s, e.count);
  }
}

// Nothing where there is no tensor.
template <class Storage>
DPM_INLINE void store(const Strided& tensor, DType dtype, const Elements& e,
                      VectorOf<Storage> value) {
  if (!tensor.data) return;
  if constexpr (std::is_same_v<Storage, double>) {
    *at<double>(tensor, e) = value;
  } else if constexpr (std::is_same_v<Storage, float>) {
    store16(at<float>(tensor, e), value, tensor.s, e.count);
  } else {
    if (dtype == DType::bfloat16) {
      store16(at<bf16>(tensor, e), value, tensor.s, e.count);
    } else if (dtype == DType::float16) {
      store16(at<f16>(tensor, e), value, tensor.s, e.count);
    } else {
      store16(at<float>(tensor, e), value, tensor.s, e.count);
    }
  }
}

// One element of any storage, in double: for what is rare.
DPM_INLINE double load_one(const Strided& tensor, DType dtype, const Elements& e) {
  switch (dtype) {
    case DType::bfloat16: return to_float(*at<bf16>(tensor, e));
    case DType::float16: return to_float(*at<f16>(tensor, e));
    case DType::float32: return *at<float>(tensor, e);
    default: return *at<double>(tensor, e);
  }
}

DPM_INLINE void store_one(const Strided& tensor, DType dtype, const Elements& e, double value) {
  if (!tensor.data) return;
  switch (dtype) {
    case DType::bfloat16: *at<bf16>(tensor, e) = from_float<bf16>(float(value)); break;
    case DType::float16: *at<f16>(tensor, e) = from_float<f16>(float(value)); break;
    case DType::float32: *at<float>(tensor, e) = float(value); break;
    default: *at<double>(tensor, e) = value;
  }
}

// A sum in float64, lane by lane and then across lanes, in a fixed order.
template <class T>
class Sum {
 public:
  DPM_INLINE void add(T value, int count) {
    if constexpr (std::is_same_v<T, double>) {
      lanes_[0] += value;
    } else {
      float values[16];
      __builtin_memcpy(values, &value, sizeof(values));
      if (count == 16) {
        for (int i = 0; i < 16; ++i) lanes_[i] += values[i];
      } else {
        for (int i = 0; i < count; ++i) lanes_[i] += values[i];
      }
    }
  }

  DPM_INLINE double total() const {
    double total = 0;
    for (double lane : lanes_) total += lane;
    return total;
  }

 private:
  double lanes_[kLanes<T>] = {};
};

// visit(Elements) for the elements of one piece of an example.
template <class T, class Visit>
DPM_INLINE void for_elements(const Extent& extent, int64_t n, int64_t piece, Visit visit) {
  const int64_t begin = piece * Extent::kPiece;
  const int64_t end = smaller(begin + Extent::kPiece, extent.num_elements());
  int64_t c = begin / extent.S, s = begin % extent.S, left = end - begin;
  while (left > 0) {
    const int64_t stop = smaller(extent.S, s + left);
    left -= stop - s;
    for (; s + kLanes<T> <= stop; s += kLanes<T>) visit(Elements{n, c, s, kLanes<T>});
    if (s < stop) visit(Elements{n, c, s, static_cast<int>(stop - s)});
    ++c, s = 0;
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
