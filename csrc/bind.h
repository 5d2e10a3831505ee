// Python signatures of the launchers, the same for both modules. Tensors come as they are, None for
// none; dpm_fast/ops has checked their shapes, dtypes and devices.
#pragma once

#include "bernoulli.h"
#include "kl.h"
#include "noise.h"
#include "step.h"
#include "tensor.h"

namespace dpm {

// Sums of an example that has several pieces need a place for each.
inline double* pieces_array(const Tensor& pieces, const Extent& size, int64_t sums) {
  const int64_t num_pieces = size.num_pieces();
  if (num_pieces > 1 && !pieces.data) throw py::value_error("there must be room for pieces");
  return pieces.array<double>(size.N * num_pieces * sums);
}

// Backend::run(args, execution): the number of threads on a CPU, the address of a stream on a GPU.
template <class Backend>
void bind(py::module_& module) {
  module.attr("PIECE") = Extent::kPiece;
  module.def("bernoulli_noise", [](const Tensor& x_0, const Tensor& rows, int64_t seed,
                                   uint32_t stream, const Tensor& ids, const Tensor& t,
                                   const Tensor& x_t, int64_t execution) {
    const BernoulliNoiseArgs args{extent(x_0, {x_0, x_t}), x_0.dtype(), x_0.like(x_0),
                                  x_t.like(x_0, x_0.dtype()), rows_array(rows, x_0, 2),
                                  noise_source(seed, stream, ids, t, x_0.N)};
    py::gil_scoped_release release;
    Backend::run(args, execution);
  });
  module.def("bernoulli_step", [](const Tensor& x_t, const Tensor& logit_out, const Tensor& mask,
                                  const Tensor& values, const Tensor& y, const Tensor& flip,
                                  const Tensor& drift, const Tensor& rows, int64_t seed,
                                  uint32_t stream, const Tensor& ids, const Tensor& t,
                                  bool deterministic, const Tensor& x_prev, int64_t execution) {
    const DType dtype = x_t.dtype();
    const Extent size = extent(x_t, {x_t, logit_out, mask, values, y, flip, drift, x_prev});
    const BernoulliStepArgs args{size, dtype, logit_out.dtype(), x_t.like(x_t),
                                 logit_out.like(x_t), mask.bytes_like(x_t),
                                 values.like(x_t, dtype), y.like(x_t, dtype),
                                 flip.like(x_t, dtype), drift.like(x_t, dtype),
                                 x_prev.like(x_t, dtype),
                                 rows_array(rows, x_t, kBernoulliColumns),
                                 noise_source(seed, stream, ids, t, x_t.N), deterministic};
    py::gil_scoped_release release;
    Backend::run(args, execution);
  });
  module.def("bernoulli_kl", [](const Tensor& x_0, const Tensor& x_t, const Tensor& logit_out,
                                const Tensor& rows, const Tensor& nats, const Tensor& grad,
                                const Tensor& pieces, int64_t execution) {
    const DType dtype = x_0.dtype(), out_dtype = logit_out.dtype();
    const Extent size = extent(x_0, {x_0, x_t, logit_out, grad});
    const BernoulliKlArgs args{size, dtype, out_dtype, x_0.like(x_0), x_t.like(x_0, dtype),
                               logit_out.like(x_0), grad.like(x_0, out_dtype),
                               rows_array(rows, x_0, kBernoulliColumns),
                               nats.array<double>(x_0.N), pieces_array(pieces, size, 1)};
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
    const DType dtype = x_0.dtype(), out_dtype = mu_out.dtype();
    const Tensor mu = joined ? mu_out.half(0) : mu_out;
    const Tensor sigma2 = joined ? mu_out.half(1) : sigma2_out;
    const Tensor grad_mu = joined ? grad_mu_out.half(0) : grad_mu_out;
    const Tensor grad_sigma2 = joined ? grad_mu_out.half(1) : grad_sigma2_out;
    const Extent size = extent(x_0, {x_0, x_t, mu, sigma2, grad_x_0, grad_x_t, grad_mu,
                                     grad_sigma2});
    const KlArgs args{size, dtype, out_dtype, x_0.like(x_0), x_t.like(x_0, dtype), mu.like(x_0),
                      sigma2.like(x_0, out_dtype), rows_array(rows, x_0, kRowColumns), Edge{edge},
                      {half_width, lowest, highest}, nats.array<double>(x_0.N),
                      grad_x_0.like(x_0, dtype), grad_x_t.like(x_0, dtype),
                      grad_mu.like(x_0, out_dtype), grad_sigma2.like(x_0, out_dtype),
                      grad_rows.array<double>(x_0.N * kRowColumns),
                      pieces_array(pieces, size, kKlSums)};
    py::gil_scoped_release release;
    Backend::run(args, execution);
  });
  module.def("step", [](const Tensor& x_t, const Tensor& mu_out, const Tensor& sigma2_out,
                        const Tensor& rows, int64_t seed, uint32_t stream, const Tensor& ids,
                        const Tensor& t, const Tensor& y, const Tensor& sigma2_y,
                        const Tensor& drift, const Tensor& mask, const Tensor& values,
                        bool deterministic, const Tensor& x_prev, int64_t execution) {
    const DType dtype = x_t.dtype(), out_dtype = mu_out.dtype();
    const DType of_rows = dtype == DType::float64 ? dtype : DType::float32;
    const Extent size = extent(x_t, {x_t, mu_out, sigma2_out, y, sigma2_y, drift, mask, values,
                                     x_prev});
    const StepArgs args{size, dtype, out_dtype, x_t.like(x_t), mu_out.like(x_t),
                        sigma2_out.like(x_t, out_dtype), rows_array(rows, x_t, kRowColumns),
                        noise_source(seed, stream, ids, t, x_t.N), deterministic,
                        y.like(x_t, dtype), sigma2_y.like(x_t, of_rows), drift.like(x_t, dtype),
                        mask.bytes_like(x_t), values.like(x_t, dtype), x_prev.like(x_t, dtype)};
    py::gil_scoped_release release;
    Backend::run(args, execution);
  });
  module.def("noise", [](const Tensor& x_0, const Tensor& coefficients, int64_t seed,
                         uint32_t stream, const Tensor& ids, const Tensor& t, const Tensor& x_t,
                         int64_t execution) {
    const NoiseArgs args{extent(x_0, {x_0, x_t}), x_0.dtype(), x_0.like(x_0),
                         x_t.like(x_0, x_0.dtype()), rows_array(coefficients, x_0, 2),
                         noise_source(seed, stream, ids, t, x_0.N)};
    py::gil_scoped_release release;
    Backend::run(args, execution);
  });
  module.def("noise_gradient", [](const Tensor& grad_x_t, const Tensor& x_0,
                                  const Tensor& coefficients, int64_t seed, uint32_t stream,
                                  const Tensor& ids, const Tensor& t, const Tensor& grad_x_0,
                                  const Tensor& grad_coefficients, const Tensor& pieces,
                                  int64_t execution) {
    const Tensor& x = grad_x_t;
    const Extent size = extent(x, {x, x_0, grad_x_0});
    double* const gradient = grad_coefficients.array<double>(x.N * kNoiseSums);
    const NoiseGradientArgs args{size, x.dtype(), x.like(x), x_0.like(x, x.dtype()),
                                 rows_array(coefficients, x, 2),
                                 noise_source(seed, stream, ids, t, x.N),
                                 grad_x_0.like(x, x.dtype()), gradient,
                                 gradient ? pieces_array(pieces, size, kNoiseSums) : nullptr};
    py::gil_scoped_release release;
    Backend::run(args, execution);
  });
  // out: (N, elements), of int64 for words.
  module.def("fill", [](int random, int64_t seed, uint32_t stream, const Tensor& ids,
                        const Tensor& t, const Tensor& out, int64_t execution) {
    const RandomKind kind{random};
    const bool words = kind == RandomKind::words;
    const DType dtype = words ? DType::float32 : out.dtype();
    void* const to = out.array(out.N * out.C, words ? 8 : out.type.bits / 8);
    const FillArgs args{out.N, out.C, kind, dtype, to, noise_source(seed, stream, ids, t, out.N)};
    py::gil_scoped_release release;
    Backend::run(args, execution);
  });
}

}  // namespace dpm
