// Python signature of `trajectory`. Layers come as tuples of weights and bias, the readout last; pairs
// that may be absent as tuples or None.
#pragma once

#include <vector>

#include "bind.h"
#include "trajectory.h"

namespace dpm {

// A contiguous tensor of floats of this shape, or none; -1 for any size that is at least `least`.
inline const float* floats(py::handle object, std::initializer_list<int64_t> shape,
                           int64_t least = 0) {
  if (object.is_none()) return nullptr;
  const dlpack::Tensor tensor = read(object);
  bool fits = tensor.ndim == static_cast<int>(shape.size()) && tensor.dtype.bits == 32;
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
  layer.outputs = read(bias).shape[timed_bias ? 1 : 0];
  const int64_t size = layer.outputs * inputs;
  layer.weights = timed_weights ? floats(weights, {-1, layer.outputs, inputs}, num_rows)
                                : floats(weights, {layer.outputs, inputs});
  layer.bias = timed_bias ? floats(bias, {-1, layer.outputs}, num_rows)
                          : floats(bias, {layer.outputs});
  layer.weights_step = timed_weights ? size : 0;
  layer.bias_step = timed_bias ? layer.outputs : 0;
  return layer;
}

template <class Backend>
void bind_trajectory(py::module_& module) {
  module.def("trajectory", [](const Tensor& x, const Tensor& rows, bool is_binomial,
                              const py::object& centers, const py::object& scales,
                              const py::tuple& layers, int activation, double slope, int64_t seed,
                              uint32_t reverse_stream, uint32_t forward_stream, const Tensor& ids,
                              const py::object& levels, const Tensor& mask, const Tensor& values,
                              const Tensor& y, const Tensor& spread, int64_t first, int64_t last,
                              bool mean_at_1, const Tensor& out, const Tensor& state_of,
                              const Tensor& states, int64_t execution) {
    const int64_t N = x.N, D = x.C, num_rows = first + 1;
    if (x.S != 1 || last < 1 || first < last || first >> 24) {
      throw py::value_error("x must be vectors, and timesteps descend within 1..2**24 - 1");
    }
    TrajectoryArgs args{};
    args.N = N, args.D = D;
    args.first = first, args.last = last, args.mean_at_1 = mean_at_1;
    VectorNetworkArgs& network = args.network;
    int64_t width = D;
    if (!centers.is_none()) {
      width = network.num_units = read(scales).shape[0];
      network.centers = floats(centers, {width, D});
      network.scales = floats(scales, {width});
    }
    std::vector<TimedDense> all_layers;
    for (const py::handle layer : layers) {
      all_layers.push_back(timed_dense(layer.cast<py::tuple>(), width, num_rows));
      width = all_layers.back().outputs;
    }
    if (all_layers.empty() || (width != D && (is_binomial || width != 2 * D))) {
      throw py::value_error("the last layer must have D outputs, or 2 D of a Gaussian process");
    }
    network.num_layers = static_cast<int>(all_layers.size());
    network.layers = all_layers.data();
    network.activation = Activation{activation};
    network.slope = static_cast<float>(slope);
    args.is_binomial = is_binomial;
    args.is_learned = width == 2 * D;
    args.rows = rows.array<float>(rows.N * (is_binomial ? kBernoulliColumns : kRowColumns));
    args.levels = floats(levels, {-1, 2}, num_rows);
    args.state_of = state_of.array<int64_t>(state_of.N);
    if (rows.N < num_rows || state_of.N < num_rows) {
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
    const int64_t num_states = states.data ? states.N : 0;
    for (int64_t t = last - 1; t < first; ++t) {
      if (args.state_of[t] >= num_states) throw py::value_error("there must be room for states");
    }
    args.states = states.array<float>(num_states * N * D);
    py::gil_scoped_release release;
    Backend::run(args, execution);
  });
}

}  // namespace dpm
