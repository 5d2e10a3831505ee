// Tensors of Python as arguments of the bindings, read through DLPack's C exchange API, which torch
// has since 2.10: no torch headers, and 30 ns a tensor where its methods take 500 ns.
#pragma once

#include <pybind11/pybind11.h>

#include <initializer_list>

#include "args.h"

namespace dpm {

namespace py = pybind11;

// The parts of DLPack's stable ABI (version 1) that are read here, in its names and order.
namespace dlpack {

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  DataType dtype;
  const int64_t* shape;
  const int64_t* strides;
  uint64_t byte_offset;
};

struct ExchangeApi {
  uint32_t major, minor;
  const void* previous;
  void (*allocate)();
  void (*managed_from_py_object)();
  void (*managed_to_py_object)();
  int (*tensor_from_py_object)(void*, Tensor*);
  void (*current_work_stream)();
};

constexpr uint8_t kInt = 0, kFloat = 2, kBfloat = 4;

}  // namespace dlpack

// How torch shows its tensors; the type is kept, for the API takes any object for a tensor.
struct TorchTensors {
  const dlpack::ExchangeApi* api = nullptr;
  PyTypeObject* type;

  TorchTensors() {
    py::object tensor = py::module_::import("torch").attr("Tensor");
    const py::object capsule = py::getattr(tensor, "__dlpack_c_exchange_api__", py::none());
    constexpr const char* name = "dlpack_exchange_api";
    if (PyCapsule_IsValid(capsule.ptr(), name)) {
      api = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), name));
    }
    if (!api || api->major != 1 || !api->tensor_from_py_object) {
      throw py::import_error("this torch has no C exchange API of DLPack 1; 2.10 and later have");
    }
    type = reinterpret_cast<PyTypeObject*>(tensor.release().ptr());
  }

  static const TorchTensors& get() {
    static const TorchTensors tensors;
    return tensors;
  }
};

// Valid as long as the tensor lives and its sizes stay.
inline dlpack::Tensor read(py::handle object) {
  const TorchTensors& tensors = TorchTensors::get();
  if (!PyObject_TypeCheck(object.ptr(), tensors.type)) throw py::type_error("not a tensor");
  dlpack::Tensor tensor;
  if (tensors.api->tensor_from_py_object(object.ptr(), &tensor) != 0) {
    throw py::error_already_set();
  }
  tensor.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  return tensor;
}

// A tensor (N, C, *spatial), (N, D) or (N,), or none. Of (N, D), D is the channels.
struct Tensor {
  void* data = nullptr;
  dlpack::DataType type{};
  int64_t N = 1, C = 1, S = 1;
  int64_t n = 0, c = 1, s = 1;  // strides; s of the spatial dimensions as one
  bool is_collapsible = true;   // or they are not one
  bool is_contiguous = true;

  Tensor() = default;

  explicit Tensor(py::handle object) {
    const dlpack::Tensor from = read(object);
    data = from.data;
    type = from.dtype;
    int64_t run = 1, expected = -1;  // -1: every size so far is 1
    for (int i = from.ndim - 1; i >= 0; --i) {
      const int64_t size = from.shape[i], stride = from.strides[i];
      if (size != 1) is_contiguous = is_contiguous && stride == run;
      run *= size;
      if (i == 0) {
        N = size, n = stride;
      } else if (i == 1) {
        C = size, c = stride;
      } else if (size != 1) {
        if (expected < 0) s = expected = stride;
        is_collapsible = is_collapsible && stride == expected;
        expected *= size;
        S *= size;
      }
    }
    if (from.ndim == 2) s = c;
    is_contiguous = is_contiguous || run == 0;
    if (!data && run != 0) throw py::value_error("a tensor has no memory");
  }

  DType dtype() const {
    if (type.code == dlpack::kFloat && type.bits == 32) return DType::float32;
    if (type.code == dlpack::kBfloat && type.bits == 16) return DType::bfloat16;
    if (type.code == dlpack::kFloat && type.bits == 16) return DType::float16;
    if (type.code == dlpack::kFloat && type.bits == 64) return DType::float64;
    throw py::type_error("a kernel takes float32, bfloat16, float16 or float64");
  }

  // As a kernel reads it beside x, whose sizes it must have; one example may be for all of them.
  Strided like(const Tensor& x) const {
    if (!data) return {};
    if (!is_collapsible) throw py::value_error("spatial dimensions do not collapse into one");
    if ((N != x.N && N != 1) || C != x.C || S != x.S) throw py::value_error("sizes must agree");
    return {data, N == x.N ? n : 0, c, s};
  }

  // The same, of a type.
  Strided like(const Tensor& x, DType required) const {
    if (data && dtype() != required) throw py::type_error("dtypes must agree");
    return like(x);
  }

  // The same, of bytes or booleans.
  Strided bytes_like(const Tensor& x) const {
    if (data && type.bits != 8) throw py::type_error("a mask must be of bytes");
    return like(x);
  }

  // `count` elements of so many bytes each, or none.
  void* array(int64_t count, int bytes) const {
    if (!data) return nullptr;
    if (!is_contiguous || N * C * S != count || type.bits != 8 * bytes) {
      throw py::value_error("an array must be contiguous, and as long and wide as it is read");
    }
    return data;
  }

  template <class T>
  T* array(int64_t count) const {
    return static_cast<T*>(array(count, sizeof(T)));
  }

  // The first or the second half of the channels.
  Tensor half(int index) const {
    Tensor half = *this;
    half.C /= 2;
    half.is_contiguous = false;
    if (data && index) half.data = static_cast<char*>(data) + half.C * c * (type.bits / 8);
    return half;
  }
};

// The shape of x; channels join the spatial elements where every tensor has them in one run.
inline Extent extent(const Tensor& x, std::initializer_list<Tensor> tensors) {
  bool is_one = true;
  for (const Tensor& y : tensors) is_one = is_one && (!y.data || y.C == 1 || y.c == x.S * y.s);
  return is_one ? Extent{x.N, 1, x.C * x.S} : Extent{x.N, x.C, x.S};
}

inline NoiseSource noise_source(int64_t seed, uint32_t stream, const Tensor& ids,
                                const Tensor& t, int64_t N) {
  return {static_cast<uint64_t>(seed), stream, ids.array<int64_t>(N), t.array<int64_t>(N)};
}

// Coefficients (N, columns) beside examples x: double for double, float for all others.
inline void* rows_array(const Tensor& rows, const Tensor& x, int64_t num_columns) {
  return rows.array(x.N * num_columns, x.dtype() == DType::float64 ? 8 : 4);
}

}  // namespace dpm

namespace pybind11::detail {

template <>
struct type_caster<dpm::Tensor> {
  PYBIND11_TYPE_CASTER(dpm::Tensor, const_name("torch.Tensor | None"));
  bool load(handle from, bool) {
    if (from.is_none()) return true;
    if (!PyObject_TypeCheck(from.ptr(), dpm::TorchTensors::get().type)) return false;
    value = dpm::Tensor(from);
    return true;
  }
};

}  // namespace pybind11::detail
