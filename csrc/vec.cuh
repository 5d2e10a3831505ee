// Loads and stores of four neighbors of an event by one thread: 16 bytes of float32, 8 of a half.
#pragma once

#include "args.h"
#include "storage.h"

namespace dpm {

// Types that a kernel is compiled for: all float, or as their DType says (a uniform branch).
struct Stored {};

// Elements [first, first + count) of example n, count <= 4. `aligned` only where all tensors have
// these in one run that begins on a multiple of four elements.
struct Quad {
  int64_t n, first;
  int count;
  bool aligned;
};

struct Floats4 {
  float lane[4];
};

template <class Storage>
__device__ __forceinline__ Storage* address(const Strided& tensor, const Extent& extent, int64_t n,
                                            int64_t element) {
  const int64_t c = extent.C == 1 ? 0 : element / extent.S, s = element - c * extent.S;
  return static_cast<Storage*>(tensor.data) + n * tensor.n + c * tensor.c + s * tensor.s;
}

// Of an aligned quad, whose event is one run.
template <class Run>
__device__ __forceinline__ Run* run_address(const Strided& tensor, const Quad& at) {
  using Storage = std::remove_reference_t<decltype(Run{}.lane[0])>;
  return reinterpret_cast<Run*>(static_cast<Storage*>(tensor.data) + at.n * tensor.n + at.first);
}

template <class Storage>
__device__ __forceinline__ Floats4 load4_of(const Strided& tensor, const Extent& extent,
                                            const Quad& at) {
  struct alignas(4 * sizeof(Storage)) Run {
    Storage lane[4];
  };
  Floats4 out{};
  if (at.aligned) {
    const Run run = *run_address<Run>(tensor, at);
#pragma unroll
    for (int i = 0; i < 4; ++i) out.lane[i] = to_float(run.lane[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < at.count) {
        out.lane[i] = to_float(*address<Storage>(tensor, extent, at.n, at.first + i));
      }
    }
  }
  return out;
}

template <class Storage>
__device__ __forceinline__ void store4_of(const Strided& tensor, const Extent& extent,
                                          const Quad& at, const Floats4& x) {
  struct alignas(4 * sizeof(Storage)) Run {
    Storage lane[4];
  };
  if (at.aligned) {
    Run run;
#pragma unroll
    for (int i = 0; i < 4; ++i) run.lane[i] = from_float<Storage>(x.lane[i]);
    *run_address<Run>(tensor, at) = run;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < at.count) {
        *address<Storage>(tensor, extent, at.n, at.first + i) = from_float<Storage>(x.lane[i]);
      }
    }
  }
}

template <class Storage>
__device__ __forceinline__ Floats4 load4(const Strided& tensor, DType dtype, const Extent& extent,
                                         const Quad& at) {
  if constexpr (std::is_same_v<Storage, Stored>) {
    if (dtype == DType::bfloat16) return load4_of<bf16>(tensor, extent, at);
    if (dtype == DType::float16) return load4_of<f16>(tensor, extent, at);
  }
  return load4_of<float>(tensor, extent, at);
}

// Nothing where there is no tensor.
template <class Storage>
__device__ __forceinline__ void store4(const Strided& tensor, DType dtype, const Extent& extent,
                                       const Quad& at, const Floats4& x) {
  if (!tensor.data) return;
  if constexpr (std::is_same_v<Storage, Stored>) {
    if (dtype == DType::bfloat16) return store4_of<bf16>(tensor, extent, at, x);
    if (dtype == DType::float16) return store4_of<f16>(tensor, extent, at, x);
  }
  store4_of<float>(tensor, extent, at, x);
}

// Whether quads of a tensor of this type can be loaded in one access.
inline bool quads_aligned(const Strided& tensor, DType dtype, const Extent& extent) {
  if (!tensor.data) return true;
  const uintptr_t bytes = 4 * (dtype == DType::float32 ? 4 : 2);
  return extent.C == 1 && tensor.s == 1 && tensor.n % 4 == 0 && extent.S % 4 == 0 &&
         reinterpret_cast<uintptr_t>(tensor.data) % bytes == 0;
}

}  // namespace dpm
