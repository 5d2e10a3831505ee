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

// Whether a tensor is contiguous and has these sizes.
inline bool has_sizes(const dlpack::Tensor& tensor, std::initializer_list<int64_t> sizes) {
  if (tensor.ndim != static_cast<int>(sizes.size())) return false;
  bool is_contiguous = true;
  int64_t count = 1;
  for (int i = tensor.ndim - 1; i >= 0; --i) {
    const int64_t size = sizes.begin()[i];
    if (tensor.shape[i] != size) return false;
    is_contiguous = is_contiguous && (size == 1 || tensor.strides[i] == count);
    count *= size;
  }
  return is_contiguous || count == 0;
}

// A tensor of this type and these sizes; or none, which an empty vector stands for too.
inline void* array(py::handle object, dlpack::DataType type, std::initializer_list<int64_t> sizes) {
  if (object.is_none()) return nullptr;
  const dlpack::Tensor tensor = read(object);
  if (tensor.ndim == 1 && tensor.shape[0] == 0) return nullptr;
  if (tensor.dtype.code != type.code || tensor.dtype.bits != type.bits ||
      !has_sizes(tensor, sizes)) {
    throw py::value_error("tensors must be contiguous, of one type and as large as they are read");
  }
  return tensor.data;
}

// What is the same for all layers of a stack.
struct StackSizes {
  int num_scales;
  int64_t H, W;
  dlpack::DataType type;
};

inline int64_t size_of(const dlpack::Tensor& tensor, int i) {
  return i < tensor.ndim ? tensor.shape[i] : 0;
}

// Images (N, channels, H, W) of the type of all, or None.
inline void check_images(py::handle object, const StackSizes& sizes, int64_t N, int64_t channels) {
  if (object.is_none()) return;
  const dlpack::Tensor tensor = read(object);
  if (tensor.dtype.code != sizes.type.code || tensor.dtype.bits != sizes.type.bits ||
      tensor.ndim != 4 || tensor.shape[0] != N || tensor.shape[1] != channels ||
      tensor.shape[2] != sizes.H || tensor.shape[3] != sizes.W) {
    throw py::value_error("images must be of one type and as large as they are read");
  }
}

// A layer on C channels. What it keeps is looked at by `ConvCall`.
inline ConvLayer read_layer(const py::tuple& given, const StackSizes& sizes, int64_t C) {
  if (given.size() != 6) throw py::value_error("a layer must be a tuple of 6");
  const auto weights = given[0].cast<py::tuple>(), biases = given[1].cast<py::tuple>();
  const size_t num_scales = static_cast<size_t>(sizes.num_scales);
  for (int kind = 0; kind < 4; ++kind) {
    if (given[kind].is_none() && kind >= 2) continue;
    if (given[kind].cast<py::tuple>().size() != num_scales) {
      throw py::value_error("a layer must have one tensor per scale");
    }
  }
  ConvLayer layer{};
  const dlpack::Tensor weight = read(weights[0]);
  const int64_t F = layer.F = size_of(weight, 0), K = layer.K = size_of(weight, 2);
  layer.C = C;
  if (F < 1 || C < 1 || K % 2 == 0) throw py::value_error("channels and kernels must have a size");
  layer.bias_per_location = read(biases[0]).ndim > 1;
  for (int s = 0; s < sizes.num_scales; ++s) {
    const auto parameter = [&](int kind, std::initializer_list<int64_t> shape) -> void* {
      if (given[kind].is_none()) return nullptr;
      return array(given[kind].cast<py::tuple>()[s], sizes.type, shape);
    };
    const auto bias = [&](int kind) {
      if (!layer.bias_per_location) return parameter(kind, {F});
      return parameter(kind, {F, sizes.H >> s, sizes.W >> s});
    };
    layer.weights[s] = parameter(0, {F, C, K, K});
    layer.biases[s] = bias(1);
    layer.grad_weights[s] = parameter(2, {F, C, K, K});
    layer.grad_biases[s] = bias(3);
    if (!layer.weights[s] || !layer.biases[s]) throw py::value_error("there must be parameters");
  }
  return layer;
}

// Of a tail with tail.P channels so far.
inline void read_pixel_layers(const py::tuple& given, dlpack::DataType type, Tail& tail) {
  for (const py::handle layer : given) {
    if (tail.num_layers == Tail::kMaxLayers) throw py::value_error("too many layers of each pixel");
    const auto parts = layer.cast<py::tuple>();
    if (parts.size() != 4) throw py::value_error("a layer of each pixel must be a tuple of 4");
    const int64_t C = tail.P, F = size_of(read(parts[0]), 0);
    tail.layers[tail.num_layers++] = {
        C, F, array(parts[0], type, {F, C}), array(parts[1], type, {F}),
        array(parts[2], type, {F, C}), array(parts[3], type, {F})};
    tail.P = F;
  }
}

inline Tail read_tail(const py::tuple& given, const StackSizes& sizes, int64_t N,
                      int64_t channels) {
  if (given.size() != 7) throw py::value_error("a tail must be a tuple of 7");
  Tail tail{};
  tail.beside = images(given[0]);
  tail.grad_beside = images(given[4]);
  if (tail.beside.data) {
    tail.K = size_of(read(given[0]), 1);
    check_images(given[0], sizes, N, tail.K);
    check_images(given[4], sizes, N, tail.K);
  }
  tail.P = channels + tail.K;
  read_pixel_layers(given[1].cast<py::tuple>(), sizes.type, tail);
  dlpack::DataType wide = sizes.type;
  if (wide.bits < 32) wide = {dlpack::kFloat, 32, 1};
  tail.O = size_of(read(given[2]), 1);
  const int64_t O = tail.O, P = tail.P;
  tail.weight = array(given[2], wide, {N, O, P});
  tail.bias = array(given[3], wide, {N, O});
  tail.grad_weight = array(given[5], wide, {N, O, P});
  tail.grad_bias = array(given[6], wide, {N, O});
  return tail;
}

// What both signatures begin with. All sizes are looked at, which keeps a launcher within its tensors.
struct ConvCall {
  StackSizes sizes;
  std::vector<ConvLayer> layers;
  Tail tail{};
  MultiscaleConvArgs args{};

  ConvCall(py::handle x, int num_scales, int parts, const py::tuple& given,
           py::handle given_tail, bool after_sum, double slope) {
    args.x = images(x);
    const dlpack::Tensor size = read(x);
    sizes = {num_scales, size.shape[2], size.shape[3], size.dtype};
    args.N = size.shape[0];
    args.H = sizes.H;
    args.W = sizes.W;
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
    int64_t channels = size.shape[1];
    for (const py::handle layer : given) {
      layers.push_back(read_layer(layer.cast<py::tuple>(), sizes, channels));
      channels = layers.back().F;
    }
    if (layers.empty()) throw py::value_error("there must be a layer");
    read_kept(given);
    for (const ConvLayer& layer : layers) {
      if (args.parts == 1) break;
      if (layer.bias_per_location || layer.K / 2 > args.H >> (num_scales - 1)) {
        throw py::value_error("these layers need whole images");
      }
    }
    args.num_layers = static_cast<int>(layers.size());
    args.layers = layers.data();
    if (!given_tail.is_none()) {
      tail = read_tail(given_tail.cast<py::tuple>(), sizes, args.N, channels);
      args.tail = &tail;
    }
    args.dtype = Tensor(x).dtype();
    args.after_sum = after_sum;
    args.slope = slope;
  }
  ConvCall(const ConvCall&) = delete;

  // Images that come out.
  Images outputs(py::handle object) const {
    check_images(object, sizes, args.N, args.tail ? tail.O : layers.back().F);
    return images(object);
  }

  // What a gradient needs of the layers.
  void check_kept() const {
    for (size_t l = 0; l < layers.size(); ++l) {
      const bool is_last = l + 1 == layers.size() && !args.tail && !args.after_sum;
      if ((!is_last && !layers[l].out) || (!args.after_sum && !layers[l].signs)) {
        throw py::value_error("layers must have kept their outputs and signs");
      }
    }
  }

 private:
  void read_kept(const py::tuple& given) {
    int64_t halo = 0, pixels = 0;
    for (const ConvLayer& layer : layers) halo = layer.K / 2 < halo ? halo : layer.K / 2;
    for (int s = 0; s < args.num_scales; ++s) pixels += (args.H >> s) * (args.W >> s);
    const int64_t images = 16 / args.parts, groups = (args.N + images - 1) / images;
    dlpack::DataType wide = sizes.type;
    if (wide.bits < 32) wide = {dlpack::kFloat, 32, 1};
    for (size_t l = 0; l < layers.size(); ++l) {
      const auto layer = given[l].cast<py::tuple>();
      const int64_t F = layers[l].F;
      layers[l].out = array(layer[4], wide, {groups, args.H + 2 * halo, args.W + 2 * halo, F, 16});
      layers[l].signs = static_cast<uint16_t*>(
          array(layer[5], {dlpack::kInt, 16, 1}, {groups, pixels * F}));
    }
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
    call.args.out = call.outputs(out);
    py::gil_scoped_release release;
    Backend::run(call.args, execution);
  });
  module.def("multiscale_conv_gradient", [](const py::object& x, const py::object& grad_out,
                                            const py::object& grad_x, int num_scales, int parts,
                                            const py::tuple& layers,
                                            const py::object& tail, bool after_sum,
                                            double slope, int64_t execution) {
    ConvCall call(x, num_scales, parts, layers, tail, after_sum, slope);
    call.check_kept();
    call.args.grad_out = call.outputs(grad_out);
    check_images(grad_x, call.sizes, call.args.N, call.layers[0].C);
    call.args.grad_x = images(grad_x);
    py::gil_scoped_release release;
    Backend::run_gradient(call.args, execution);
  });
}

}  // namespace dpm
