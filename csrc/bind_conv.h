// Python signatures of `multiscale_conv` and its gradient. Layers come as tuples: weights, biases
// and the gradients of both, each a tuple of one tensor per scale or None; outputs and signs kept,
// each a tensor or None. A tail is None or a tuple: images beside, layers of each pixel (weight, bias
// and the gradients of both), weight and bias of the linear layer; then gradients of the images, the
// weight and the bias. Gradients are tensors or None.
#pragma once

#include <vector>

#include "bind.h"
#include "multiscale_conv.h"

namespace dpm {

inline Images images(py::handle object) {
  if (object.is_none()) return {};
  const dlpack::Tensor tensor = read(object);
  if (tensor.ndim != 4) throw py::value_error("images must have four dimensions");
  return {tensor.data, tensor.strides[0], tensor.strides[1], tensor.strides[2], tensor.strides[3]};
}

template <class T>
T* address(py::handle tensor) {
  return tensor.is_none() ? nullptr : static_cast<T*>(read(tensor).data);
}

// Of tensors that are contiguous, one per scale, or None for none.
template <class T>
void read_addresses(py::handle tensors, int num_scales, T** addresses) {
  if (tensors.is_none()) return;
  const auto given = tensors.cast<py::tuple>();
  if (given.size() != static_cast<size_t>(num_scales)) {
    throw py::value_error("a layer must have one tensor per scale");
  }
  for (int s = 0; s < num_scales; ++s) addresses[s] = address<T>(given[s]);
}

inline ConvLayer read_layer(const py::tuple& given, int num_scales) {
  if (given.size() != 6) throw py::value_error("a layer must be a tuple of 6");
  ConvLayer layer{};
  read_addresses(given[0], num_scales, layer.weights);
  read_addresses(given[1], num_scales, layer.biases);
  read_addresses(given[2], num_scales, layer.grad_weights);
  read_addresses(given[3], num_scales, layer.grad_biases);
  layer.out = address<void>(given[4]);
  layer.signs = address<uint16_t>(given[5]);
  const dlpack::Tensor weight = read(given[0].cast<py::tuple>()[0]);
  if (weight.ndim != 4) throw py::value_error("weights must have four dimensions");
  layer.F = weight.shape[0];
  layer.C = weight.shape[1];
  layer.K = weight.shape[2];
  layer.bias_per_location = read(given[1].cast<py::tuple>()[0]).ndim > 1;
  return layer;
}

// Whether a tensor is contiguous and has these sizes.
inline bool has_sizes(const dlpack::Tensor& tensor, std::initializer_list<int64_t> sizes) {
  if (tensor.ndim != static_cast<int>(sizes.size())) return false;
  int64_t stride = 1;
  for (int i = tensor.ndim - 1; i >= 0; --i) {
    const int64_t size = sizes.begin()[i];
    if (tensor.shape[i] != size || (size > 1 && tensor.strides[i] != stride)) return false;
    stride *= size;
  }
  return true;
}

inline PixelLayer read_pixel_layer(const py::tuple& given) {
  if (given.size() != 4) throw py::value_error("a layer of each pixel must be a tuple of 4");
  const dlpack::Tensor weight = read(given[0]), bias = read(given[1]);
  if (weight.ndim != 2 || !has_sizes(weight, {weight.shape[0], weight.shape[1]}) ||
      !has_sizes(bias, {weight.shape[0]})) {
    throw py::value_error("layers of each pixel must be contiguous, (F, C) and (F,)");
  }
  return {weight.shape[1], weight.shape[0],         weight.data,
          bias.data,       address<void>(given[2]), address<void>(given[3])};
}

// Of a tail with tail.P channels so far.
inline void read_pixel_layers(const py::tuple& given, Tail& tail) {
  for (const py::handle layer : given) {
    if (tail.num_layers == Tail::kMaxLayers) throw py::value_error("too many layers of each pixel");
    tail.layers[tail.num_layers] = read_pixel_layer(layer.cast<py::tuple>());
    if (tail.layers[tail.num_layers].C != tail.P) throw py::value_error("channels must agree");
    tail.P = tail.layers[tail.num_layers++].F;
  }
}

inline Tail read_tail(const py::tuple& given, int64_t N, int64_t channels) {
  if (given.size() != 7) throw py::value_error("a tail must be a tuple of 7");
  Tail tail{};
  tail.beside = images(given[0]);
  tail.grad_beside = images(given[4]);
  if (!given[0].is_none()) tail.K = read(given[0]).shape[1];
  tail.P = channels + tail.K;
  read_pixel_layers(given[1].cast<py::tuple>(), tail);
  const dlpack::Tensor weight = read(given[2]), bias = read(given[3]);
  if (weight.ndim == 3) tail.O = weight.shape[1];
  if (!has_sizes(weight, {N, tail.O, tail.P}) || !has_sizes(bias, {N, tail.O})) {
    throw py::value_error("linear layers must be contiguous, (N, O, P) and (N, O)");
  }
  tail.weight = weight.data;
  tail.bias = bias.data;
  tail.grad_weight = address<void>(given[5]);
  tail.grad_bias = address<void>(given[6]);
  return tail;
}

// What both signatures begin with. The sizes are those that keep a launcher within its tensors.
struct ConvCall {
  std::vector<ConvLayer> layers;
  Tail tail;
  MultiscaleConvArgs args{};

  ConvCall(py::handle x, int num_scales, int parts, const py::tuple& given,
           py::handle given_tail, bool after_sum, double slope) {
    args.x = images(x);
    const dlpack::Tensor size = read(x);
    args.N = size.shape[0];
    args.H = size.shape[2];
    args.W = size.shape[3];
    if (num_scales < 1 || num_scales > ConvLayer::kMaxScales) {
      throw py::value_error("there must be 1 to 8 scales");
    }
    args.parts = parts;
    if (args.parts < 1 || args.parts > 16 || args.H % args.parts) {
      throw py::value_error("H must be divisible by the parts, of which 16 fit");
    }
    args.H /= args.parts;
    const int64_t unit = int64_t{1} << (num_scales - 1);
    if (args.N < 1 || args.H < 1 || args.W < 1 || args.H % unit || args.W % unit) {
      throw py::value_error("sides must be positive, and be halved for every scale");
    }
    args.num_scales = num_scales;
    for (const py::handle layer : given) {
      layers.push_back(read_layer(layer.cast<py::tuple>(), num_scales));
    }
    if (layers.empty()) throw py::value_error("there must be a layer");
    for (const ConvLayer& layer : layers) {
      if (args.parts == 1) break;
      if (layer.bias_per_location || layer.K / 2 > args.H >> (num_scales - 1)) {
        throw py::value_error("these layers need whole images");
      }
    }
    args.num_layers = static_cast<int>(layers.size());
    args.layers = layers.data();
    if (!given_tail.is_none()) {
      tail = read_tail(given_tail.cast<py::tuple>(), args.N, layers.back().F);
      args.tail = &tail;
    }
    args.dtype = Tensor(x).dtype();
    args.after_sum = after_sum;
    args.slope = slope;
  }
};

template <class Backend>
void bind_conv(py::module_& module) {
  module.attr("MAX_SCALES") = int{ConvLayer::kMaxScales};
  module.def("multiscale_conv", [](const py::object& x, const py::object& out, int num_scales,
                                   int parts, const py::tuple& layers,
                                   const py::object& tail, bool after_sum,
                                   double slope, int64_t execution) {
    ConvCall call(x, num_scales, parts, layers, tail, after_sum, slope);
    call.args.out = images(out);
    py::gil_scoped_release release;
    Backend::run(call.args, execution);
  });
  module.def("multiscale_conv_gradient", [](const py::object& x, const py::object& grad_out,
                                            const py::object& grad_x, int num_scales, int parts,
                                            const py::tuple& layers,
                                            const py::object& tail, bool after_sum,
                                            double slope, int64_t execution) {
    ConvCall call(x, num_scales, parts, layers, tail, after_sum, slope);
    call.args.grad_out = images(grad_out);
    call.args.grad_x = images(grad_x);
    py::gil_scoped_release release;
    Backend::run_gradient(call.args, execution);
  });
}

}  // namespace dpm
