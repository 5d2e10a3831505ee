// The module dpm_fast._native_cpu: tensors in, nothing else. No torch headers.
#include <stdexcept>
#include <string>
#include <vector>

#include "bind.h"
#include "bind_bound_terms.h"
#include "bind_conv.h"
#include "bind_trajectory.h"
#include "scale.h"

namespace py = pybind11;
using namespace py::literals;

#if defined(__clang__)
#define DPM_COMPILER "Clang " __clang_version__
#elif defined(__GNUC__)
#define DPM_COMPILER "GCC " __VERSION__
#else
#define DPM_COMPILER "unknown"
#endif

namespace dpm {
namespace {

enum class InstructionSet { baseline, avx2, avx512, avx512_bf16 };

struct Named {
  std::string name;
  InstructionSet value;
};

#if defined(DPM_HAS_AVX2)
// All of x86-64-v3, for which kernels are compiled, where the compiler knows that name.
bool has_avx2() {
#if (defined(__clang__) && __clang_major__ >= 18) || (!defined(__clang__) && __GNUC__ >= 12)
  if (!__builtin_cpu_supports("x86-64-v3")) return false;
#endif
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
         __builtin_cpu_supports("f16c");
}
#endif

// Whether this processor multiplies bfloat16 itself.
bool multiplies_bfloat16() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

// What this module was compiled for and this processor has, the best one first.
std::vector<Named> available() {
  std::vector<Named> found;
#if defined(DPM_HAS_AVX512)
  if (has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
#if defined(DPM_HAS_AVX512_BF16)
    if (multiplies_bfloat16()) found.push_back({"avx512_bf16", InstructionSet::avx512_bf16});
#endif
    found.push_back({"avx512", InstructionSet::avx512});
  }
#endif
#if defined(DPM_HAS_AVX2)
  if (has_avx2()) {
    found.push_back({"avx2", InstructionSet::avx2});
  }
#endif
  found.push_back({"baseline", InstructionSet::baseline});
  return found;
}

InstructionSet current = available().front().value;

#if defined(DPM_HAS_AVX512)
#define DPM_CALL(function, ...)                                            \
  switch (current) {                                                       \
    case InstructionSet::avx512_bf16:                                      \
    case InstructionSet::avx512: return avx512::function(__VA_ARGS__);     \
    case InstructionSet::avx2: return avx2::function(__VA_ARGS__);         \
    case InstructionSet::baseline: return baseline::function(__VA_ARGS__); \
  }
#else
#define DPM_CALL(function, ...) return baseline::function(__VA_ARGS__);
#endif

// Here, where looking at values costs nothing: a few operations of torch take longer than an op.
void check_timesteps(const NoiseSource& source, int64_t N, int64_t first = 0) {
  for (int64_t n = 0; n < N; ++n) {
    const int64_t t = source.t[n];
    if (t >= first && t >> 24 == 0) continue;
    throw py::value_error("t must be in " + std::to_string(first) + "..2**24 - 1, got " +
                          std::to_string(t));
  }
}

template <class R>
void check_step(const StepArgs& args) {
  const auto* rows = static_cast<const ReverseRow<R>*>(args.rows);
  check_variances(rows, args.extent.N, args.sigma2_out.data != nullptr, true);
  check_timesteps(args.noise, args.extent.N, 1);
}

struct Cpu {
  static constexpr bool kIsHost = true;
  static void run(const ScaleArgs& args, int64_t threads) { DPM_CALL(scale, args, int(threads)) }
  static void run(const BernoulliNoiseArgs& args, int64_t threads) {
    check_timesteps(args.noise, args.extent.N);
    DPM_CALL(bernoulli_noise, args, int(threads))
  }
  static void run(const BernoulliStepArgs& args, int64_t threads) {
    check_timesteps(args.noise, args.extent.N, 1);
    DPM_CALL(bernoulli_step, args, int(threads))
  }
  static void run(const BernoulliKlArgs& args, int64_t threads) {
    DPM_CALL(bernoulli_kl, args, int(threads))
  }
  static void run(const KlArgs& args, int64_t threads) { DPM_CALL(kl, args, int(threads)) }
  static void run(const StepArgs& args, int64_t threads) {
    args.x_dtype == DType::float64 ? check_step<double>(args) : check_step<float>(args);
    DPM_CALL(step, args, int(threads))
  }
  static void run(const NoiseArgs& args, int64_t threads) {
    check_timesteps(args.source, args.extent.N);
    DPM_CALL(noise, args, int(threads))
  }
  static void run(const NoiseGradientArgs& args, int64_t threads) {
    DPM_CALL(noise_gradient, args, int(threads))
  }
  static void run(const FillArgs& args, int64_t threads) {
    check_timesteps(args.source, args.N);
    DPM_CALL(fill, args, int(threads))
  }
  static void run(const MultiscaleConvArgs& args, int64_t threads) {
#if defined(DPM_HAS_AVX512_BF16)
    const bool keeps = args.layers[0].out || args.layers[0].signs;
    if (current == InstructionSet::avx512_bf16 && args.dtype == DType::bfloat16 && !keeps) {
      return avx512_bf16::multiscale_conv(args, int(threads));
    }
#endif
    DPM_CALL(multiscale_conv, args, int(threads))
  }
  static void run(const TrajectoryArgs& args, int64_t threads) {
    DPM_CALL(trajectory, args, int(threads))
  }
  static void run(const BoundTermsArgs& args, int64_t threads) {
    DPM_CALL(bound_terms, args, int(threads))
  }
  static void run_gradient(const MultiscaleConvArgs& args, int64_t threads) {
    DPM_CALL(multiscale_conv_gradient, args, int(threads))
  }
};

py::list instruction_sets() {
  py::list names;
  for (const Named& set : available()) names.append(set.name);
  return names;
}

void use_instruction_set(const std::string& name) {
  for (const Named& set : available()) {
    if (set.name == name) {
      current = set.value;
      return;
    }
  }
  throw py::value_error("this processor, or this build, has no instruction set " + name);
}

}  // namespace
}  // namespace dpm

PYBIND11_MODULE(_native_cpu, module) {
  dpm::TorchTensors::get();  // or no op could run, which the importer should know
  module.doc() = "CPU kernels of dpm_fast; call them through dpm_fast, which checks the arguments.";
  dpm::bind<dpm::Cpu>(module);
  dpm::bind_conv<dpm::Cpu>(module);
  dpm::bind_trajectory<dpm::Cpu>(module);
  dpm::bind_bound_terms<dpm::Cpu>(module);
  module.def("scale", [](const dpm::Tensor& x, const dpm::Tensor& out, const dpm::Tensor& scale,
                         int64_t threads) {
    const dpm::ScaleArgs args{dpm::extent(x, {x, out}), x.dtype(), x.like(x),
                              out.like(x, x.dtype()), scale.array<double>(x.N)};
    py::gil_scoped_release release;
    dpm::Cpu::run(args, threads);
  });
  module.def("instruction_sets", dpm::instruction_sets,
             "Sets that this module has kernels for and this processor runs, the one in use by "
             "default first.");
  module.attr("MULTIPLIES_BFLOAT16") = dpm::multiplies_bfloat16();
  module.def("use_instruction_set", dpm::use_instruction_set, "Use another one, for tests.");
  module.def(
      "build_info",
      [] {
        return py::dict("version"_a = DPM_VERSION, "compiler"_a = DPM_COMPILER,
                        "flags"_a = DPM_FLAGS, "cxx_standard"_a = long{__cplusplus},
                        "openmp"_a = long{_OPENMP},
                        "instruction_sets"_a = dpm::instruction_sets());
      },
      "How this module was compiled, and the instruction sets of this processor.");
}
