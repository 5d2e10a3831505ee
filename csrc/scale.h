// Rows times a number each: how the gradients of a sum over examples become those of a loss.
#pragma once

#include "args.h"

namespace dpm {

struct ScaleArgs {
  Extent extent;
  DType dtype;
  Strided x, out;       // (N, C, S)
  const double* scale;  // (N,)
};

DPM_DECLARE_CPU(scale, ScaleArgs)

}  // namespace dpm
