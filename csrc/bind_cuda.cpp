// The module dpm_fast._native_cuda: tensors and a stream in. No torch headers.
#include "bind.h"

namespace py = pybind11;
using namespace py::literals;

namespace dpm {
namespace {

void* pointer(int64_t stream) { return reinterpret_cast<void*>(stream); }

struct Cuda {
  static void run(const BernoulliNoiseArgs& args, int64_t stream) {
    cuda::bernoulli_noise(args, pointer(stream));
  }
  static void run(const BernoulliStepArgs& args, int64_t stream) {
    cuda::bernoulli_step(args, pointer(stream));
  }
  static void run(const BernoulliKlArgs& args, int64_t stream) {
    cuda::bernoulli_kl(args, pointer(stream));
  }
  static void run(const KlArgs& args, int64_t stream) { cuda::kl(args, pointer(stream)); }
  static void run(const StepArgs& args, int64_t stream) { cuda::step(args, pointer(stream)); }
  static void run(const NoiseArgs& args, int64_t stream) {
    cuda::noise(args, pointer(stream));
  }
  static void run(const NoiseGradientArgs& args, int64_t stream) {
    cuda::noise_gradient(args, pointer(stream));
  }
  static void run(const FillArgs& args, int64_t stream) { cuda::fill(args, pointer(stream)); }
};

}  // namespace
}  // namespace dpm

PYBIND11_MODULE(_native_cuda, module) {
  dpm::TorchTensors::get();  // or no op could run, which the importer should know
  module.doc() = "CUDA kernels of dpm_fast; call them through dpm_fast, which checks the arguments.";
  dpm::bind<dpm::Cuda>(module);
  module.def(
      "build_info", [] { return py::dict("version"_a = DPM_VERSION, "flags"_a = DPM_FLAGS); },
      "How this module was compiled.");
}
