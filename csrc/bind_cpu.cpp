// The module dpm_fast._native_cpu: pointers and sizes in, nothing else. No torch headers.
#include <pybind11/pybind11.h>

#include "common.h"

namespace py = pybind11;
using namespace py::literals;

#if defined(__clang__)
#define DPM_COMPILER "Clang " __clang_version__
#elif defined(__GNUC__)
#define DPM_COMPILER "GCC " __VERSION__
#else
#define DPM_COMPILER "unknown"
#endif

PYBIND11_MODULE(_native_cpu, module) {
  module.doc() = "CPU kernels of dpm_fast; call them through dpm_fast, which checks the arguments.";
  module.def(
      "build_info",
      [] {
        return py::dict("version"_a = DPM_VERSION, "compiler"_a = DPM_COMPILER,
                        "flags"_a = DPM_CXXFLAGS, "cxx_standard"_a = long{__cplusplus},
                        "openmp"_a = long{_OPENMP});
      },
      "How this module was compiled: versions, flags, C++ standard and OpenMP date.");
}
