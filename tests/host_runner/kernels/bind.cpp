// The module `proof`: addresses in, as in the modules of dpm_fast.
#include <pybind11/pybind11.h>

#include <type_traits>

#include "kernels.h"

namespace {

// A function whose pointers are given as integers, but for text.
template <class T>
using Argument = std::conditional_t<std::is_pointer_v<T> && !std::is_same_v<T, const char*>,
                                    std::uintptr_t, T>;

template <class T>
T unwrap(Argument<T> argument) {
  if constexpr (std::is_same_v<T, Argument<T>>) {
    return argument;
  } else {
    return reinterpret_cast<T>(argument);
  }
}

template <class... Parameters>
auto by_address(void (*launcher)(Parameters...)) {
  return [launcher](Argument<Parameters>... arguments) {
    launcher(unwrap<Parameters>(arguments)...);
  };
}

}  // namespace

PYBIND11_MODULE(proof, module) {
  module.def("block_sum", by_address(proof::block_sum));
  module.def("reverse", by_address(proof::reverse));
  module.def("count", by_address(proof::count));
  module.def("number", by_address(proof::number));
  module.def("race_between_blocks", by_address(proof::race_between_blocks));
  module.def("many_barriers", by_address(proof::many_barriers));
  module.def("shuffle_int32", by_address(proof::shuffle<int>));
  module.def("shuffle_uint32", by_address(proof::shuffle<unsigned>));
  module.def("shuffle_float32", by_address(proof::shuffle<float>));
  module.def("shuffle_float64", by_address(proof::shuffle<double>));
  module.def("shuffle_int64", by_address(proof::shuffle<long long>));
  module.def("vote", by_address(proof::vote));
  module.def("shuffle_from_exited", by_address(proof::shuffle_from_exited));
  module.def("fault", by_address(proof::fault));
  module.def("uninitialized", by_address(proof::uninitialized));
  module.def("to_half", by_address(proof::to_half));
  module.def("from_half", by_address(proof::from_half));
  module.def("to_bfloat16", by_address(proof::to_bfloat16));
  module.def("from_bfloat16", by_address(proof::from_bfloat16));
  module.def("functions", by_address(proof::functions));
  module.def("bit_functions", by_address(proof::bit_functions));
  module.def("multiply_halves", by_address(proof::multiply_halves));
  module.def("multiply_tf32", by_address(proof::multiply_tf32));
  module.def("round_pairs", by_address(proof::round_pairs));
  module.def("num_multiprocessors", proof::num_multiprocessors);
}
