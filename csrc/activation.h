// What follows a linear layer: the activations of dpm_fast.networks, element by element.
#pragma once

#include "math.h"

namespace dpm {

// Numbered as ACTIVATIONS of dpm_fast/ops/trajectory.py.
enum class Activation : int { linear, relu, leaky_relu, tanh, silu, gelu, softplus };

// Those that take an instruction or two, which a layer does as it stores its sums.
DPM_INLINE bool is_cheap(Activation activation) {
  return activation <= Activation::leaky_relu;
}

// visit(f) with the function f of a cheap activation.
template <class Visit>
DPM_INLINE void with_cheap_activation(Activation activation, float slope, Visit visit) {
  switch (activation) {
    case Activation::relu: return visit([](auto x) { return max(x, decltype(x){}); });
    case Activation::leaky_relu:
      return visit([slope](auto x) { return select(x > 0.0f, x, x * slope); });
    default: return visit([](auto x) { return x; });
  }
}

// The same of the others.
template <class Visit>
DPM_INLINE void with_activation(Activation activation, Visit visit) {
  switch (activation) {
    case Activation::tanh: return visit([](auto x) { return tanh(x); });
    case Activation::silu: return visit([](auto x) { return x * sigmoid(x); });
    case Activation::gelu: return visit([](auto x) { return x * normal_cdf(x); });
    case Activation::softplus: return visit([](auto x) { return softplus(x); });
    default: return;
  }
}

}  // namespace dpm
