// What launchers of all ops are given: plain addresses, sizes and strides.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "common.h"

namespace dpm {

// A tensor (N, C, S), the spatial dimensions as one; strides count elements. No data: no tensor.
struct Strided {
  void* data;
  int64_t n, c, s;
};

// Whether every tensor that is there has spatial neighbors next to each other.
DPM_INLINE bool is_run(std::initializer_list<Strided> tensors) {
  for (const Strided& tensor : tensors) {
    if (tensor.data && tensor.s != 1) return false;
  }
  return true;
}

// Shape of the examples and, with it, how an event is cut into pieces that are summed one by one.
// Pieces depend on nothing but the event, so that sums are equal for every batch and thread count.
struct Extent {
  int64_t N, C, S;

  static constexpr int64_t kPiece = 16384;  // elements: 64 KB of float32 stay in a core's L1 or L2

  DPM_INLINE int64_t num_elements() const { return C * S; }
  DPM_INLINE int64_t num_pieces() const { return (C * S + kPiece - 1) / kPiece; }
};

// Which random numbers examples have; see philox.h.
struct NoiseSource {
  uint64_t seed;
  uint32_t stream;
  const int64_t* example_ids;  // (N,)
  const int64_t* t;            // (N,)
};

// One CPU launcher per instruction set: `kl` is dpm::avx512::kl, dpm::avx2::kl, dpm::baseline::kl.
#define DPM_DECLARE_CPU(function, Args)                              \
  namespace avx512 { void function(const Args&, int num_threads); }  \
  namespace avx2 { void function(const Args&, int num_threads); }    \
  namespace baseline { void function(const Args&, int num_threads); }

#define DPM_DECLARE_CUDA(function, Args) \
  namespace cuda { void function(const Args&, void* stream); }

}  // namespace dpm
