// Python signatures of the launchers, the same for both modules: tensors come as tuples
// (address, stride n, stride c, stride s) or None, other arrays as addresses, 0 for none.
#pragma once

#include <pybind11/pybind11.h>

#include "bernoulli.h"
#include "kl.h"
#include "noise.h"
#include "step.h"

namespace dpm {

namespace py = pybind11;

inline int64_t integer_at(py::handle tuple, Py_ssize_t i) {
  const long long value = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple.ptr(), i));
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

inline bool is_tuple_of(py::handle object, Py_ssize_t size) {
  return PyTuple_CheckExact(object.ptr()) && PyTuple_GET_SIZE(object.ptr()) == size;
}

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace dpm

namespace pybind11::detail {

template <>
struct type_caster<dpm::Strided> {
  PYBIND11_TYPE_CASTER(dpm::Strided, const_name("tuple[int, int, int, int] | None"));
  bool load(handle from, bool) {
    if (from.is_none()) {
      value = {};
      return true;
    }
    if (!dpm::is_tuple_of(from, 4)) return false;
    value = {reinterpret_cast<void*>(dpm::integer_at(from, 0)), dpm::integer_at(from, 1),
             dpm::integer_at(from, 2), dpm::integer_at(from, 3)};
    return true;
  }
};

template <>
struct type_caster<dpm::Extent> {
  PYBIND11_TYPE_CASTER(dpm::Extent, const_name("tuple[int, int, int]"));
  bool load(handle from, bool) {
    if (!dpm::is_tuple_of(from, 3)) return false;
    value = {dpm::integer_at(from, 0), dpm::integer_at(from, 1), dpm::integer_at(from, 2)};
    return true;
  }
};

// (seed, stream, address of the ids, address of the timesteps)
template <>
struct type_caster<dpm::NoiseSource> {
  PYBIND11_TYPE_CASTER(dpm::NoiseSource, const_name("tuple[int, int, int, int]"));
  bool load(handle from, bool) {
    if (!dpm::is_tuple_of(from, 4)) return false;
    value = {static_cast<uint64_t>(dpm::integer_at(from, 0)),
             static_cast<uint32_t>(dpm::integer_at(from, 1)),
             reinterpret_cast<const int64_t*>(dpm::integer_at(from, 2)),
             reinterpret_cast<const int64_t*>(dpm::integer_at(from, 3))};
    return true;
  }
};

}  // namespace pybind11::detail

namespace dpm {

// Backend::run(args, execution): the number of threads on a CPU, the address of a stream on a GPU.
template <class Backend>
void bind(py::module_& module) {
  module.attr("PIECE") = Extent::kPiece;
  module.def("bernoulli_noise", [](Extent extent, int dtype, Strided x_0, Strided x_t,
                                   uintptr_t rows, NoiseSource source, int64_t execution) {
    const BernoulliNoiseArgs args{extent, DType{dtype}, x_0, x_t, pointer<void>(rows), source};
    py::gil_scoped_release release;
    Backend::run(args, execution);
  });
  module.def("bernoulli_step", [](Extent extent, int x_dtype, int out_dtype, Strided x_t,
                                  Strided logit_out, Strided mask, Strided values, Strided y,
                                  Strided flip, Strided drift, Strided x_prev, uintptr_t rows,
                                  NoiseSource source, bool deterministic, int64_t execution) {
    const BernoulliStepArgs args{extent, DType{x_dtype}, DType{out_dtype}, x_t, logit_out, mask,
                                 values, y, flip, drift, x_prev, pointer<void>(rows), source,
                                 deterministic};
    py::gil_scoped_release release;
    Backend::run(args, execution);
  });
  module.def("bernoulli_kl", [](Extent extent, int x_dtype, int out_dtype, Strided x_0,
                                Strided x_t, Strided logit_out, Strided grad_logit_out,
                                uintptr_t rows, uintptr_t nats, uintptr_t pieces,
                                int64_t execution) {
    const BernoulliKlArgs args{extent, DType{x_dtype}, DType{out_dtype}, x_0, x_t, logit_out,
                               grad_logit_out, pointer<void>(rows), pointer<double>(nats),
                               pointer<double>(pieces)};
    py::gil_scoped_release release;
    Backend::run(args, execution);
  });
  module.def("kl", [](Extent extent, int x_dtype, int out_dtype, Strided x_0, Strided x_t,
                      Strided mu_out, Strided sigma2_out, uintptr_t rows, int edge,
                      double half_width, double lowest, double highest, uintptr_t nats,
                      Strided grad_x_0, Strided grad_x_t, Strided grad_mu_out,
                      Strided grad_sigma2_out, uintptr_t grad_rows, uintptr_t pieces,
                      int64_t execution) {
    const KlArgs args{extent, DType{x_dtype}, DType{out_dtype}, x_0, x_t, mu_out, sigma2_out,
                      pointer<void>(rows), Edge{edge}, {half_width, lowest, highest},
                      pointer<double>(nats), grad_x_0, grad_x_t, grad_mu_out, grad_sigma2_out,
                      pointer<double>(grad_rows), pointer<double>(pieces)};
    py::gil_scoped_release release;
    Backend::run(args, execution);
  });
  module.def("step", [](Extent extent, int x_dtype, int out_dtype, Strided x_t, Strided mu_out,
                        Strided sigma2_out, uintptr_t rows, NoiseSource source, bool deterministic,
                        Strided y, Strided sigma2_y, Strided drift, Strided mask, Strided values,
                        Strided x_prev, int64_t execution) {
    const StepArgs args{extent, DType{x_dtype}, DType{out_dtype}, x_t, mu_out, sigma2_out,
                        pointer<void>(rows), source, deterministic, y, sigma2_y, drift, mask,
                        values, x_prev};
    py::gil_scoped_release release;
    Backend::run(args, execution);
  });
  module.def("noise", [](Extent extent, int dtype, Strided x_0, Strided x_t,
                         uintptr_t coefficients, NoiseSource source, int64_t execution) {
    const NoiseArgs args{extent, DType{dtype}, x_0, x_t, pointer<void>(coefficients), source};
    py::gil_scoped_release release;
    Backend::run(args, execution);
  });
  module.def("noise_gradient", [](Extent extent, int dtype, Strided grad_x_t, Strided x_0,
                                  uintptr_t coefficients, NoiseSource source, Strided grad_x_0,
                                  uintptr_t grad_coefficients, uintptr_t pieces,
                                  int64_t execution) {
    const NoiseGradientArgs args{extent, DType{dtype}, grad_x_t, x_0, pointer<void>(coefficients),
                                 source, grad_x_0, pointer<double>(grad_coefficients),
                                 pointer<double>(pieces)};
    py::gil_scoped_release release;
    Backend::run(args, execution);
  });
  module.def("fill", [](int64_t num_examples, int64_t num_elements, int random, int dtype,
                        uintptr_t out, NoiseSource source, int64_t execution) {
    const FillArgs args{num_examples, num_elements, RandomKind{random}, DType{dtype},
                        pointer<void>(out), source};
    py::gil_scoped_release release;
    Backend::run(args, execution);
  });
}

}  // namespace dpm
