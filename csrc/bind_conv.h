// Python signatures of `multiscale_conv` and its gradient: images come as tuples (address, stride n,
// stride c, stride y, stride x) or None, layers as tuples in the order of ConvLayer.
#pragma once

#include <vector>

#include "bind.h"
#include "multiscale_conv.h"

namespace pybind11::detail {

template <>
struct type_caster<dpm::Images> {
  PYBIND11_TYPE_CASTER(dpm::Images, const_name("tuple[int, int, int, int, int] | None"));
  bool load(handle from, bool) {
    if (from.is_none()) {
      value = {};
      return true;
    }
    if (!dpm::is_tuple_of(from, 5)) return false;
    value = {reinterpret_cast<void*>(dpm::integer_at(from, 0)), dpm::integer_at(from, 1),
             dpm::integer_at(from, 2), dpm::integer_at(from, 3), dpm::integer_at(from, 4)};
    return true;
  }
};

}  // namespace pybind11::detail

namespace dpm {

// The addresses at position i of a layer, one per scale; None for none.
template <class Address>
void read_addresses(const py::tuple& layer, size_t i, int num_scales, Address* addresses) {
  if (layer[i].is_none()) return;
  const py::tuple given = layer[i];
  if (given.size() != static_cast<size_t>(num_scales)) {
    throw py::value_error("a layer must have one address per scale");
  }
  for (int s = 0; s < num_scales; ++s) {
    addresses[s] = reinterpret_cast<Address>(integer_at(given, s));
  }
}

inline std::vector<ConvLayer> read_layers(const py::tuple& given, int num_scales) {
  std::vector<ConvLayer> layers;
  for (const py::handle item : given) {
    const auto layer = py::reinterpret_borrow<py::tuple>(item);
    if (!is_tuple_of(layer, 10)) throw py::value_error("a layer must be a tuple of 10");
    ConvLayer read{integer_at(layer, 0), integer_at(layer, 1), integer_at(layer, 2),
                   integer_at(layer, 3) != 0, {}, {}, {}, {}, nullptr, nullptr};
    read_addresses(layer, 4, num_scales, read.weights);
    read_addresses(layer, 5, num_scales, read.biases);
    read_addresses(layer, 6, num_scales, read.grad_weights);
    read_addresses(layer, 7, num_scales, read.grad_biases);
    read.out = reinterpret_cast<void*>(integer_at(layer, 8));
    read.signs = reinterpret_cast<uint16_t*>(integer_at(layer, 9));
    layers.push_back(read);
  }
  return layers;
}

// (N, H, W, scales) of what the launchers may read without leaving a tensor.
inline void check_size(const py::tuple& size, const py::tuple& layers) {
  if (!is_tuple_of(size, 4)) throw py::value_error("a size must be (N, H, W, scales)");
  const int64_t num_scales = integer_at(size, 3);
  if (num_scales < 1 || num_scales > ConvLayer::kMaxScales) {
    throw py::value_error("there must be 1 to 8 scales");
  }
  const int64_t unit = int64_t{1} << (num_scales - 1);
  if (integer_at(size, 0) < 1 || integer_at(size, 1) < 1 || integer_at(size, 2) < 1 ||
      integer_at(size, 1) % unit || integer_at(size, 2) % unit) {
    throw py::value_error("sides must be positive and divisible by the factor of the last scale");
  }
  if (layers.empty()) throw py::value_error("there must be a layer");
}

template <class Backend>
void bind_conv(py::module_& module) {
  module.attr("MAX_SCALES") = int{ConvLayer::kMaxScales};
  module.def("multiscale_conv", [](const py::tuple& size, const py::tuple& given, int dtype,
                                   bool after_sum, double slope, Images x, Images out,
                                   int64_t execution) {
    check_size(size, given);
    const int num_scales = static_cast<int>(integer_at(size, 3));
    const std::vector<ConvLayer> layers = read_layers(given, num_scales);
    const MultiscaleConvArgs args{integer_at(size, 0), integer_at(size, 1), integer_at(size, 2),
                                  num_scales, static_cast<int>(layers.size()), layers.data(),
                                  DType{dtype}, after_sum, slope, x, out, {}, {}};
    py::gil_scoped_release release;
    Backend::run(args, execution);
  });
  module.def("multiscale_conv_gradient", [](const py::tuple& size, const py::tuple& given,
                                            int dtype, bool after_sum, double slope, Images x,
                                            Images grad_out, Images grad_x, int64_t execution) {
    check_size(size, given);
    const int num_scales = static_cast<int>(integer_at(size, 3));
    const std::vector<ConvLayer> layers = read_layers(given, num_scales);
    const MultiscaleConvArgs args{integer_at(size, 0), integer_at(size, 1), integer_at(size, 2),
                                  num_scales, static_cast<int>(layers.size()), layers.data(),
                                  DType{dtype}, after_sum, slope, x, {}, grad_out, grad_x};
    py::gil_scoped_release release;
    Backend::run_gradient(args, execution);
  });
}

}  // namespace dpm
