// Python signature of `bound_terms`; networks come as in bind_trajectory.h.
#pragma once

#include <vector>

#include "bind_trajectory.h"
#include "bound_terms.h"

namespace dpm {

template <class Backend>
void bind_bound_terms(py::module_& module) {
  module.def("bound_terms", [](const Tensor& x_0, const Tensor& rows, bool is_binomial,
                               const py::object& centers, const py::object& scales,
                               const py::tuple& layers, int activation, double slope,
                               int64_t seed, uint32_t forward_stream, const Tensor& ids,
                               const py::object& levels, int64_t first, int64_t last,
                               const Tensor& nats, int64_t execution) {
    const int64_t N = x_0.N, D = x_0.C, num_rows = first + 1;
    if (x_0.S != 1 || last < 1 || first < last || first >> 24 || rows.N < num_rows) {
      throw py::value_error("x_0 must be vectors, and timesteps descend within the tables");
    }
    BoundTermsArgs args{};
    args.N = N, args.D = D, args.first = first, args.last = last;
    int64_t width = D;
    if (!centers.is_none()) {
      width = args.network.num_units = size_of(read(scales), 0);
      args.network.centers = floats(centers, {width, D});
      args.network.scales = floats(scales, {width});
    }
    std::vector<TimedDense> all_layers;
    for (const py::handle layer : layers) {
      all_layers.push_back(timed_dense(layer.cast<py::tuple>(), width, num_rows));
      width = all_layers.back().outputs;
    }
    if (args.network.num_units && all_layers.size() != 1) {
      throw py::value_error("radial basis functions have one layer, their readout");
    }
    if (all_layers.empty() || (width != D && (is_binomial || width != 2 * D))) {
      throw py::value_error("the last layer must have D outputs, or 2 D of a Gaussian process");
    }
    args.network.num_layers = static_cast<int>(all_layers.size());
    args.network.layers = all_layers.data();
    args.network.activation = Activation{activation};
    args.network.slope = static_cast<float>(slope);
    args.is_binomial = is_binomial, args.is_learned = width == 2 * D;
    args.rows = rows.array<float>(rows.N * (is_binomial ? kBernoulliColumns : kRowColumns));
    args.levels = floats(levels, {-1, 2}, num_rows);
    args.seed = static_cast<uint64_t>(seed), args.forward_stream = forward_stream;
    args.ids = ids.array<int64_t>(N);
    args.x_0 = x_0.array<float>(N * D);
    args.nats = nats.array<double>((first - last + 1) * N);
    py::gil_scoped_release release;
    Backend::run(args, execution);
  });
}

}  // namespace dpm
