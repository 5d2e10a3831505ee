// Python signature of `bound_terms`; networks come as in bind_trajectory.h.
#pragma once

#include "bind_trajectory.h"
#include "bound_terms.h"

namespace dpm {

template <class Backend>
void bind_bound_terms(py::module_& module) {
  module.def("bound_terms", [](const Tensor& x_0, const Tensor& rows, bool is_binomial,
                               const py::object& centers, const py::object& scales,
                               const py::tuple& layers, int activation, double slope,
                               const py::object& given_stack, int64_t seed,
                               uint32_t forward_stream, const Tensor& ids,
                               const py::object& levels, int64_t first, int64_t last,
                               const Tensor& nats, int64_t execution) {
    const int64_t N = x_0.N, D = x_0.C, num_rows = first + 1;
    if (x_0.S != 1 || last < 1 || first < last || first >> 24 || rows.N < num_rows) {
      throw py::value_error("x_0 must be vectors, and timesteps descend within the tables");
    }
    BoundTermsArgs args{};
    args.N = N, args.D = D, args.first = first, args.last = last;
    const GivenNetwork network(centers, scales, layers, activation, slope, given_stack, N, D,
                               num_rows, is_binomial, Backend::kIsHost);
    if (Backend::kIsHost && network.args.stack) {
      throw py::value_error("a CPU's kernel takes networks of vectors");
    }
    args.network = network.args;
    args.is_binomial = is_binomial, args.is_learned = network.is_learned;
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
