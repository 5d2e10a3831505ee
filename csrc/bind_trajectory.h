// Python signature of `trajectory`. Layers come as tuples of weights and bias, the readout last; what
// images need besides as a tuple or None: (C, H, W), the number of scales, whether activations come
// after the sum over scales, layers of the stack and of pixels as in bind_conv.h (float, or bfloat16
// on a GPU), and of a GPU bytes for packed operands (None elsewhere) and whether it may round to
// tf32.
#pragma once

#include <optional>
#include <vector>

#include "bind.h"
#include "bind_conv.h"
#include "trajectory.h"

namespace dpm {

// A contiguous tensor of floats of this shape, or none; -1 for any size that is at least `least`.
inline const float* floats(py::handle object, std::initializer_list<int64_t> shape,
                           int64_t least = 0) {
  if (object.is_none()) return nullptr;
  const dlpack::Tensor tensor = read(object);
  bool fits = tensor.ndim == static_cast<int>(shape.size()) && tensor.dtype.bits == 32 &&
              tensor.dtype.code == dlpack::kFloat;
  int64_t run = 1;
  for (int i = tensor.ndim - 1; fits && i >= 0; --i) {
    const int64_t required = shape.begin()[i], size = tensor.shape[i];
    fits = (required < 0 ? size >= least : size == required) &&
           (size == 1 || tensor.strides[i] == run);
    run *= size;
  }
  if (!fits) throw py::value_error("an array must be contiguous floats of the shape that is read");
  return static_cast<const float*>(tensor.data);
}

// `num_rows`: of tables by timestep, at least.
inline TimedDense timed_dense(const py::tuple& given, int64_t inputs, int64_t num_rows) {
  const py::handle weights = given[0], bias = given[1];
  const bool timed_weights = read(weights).ndim == 3, timed_bias = read(bias).ndim == 2;
  TimedDense layer{};
  layer.inputs = inputs;
  layer.outputs = size_of(read(bias), timed_bias ? 1 : 0);
  const int64_t size = layer.outputs * inputs;
  layer.weights = timed_weights ? floats(weights, {-1, layer.outputs, inputs}, num_rows)
                                : floats(weights, {layer.outputs, inputs});
  layer.bias = timed_bias ? floats(bias, {-1, layer.outputs}, num_rows)
                          : floats(bias, {layer.outputs});
  layer.weights_step = timed_weights ? size : 0;
  layer.bias_step = timed_bias ? layer.outputs : 0;
  return layer;
}

// The stack of a network of images and its tail without a linear layer.
struct StackOfImages {
  std::vector<ConvLayer> layers;
  Tail tail{};
  MultiscaleConvArgs args{};

  // `beside`: outputs of the dense path.
  StackOfImages(const py::tuple& given, int64_t N, int64_t beside, float slope, bool on_host) {
    const auto shape = given[0].cast<py::tuple>();
    const auto C = shape[0].cast<int64_t>();
    args.N = N, args.H = shape[1].cast<int64_t>(), args.W = shape[2].cast<int64_t>();
    args.parts = 1;
    args.num_scales = given[1].cast<int>();
    args.after_sum = given[2].cast<bool>();
    args.slope = slope;
    if (args.num_scales < 1 || args.num_scales > ConvLayer::kMaxScales) {
      throw py::value_error("there must be 1 to 8 scales");
    }
    const int64_t unit = int64_t{1} << (args.num_scales - 1), pixels = args.H * args.W;
    StackSizes sizes{args.num_scales, args.H, args.W, {dlpack::kFloat, 32, 1}};
    int64_t channels = C;
    for (const py::handle layer : given[3]) {
      if (layers.empty()) {
        const Tensor weight(layer.cast<py::tuple>()[0].cast<py::tuple>()[0]);
        args.dtype = weight.dtype();
        sizes.type = weight.type;
        if (args.dtype != DType::float32 && (on_host || args.dtype != DType::bfloat16)) {
          throw py::type_error("layers must be float32, or bfloat16 on a GPU");
        }
      }
      layers.push_back(read_layer(layer.cast<py::tuple>(), sizes, channels));
      channels = layers.back().F;
    }
    if (layers.empty() || pixels < 1 || args.H % unit || args.W % unit || beside % pixels) {
      throw py::value_error("there must be a layer, and sides that are halved for every scale");
    }
    args.num_layers = static_cast<int>(layers.size());
    args.layers = layers.data();
    tail.K = beside / pixels;
    tail.P = channels + tail.K;
    read_pixel_layers(given[4].cast<py::tuple>(), sizes.type, tail);
    args.tail = &tail;
  }
  StackOfImages(const StackOfImages&) = delete;
};

// A network as a call gives it.
class GivenNetwork {
 public:
  NetworkArgs args{};       // of memory that is the caller's or this object's
  bool is_learned = false;  // whether it gives sigma2_out after mu_out

  GivenNetwork(const py::object& centers, const py::object& scales, const py::tuple& layers,
               int activation, double slope, const py::object& given_stack, int64_t N, int64_t D,
               int64_t num_rows, bool is_binomial, bool on_host) {
    int64_t width = D;
    if (!centers.is_none()) {
      width = args.num_units = size_of(read(scales), 0);
      args.centers = floats(centers, {width, D});
      args.scales = floats(scales, {width});
    }
    for (const py::handle layer : layers) {
      if (layers_.size() + 1 == layers.size() && !given_stack.is_none()) {
        const int64_t beside = layers_.empty() ? 0 : width;
        const auto parts = given_stack.cast<py::tuple>();
        stack_.emplace(parts, N, beside, static_cast<float>(slope), on_host);
        args.stack = &stack_->args;
        const auto packed = parts[5].cast<Tensor>();
        args.packed_bytes = packed.data ? packed.N : 0;
        args.packed = packed.array(args.packed_bytes, 1);
        args.tf32 = parts[6].cast<bool>();
        width = stack_->tail.P;
      }
      layers_.push_back(timed_dense(layer.cast<py::tuple>(), width, num_rows));
      width = layers_.back().outputs;
    }
    if (stack_ && !layers_.empty()) {
      const MultiscaleConvArgs& images = stack_->args;
      const int64_t pixels = images.H * images.W;
      if (images.layers[0].C * pixels != D) throw py::value_error("x must be images");
      stack_->tail.O = width;
      width *= pixels;
    }
    if (args.num_units && (stack_ || layers_.size() != 1)) {
      throw py::value_error("radial basis functions have one layer, their readout");
    }
    if (layers_.empty() || (width != D && (is_binomial || width != 2 * D))) {
      throw py::value_error("the last layer must have D outputs, or 2 D of a Gaussian process");
    }
    args.num_layers = static_cast<int>(layers_.size());
    args.layers = layers_.data();
    args.activation = Activation{activation};
    args.slope = static_cast<float>(slope);
    is_learned = width == 2 * D;
  }
  GivenNetwork(const GivenNetwork&) = delete;

 private:
  std::vector<TimedDense> layers_;
  std::optional<StackOfImages> stack_;
};

template <class Backend>
void bind_trajectory(py::module_& module) {
  module.def("trajectory", [](const Tensor& x, const Tensor& rows, bool is_binomial,
                              const py::object& centers, const py::object& scales,
                              const py::tuple& layers, int activation, double slope,
                              const py::object& given_stack, int64_t seed,
                              uint32_t reverse_stream, uint32_t forward_stream, const Tensor& ids,
                              const py::object& levels, const Tensor& mask, const Tensor& values,
                              const Tensor& y, const Tensor& spread, const Tensor& previous,
                              int64_t first, int64_t last,
                              bool mean_at_1, const Tensor& out, const Tensor& state_of,
                              const Tensor& states, int64_t execution) {
    const int64_t N = x.N, D = x.C, num_rows = first + 1;
    if (x.S != 1 || last < 1 || first < last || first >> 24) {
      throw py::value_error("x must be vectors, and timesteps descend within 1..2**24 - 1");
    }
    TrajectoryArgs args{};
    args.N = N, args.D = D;
    args.first = first, args.last = last, args.mean_at_1 = mean_at_1;
    const GivenNetwork network(centers, scales, layers, activation, slope, given_stack, N, D,
                               num_rows, is_binomial, Backend::kIsHost);
    args.network = network.args;
    args.is_binomial = is_binomial;
    args.is_learned = network.is_learned;
    args.rows = rows.array<float>(rows.N * (is_binomial ? kBernoulliColumns : kRowColumns));
    args.levels = floats(levels, {-1, 2}, num_rows);
    args.state_of = state_of.array<int64_t>(state_of.N);
    args.previous = previous.array<int64_t>(previous.N);
    if (rows.N < num_rows || state_of.N < num_rows || previous.N < num_rows) {
      throw py::value_error("tables must have a row for each timestep");
    }
    args.seed = static_cast<uint64_t>(seed);
    args.reverse_stream = reverse_stream, args.forward_stream = forward_stream;
    args.ids = ids.array<int64_t>(N);
    args.x = x.array<float>(N * D), args.out = out.array<float>(N * D);
    args.y = y.like(x, DType::float32), args.spread = spread.like(x, DType::float32);
    args.mask = mask.bytes_like(x), args.values = values.like(x, DType::float32);
    if (!args.y.data != !args.spread.data || !args.mask.data != !args.values.data) {
      throw py::value_error("pairs must be there together");
    }
    args.num_states = states.data ? states.N : 0;
    args.states = states.array<float>(args.num_states * N * D);
    if constexpr (Backend::kIsHost) {  // elsewhere the table is not to be read from here
      for (int64_t t = last; t <= first; ++t) {
        if (args.previous[t] < 0 || args.previous[t] >= t) {
          throw py::value_error("a step must lead to an earlier timestep");
        }
      }
    }
    py::gil_scoped_release release;
    Backend::run(args, execution);
  });
}

}  // namespace dpm
