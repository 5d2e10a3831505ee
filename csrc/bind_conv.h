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

// What both signatures begin with. The sizes are those that keep a launcher within its tensors.
struct ConvCall {
  std::vector<ConvLayer> layers;
  MultiscaleConvArgs args{};

  ConvCall(const py::tuple& size, const py::tuple& given, int dtype, bool after_sum,
           double slope) {
    if (!is_tuple_of(size, 5)) throw py::value_error("a size must be (N, H, W, scales, parts)");
    args.N = integer_at(size, 0);
    args.H = integer_at(size, 1);
    args.W = integer_at(size, 2);
    const int64_t num_scales = integer_at(size, 3);
    if (num_scales < 1 || num_scales > ConvLayer::kMaxScales) {
      throw py::value_error("there must be 1 to 8 scales");
    }
    args.parts = integer_at(size, 4);
    if (args.parts < 1 || args.parts > 16 || args.H % args.parts) {
      throw py::value_error("H must be divisible by the parts, of which 16 fit");
    }
    args.H /= args.parts;
    const int64_t unit = int64_t{1} << (num_scales - 1);
    if (args.N < 1 || args.H < 1 || args.W < 1 || args.H % unit || args.W % unit) {
      throw py::value_error("sides must be positive, and be halved for every scale");
    }
    args.num_scales = static_cast<int>(num_scales);
    layers = read_layers(given, args.num_scales);
    if (layers.empty()) throw py::value_error("there must be a layer");
    for (const ConvLayer& layer : layers) {
      if (args.parts == 1) break;
      if (layer.bias_per_location || layer.K / 2 > args.H >> (num_scales - 1)) {
        throw py::value_error("these layers need whole images");
      }
    }
    args.num_layers = static_cast<int>(layers.size());
    args.layers = layers.data();
    args.dtype = DType{dtype};
    args.after_sum = after_sum;
    args.slope = slope;
  }
};

template <class Backend>
void bind_conv(py::module_& module) {
  module.attr("MAX_SCALES") = int{ConvLayer::kMaxScales};
  module.def("multiscale_conv", [](const py::tuple& size, const py::tuple& layers, int dtype,
                                   bool after_sum, double slope, Images x, Images out,
                                   int64_t execution) {
    ConvCall call(size, layers, dtype, after_sum, slope);
    call.args.x = x;
    call.args.out = out;
    py::gil_scoped_release release;
    Backend::run(call.args, execution);
  });
  module.def("multiscale_conv_gradient", [](const py::tuple& size, const py::tuple& layers,
                                            int dtype, bool after_sum, double slope, Images x,
                                            Images grad_out, Images grad_x, int64_t execution) {
    ConvCall call(size, layers, dtype, after_sum, slope);
    call.args.x = x;
    call.args.grad_out = grad_out;
    call.args.grad_x = grad_x;
    py::gil_scoped_release release;
    Backend::run_gradient(call.args, execution);
  });
}

}  // namespace dpm
