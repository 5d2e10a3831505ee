// What every source here relies on, checked where it is compiled.
#pragma once

#include <limits>

#if __cplusplus < 201703L
#error "dpm_fast needs C++17 (-std=c++17)"
#endif

#ifndef _OPENMP
#error "dpm_fast needs OpenMP (-fopenmp)"
#endif

#ifdef __FAST_MATH__
#error "dpm_fast must be compiled without -ffast-math: infinities and NaN carry meaning here"
#endif

static_assert(std::numeric_limits<float>::is_iec559 && std::numeric_limits<double>::is_iec559,
              "dpm_fast needs IEEE 754 arithmetic");
