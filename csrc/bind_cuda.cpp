// The module dpm_fast._native_cuda: tensors and a stream in. No torch headers.
#include <pybind11/stl.h>

#include <array>
#include <tuple>

#include "bind.h"
#include "bind_bound_terms.h"
#include "bind_conv.h"
#include "bind_trajectory.h"
#include "resident_images.h"
#include "resident_network.h"

namespace py = pybind11;
using namespace py::literals;

namespace dpm {
namespace {

void* pointer(int64_t stream) { return reinterpret_cast<void*>(stream); }

struct Cuda {
  static constexpr bool kIsHost = false;
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
  static void run(const TrajectoryArgs& args, int64_t stream) {
    if (args.network.stack) return cuda::image_trajectory(args, pointer(stream));
    cuda::trajectory(args, pointer(stream));
  }
  static void run(const BoundTermsArgs& args, int64_t stream) {
    if (args.network.stack) return cuda::image_bound_terms(args, pointer(stream));
    cuda::bound_terms(args, pointer(stream));
  }
};

// Bytes of shared memory that the smallest tile needs: of layers (inputs, outputs, whether weights
// and whether biases depend on t), with everything that a request can ask for.
int64_t trajectory_bytes(int64_t D, int64_t num_units,
                         const std::vector<std::tuple<int64_t, int64_t, bool, bool>>& shapes) {
  if (shapes.size() > ResidentNetwork::kMaxLayers) throw py::value_error("there are too many layers");
  std::vector<TimedDense> layers;
  for (const auto& [inputs, outputs, timed_weights, timed_bias] : shapes) {
    layers.push_back({inputs, outputs, nullptr, nullptr, timed_weights, timed_bias});
  }
  NetworkArgs network{};
  network.num_units = num_units;
  network.num_layers = static_cast<int>(layers.size());
  network.layers = layers.data();
  const int columns = kRowColumns > kBernoulliColumns ? kRowColumns : kBernoulliColumns;
  return ResidentNetwork(D, network, columns, true, true, true).bytes(kQuad);
}

void check_layers(const MultiscaleConvArgs& conv) {
  if (ResidentStack::count_layers(conv) > ResidentStack::kMaxLayers ||
      conv.num_scales > ConvLayer::kMaxScales) {
    throw py::value_error("there are too many layers or scales");
  }
}

std::vector<ConvLayer> layers_of(const std::vector<std::array<int64_t, 3>>& shapes) {
  std::vector<ConvLayer> layers;
  for (const auto& [F, C, K] : shapes) layers.push_back({C, F, K});
  return layers;
}

MultiscaleConvArgs sizes_of_stack(int64_t H, int64_t W, int num_scales,
                                  const std::vector<ConvLayer>& layers, bool wide) {
  MultiscaleConvArgs conv{};
  conv.H = H, conv.W = W;
  conv.num_scales = num_scales, conv.num_layers = static_cast<int>(layers.size());
  conv.layers = layers.data();
  conv.dtype = wide ? DType::float32 : DType::bfloat16;
  return conv;
}

// Bytes that a stack of layers (F, C, K) needs: of shared memory, and of packed operands outside.
std::pair<int64_t, int64_t> multiscale_conv_bytes(
    int64_t H, int64_t W, int num_scales, const std::vector<std::array<int64_t, 3>>& shapes,
    bool wide) {
  const std::vector<ConvLayer> layers = layers_of(shapes);
  const MultiscaleConvArgs conv = sizes_of_stack(H, W, num_scales, layers, wide);
  check_layers(conv);
  const ResidentStack stack(conv);
  return {stack.shared_bytes, stack.operand_bytes};
}

// The same of trajectories and bounds of images, by that of layers (F, C) of each pixel, of `outputs`
// of the readout and of timesteps.
std::pair<int64_t, int64_t> image_network_bytes(
    int64_t H, int64_t W, int num_scales, const std::vector<std::array<int64_t, 3>>& shapes,
    const std::vector<std::array<int64_t, 2>>& pixel_shapes, int64_t outputs, bool wide,
    int64_t num_timesteps) {
  const std::vector<ConvLayer> layers = layers_of(shapes);
  MultiscaleConvArgs conv = sizes_of_stack(H, W, num_scales, layers, wide);
  Tail tail{};
  if (layers.empty() || pixel_shapes.size() > Tail::kMaxLayers) {
    throw py::value_error("there must be a layer, and not too many of each pixel");
  }
  tail.P = layers.back().F, tail.O = outputs;
  for (const auto& [F, C] : pixel_shapes) {
    tail.layers[tail.num_layers++] = {C, F};
    tail.P = F;
  }
  conv.tail = &tail;
  check_layers(conv);
  const ResidentImages images(conv);
  return {images.shared_bytes, images.packed_bytes(num_timesteps)};
}

void multiscale_conv(const py::object& x, const py::object& out, int num_scales,
                     const py::tuple& layers, bool after_sum, double slope, const Tensor& packed,
                     bool tf32, int64_t stream) {
  ConvCall call(x, num_scales, 1, layers, py::none(), after_sum, slope);
  MultiscaleConvArgs& args = call.args;
  args.out = call.outputs(out);
  check_layers(args);
  const ResidentConvArgs resident{args, packed.array(ResidentStack(args).operand_bytes, 1), tf32};
  py::gil_scoped_release release;
  cuda::multiscale_conv(resident, pointer(stream));
}

}  // namespace
}  // namespace dpm

PYBIND11_MODULE(_native_cuda, module) {
  dpm::TorchTensors::get();  // or no op could run, which the importer should know
  module.doc() = "CUDA kernels of dpm_fast; call them through dpm_fast, which checks the arguments.";
  dpm::bind<dpm::Cuda>(module);
  dpm::bind_trajectory<dpm::Cuda>(module);
  dpm::bind_bound_terms<dpm::Cuda>(module);
  module.attr("MAX_SCALES") = int{dpm::ConvLayer::kMaxScales};
  module.attr("MAX_LAYERS") = int{dpm::ResidentStack::kMaxLayers};
  module.def("most_shared_bytes", dpm::cuda::most_shared_bytes);
  module.def("why_unusable", dpm::cuda::why_unusable);
  module.def("multiscale_conv_bytes", dpm::multiscale_conv_bytes);
  module.def("multiscale_conv", dpm::multiscale_conv);
  module.attr("MAX_DENSE_LAYERS") = int{dpm::ResidentNetwork::kMaxLayers};
  module.def("trajectory_bytes", dpm::trajectory_bytes);
  module.def("image_network_bytes", dpm::image_network_bytes);
  module.def(
      "build_info", [] { return py::dict("version"_a = DPM_VERSION, "flags"_a = DPM_FLAGS); },
      "How this module was compiled.");
}
