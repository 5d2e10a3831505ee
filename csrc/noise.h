// The forward process x_t = signal x_0 + spread eps, its gradients, and plain random numbers.
#pragma once

#include "philox.h"

namespace dpm {

// Coefficients of one example.
template <class T>
struct NoiseRow {
  T signal, spread;
};

template <class T, class R>
DPM_INLINE T noised(const NoiseRow<R>& row, T x_0, T eps) {
  return multiply_add(splat<T>(row.signal), x_0, row.spread * eps);
}

struct NoiseArgs {
  Extent extent;
  DType dtype;
  Strided x_0, x_t;          // (N, C, S)
  const void* coefficients;  // (N, 2) float, or double for double x_0
  NoiseSource source;
};

// Sums over one piece of an event: the gradients of signal and spread.
constexpr int kNoiseSums = 2;

struct NoiseGradientArgs {
  Extent extent;
  DType dtype;
  Strided grad_x_t;           // (N, C, S)
  Strided x_0;                // (N, C, S), or none without grad_coefficients
  const void* coefficients;   // (N, 2) float, or double for double x_0
  NoiseSource source;
  Strided grad_x_0;           // (N, C, S), or none
  double* grad_coefficients;  // (N, 2), or none
  double* pieces;             // (N, num_pieces, 2) where there are several
};

DPM_INLINE void noise_write_pieces(const NoiseGradientArgs& args, int64_t n, int k) {
  const int64_t num_pieces = args.extent.num_pieces();
  const double* from = args.pieces + n * num_pieces * kNoiseSums + k;
  double sum = 0;
  for (int64_t piece = 0; piece < num_pieces; ++piece) sum += from[piece * kNoiseSums];
  args.grad_coefficients[n * kNoiseSums + k] = sum;
}

enum class RandomKind : int { words, uniforms, normals };

struct FillArgs {
  int64_t N, num_elements;
  RandomKind random;
  DType dtype;  // of out; words are int64_t
  void* out;    // (N, num_elements)
  NoiseSource source;
};

DPM_DECLARE_CPU(noise, NoiseArgs)
DPM_DECLARE_CPU(noise_gradient, NoiseGradientArgs)
DPM_DECLARE_CPU(fill, FillArgs)
DPM_DECLARE_CUDA(noise, NoiseArgs)
DPM_DECLARE_CUDA(noise_gradient, NoiseGradientArgs)
DPM_DECLARE_CUDA(fill, FillArgs)

}  // namespace dpm
