// Python signatures of the launchers, the same for both modules. Tensors come as they are, None for
// none; dpm_fast/ops has checked their shapes, dtypes and devices.
#pragma once

#include "bernoulli.h"
#include "kl.h"
#include "noise.h"
#include "step.h"
#include "tensor.h"

namespace dpm {

// Backend::run(args, execution): the number of threads on a CPU, the address of a stream on a GPU.
template <class Backend>
void bind(py::module_& module) {
  module.attr("PIECE") = Extent::kPiece;
  module.def("bernoulli_noise", [](const Tensor& x_0, const Tensor& rows, int64_t seed,
                                   uint32_t stream, const Tensor& ids, const Tensor& t,
                                   const Tensor& x_t, int64_t execution) {
    const BernoulliNoiseArgs args{extent(x_0, {x_0, x_t}), x_0.dtype(), x_0.strided(x_0.N),
                                  x_t.strided(x_0.N), rows.array<void>(),
                                  noise_source(seed, stream, ids, t)};
    py::gil_scoped_release release;
    Backend::run(args, execution);
  });
  module.def("bernoulli_step", [](const Tensor& x_t, const Tensor& logit_out, const Tensor& mask,
                                  const Tensor& values, const Tensor& y, const Tensor& flip,
                                  const Tensor& drift, const Tensor& rows, int64_t seed,
                                  uint32_t stream, const Tensor& ids, const Tensor& t,
                                  bool deterministic, const Tensor& x_prev, int64_t execution) {
    const int64_t N = x_t.N;
    const Extent size = extent(x_t, {x_t, logit_out, mask, values, y, flip, drift, x_prev});
    const BernoulliStepArgs args{size, x_t.dtype(), logit_out.dtype(), x_t.strided(N),
                                 logit_out.strided(N), mask.strided(N), values.strided(N),
                                 y.strided(N), flip.strided(N), drift.strided(N),
                                 x_prev.strided(N), rows.array<void>(),
                                 noise_source(seed, stream, ids, t), deterministic};
    py::gil_scoped_release release;
    Backend::run(args, execution);
  });
  module.def("bernoulli_kl", [](const Tensor& x_0, const Tensor& x_t, const Tensor& logit_out,
                                const Tensor& rows, const Tensor& nats, const Tensor& grad,
                                const Tensor& pieces, int64_t execution) {
    const int64_t N = x_0.N;
    const BernoulliKlArgs args{extent(x_0, {x_0, x_t, logit_out, grad}), x_0.dtype(),
                               logit_out.dtype(), x_0.strided(N), x_t.strided(N),
                               logit_out.strided(N), grad.strided(N), rows.array<void>(),
                               nats.array<double>(), pieces.array<double>()};
    py::gil_scoped_release release;
    Backend::run(args, execution);
  });
  // Where `joined`, mu_out holds both outputs of a network, as its gradient does.
  module.def("kl", [](const Tensor& x_0, const Tensor& x_t, const Tensor& mu_out,
                      const Tensor& sigma2_out, bool joined, const Tensor& rows, int edge,
                      double half_width, double lowest, double highest, const Tensor& nats,
                      const Tensor& grad_x_0, const Tensor& grad_x_t, const Tensor& grad_mu_out,
                      const Tensor& grad_sigma2_out, const Tensor& grad_rows, const Tensor& pieces,
                      int64_t execution) {
    const int64_t N = x_0.N;
    const Tensor mu = joined ? mu_out.half(0) : mu_out;
    const Tensor sigma2 = joined ? mu_out.half(1) : sigma2_out;
    const Tensor grad_mu = joined ? grad_mu_out.half(0) : grad_mu_out;
    const Tensor grad_sigma2 = joined ? grad_mu_out.half(1) : grad_sigma2_out;
    const Extent size = extent(x_0, {x_0, x_t, mu, sigma2, grad_x_0, grad_x_t, grad_mu,
                                     grad_sigma2});
    const KlArgs args{size, x_0.dtype(), mu.dtype(), x_0.strided(N), x_t.strided(N),
                      mu.strided(N), sigma2.strided(N), rows.array<void>(), Edge{edge},
                      {half_width, lowest, highest}, nats.array<double>(), grad_x_0.strided(N),
                      grad_x_t.strided(N), grad_mu.strided(N), grad_sigma2.strided(N),
                      grad_rows.array<double>(), pieces.array<double>()};
    py::gil_scoped_release release;
    Backend::run(args, execution);
  });
  module.def("step", [](const Tensor& x_t, const Tensor& mu_out, const Tensor& sigma2_out,
                        const Tensor& rows, int64_t seed, uint32_t stream, const Tensor& ids,
                        const Tensor& t, const Tensor& y, const Tensor& sigma2_y,
                        const Tensor& drift, const Tensor& mask, const Tensor& values,
                        bool deterministic, const Tensor& x_prev, int64_t execution) {
    const int64_t N = x_t.N;
    const Extent size = extent(x_t, {x_t, mu_out, sigma2_out, y, sigma2_y, drift, mask, values,
                                     x_prev});
    const StepArgs args{size, x_t.dtype(), mu_out.dtype(), x_t.strided(N), mu_out.strided(N),
                        sigma2_out.strided(N), rows.array<void>(),
                        noise_source(seed, stream, ids, t), deterministic, y.strided(N),
                        sigma2_y.strided(N), drift.strided(N), mask.strided(N),
                        values.strided(N), x_prev.strided(N)};
    py::gil_scoped_release release;
    Backend::run(args, execution);
  });
  module.def("noise", [](const Tensor& x_0, const Tensor& coefficients, int64_t seed,
                         uint32_t stream, const Tensor& ids, const Tensor& t, const Tensor& x_t,
                         int64_t execution) {
    const NoiseArgs args{extent(x_0, {x_0, x_t}), x_0.dtype(), x_0.strided(x_0.N),
                         x_t.strided(x_0.N), coefficients.array<void>(),
                         noise_source(seed, stream, ids, t)};
    py::gil_scoped_release release;
    Backend::run(args, execution);
  });
  module.def("noise_gradient", [](const Tensor& grad_x_t, const Tensor& x_0,
                                  const Tensor& coefficients, int64_t seed, uint32_t stream,
                                  const Tensor& ids, const Tensor& t, const Tensor& grad_x_0,
                                  const Tensor& grad_coefficients, const Tensor& pieces,
                                  int64_t execution) {
    const int64_t N = grad_x_t.N;
    const NoiseGradientArgs args{extent(grad_x_t, {grad_x_t, x_0, grad_x_0}), grad_x_t.dtype(),
                                 grad_x_t.strided(N), x_0.strided(N), coefficients.array<void>(),
                                 noise_source(seed, stream, ids, t), grad_x_0.strided(N),
                                 grad_coefficients.array<double>(), pieces.array<double>()};
    py::gil_scoped_release release;
    Backend::run(args, execution);
  });
  // out: (N, elements), of int32 for words.
  module.def("fill", [](int random, int64_t seed, uint32_t stream, const Tensor& ids,
                        const Tensor& t, const Tensor& out, int64_t execution) {
    const RandomKind kind{random};
    const DType dtype = kind == RandomKind::words ? DType::float32 : out.dtype();
    const FillArgs args{out.N, out.C, kind, dtype, out.array<void>(),
                        noise_source(seed, stream, ids, t)};
    py::gil_scoped_release release;
    Backend::run(args, execution);
  });
}

}  // namespace dpm
