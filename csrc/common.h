// What every source relies on, checked where it is compiled.
#pragma once

#include <cstdint>
#include <limits>

#if __cplusplus < 201703L
#error "dpm_fast needs C++17 (-std=c++17)"
#endif

#if !defined(_OPENMP) && !defined(__CUDACC__)
#error "dpm_fast needs OpenMP (-fopenmp)"
#endif

#ifdef __FAST_MATH__
#error "dpm_fast must be compiled without -ffast-math: infinities and NaN carry meaning here"
#endif

static_assert(std::numeric_limits<float>::is_iec559 && std::numeric_limits<double>::is_iec559,
              "dpm_fast needs IEEE 754 arithmetic");

// Sources are compiled once per instruction set into one module. A function that is always inlined
// has no copy of its own that the linker could lend to the code of another instruction set. Types of
// one name may differ, where they hold vectors of lanes.h: none of these is seen by two sets. What
// launchers are given (args.h) are sizes and addresses, laid out alike in all of them.
#if defined(__CUDACC__)
#define DPM_INLINE __host__ __device__ __forceinline__
#define DPM_UNROLL _Pragma("unroll")
#else
#define DPM_INLINE inline __attribute__((always_inline))
#define DPM_UNROLL _Pragma("GCC unroll 16")
#endif

namespace dpm {

enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2, float64 = 3 };

}  // namespace dpm
