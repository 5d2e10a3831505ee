// What csrc/math.h, storage.h and philox.h compute, on arrays, for tests/test_native_math.py.
#include <algorithm>
#include <vector>

#include "philox.h"
#include "storage.h"

using namespace dpm;

// name_lanes: sixteen at once, name_scalar: one float, name_double: one double.
#define PROBE(name)                                                       \
  extern "C" void name##_lanes(const float* x, float* y, int64_t n) {     \
    for (int64_t i = 0; i < n; i += 16) {                                 \
      const int count = static_cast<int>(std::min<int64_t>(16, n - i));   \
      store16(y + i, dpm::name(load16(x + i, 1, count, 0.5f)), 1, count); \
    }                                                                     \
  }                                                                       \
  extern "C" void name##_scalar(const float* x, float* y, int64_t n) {    \
    for (int64_t i = 0; i < n; ++i) y[i] = dpm::name(x[i]);               \
  }                                                                       \
  extern "C" void name##_double(const double* x, double* y, int64_t n) {  \
    for (int64_t i = 0; i < n; ++i) y[i] = dpm::name(x[i]);               \
  }
PROBE(abs)
PROBE(sqrt)
PROBE(exp)
PROBE(exp2_of_negative)
PROBE(expm1)
PROBE(expm1_minus_identity)
PROBE(log)
PROBE(log1p)
PROBE(sigmoid)
PROBE(softplus)
PROBE(tanh)
PROBE(normal_cdf)

extern "C" void clamp_lanes(const float* x, float* y, float low, float high) {
  store16(y, min(max(load16(x), splat<f32x16>(low)), splat<f32x16>(high)));
}

extern "C" double sum_as_double(const float* x) {
  const f64x16 wide = to_double(load16(x));
  return sum(wide.low + wide.high);
}

// Storage types: conversions by lanes and by scalars, and strided or partial loads and stores.
#define STORAGE_PROBE(name, Storage)                                                               \
  extern "C" void name##_to_float_lanes(const Storage* x, float* y, int64_t n) {                   \
    for (int64_t i = 0; i < n; i += 16) store16(y + i, load16(x + i));                             \
  }                                                                                                \
  extern "C" void name##_to_float_scalar(const Storage* x, float* y, int64_t n) {                  \
    for (int64_t i = 0; i < n; ++i) y[i] = to_float(x[i]);                                         \
  }                                                                                                \
  extern "C" void name##_from_float_lanes(const float* x, Storage* y, int64_t n) {                 \
    for (int64_t i = 0; i < n; i += 16) store16(y + i, load16(x + i));                             \
  }                                                                                                \
  extern "C" void name##_from_float_scalar(const float* x, Storage* y, int64_t n) {                \
    for (int64_t i = 0; i < n; ++i) y[i] = from_float<Storage>(x[i]);                              \
  }                                                                                                \
  extern "C" void name##_load(const Storage* x, int64_t stride, int count, float fill, float* y) { \
    store16(y, load16(x, stride, count, fill));                                                    \
  }                                                                                                \
  extern "C" void name##_store(const float* x, int64_t stride, int count, Storage* y) {            \
    store16(y, load16(x), stride, count);                                                          \
  }
STORAGE_PROBE(float32, float)
STORAGE_PROBE(bfloat16, bf16)
STORAGE_PROBE(float16, f16)

// Elements of an example: all of them as a CPU fills them, by groups of four as CUDA does, and 64
// from a group on, as those of a later chunk.
#define NOISE_PROBE(name, Element, fill, four)                                                  \
  extern "C" void name##_filled(uint64_t seed, uint32_t stream, uint32_t t, uint64_t example,   \
                                int64_t count, Element* out) {                                  \
    fill(example_noise(seed, stream, t, example), 0, count, out);                                  \
  }                                                                                             \
  extern "C" void name##_by_group(uint64_t seed, uint32_t stream, uint32_t t, uint64_t example, \
                                  uint32_t first, int64_t num_groups, Element* out) {           \
    const ExampleNoise noise = example_noise(seed, stream, t, example);                         \
    for (int64_t i = 0; i < num_groups; ++i) {                                                  \
      const Group<Element> group = four(noise, first + static_cast<uint32_t>(i));               \
      std::copy(group.x, group.x + 4, out + 4 * i);                                             \
    }                                                                                           \
  }
NOISE_PROBE(words, uint32_t, fill<RandomWords>, words4)
NOISE_PROBE(uniforms, float, fill<Uniforms>, uniforms4)
NOISE_PROBE(normals, float, fill<Normals>, normals4)

extern "C" void filled_from(uint64_t seed, uint32_t stream, uint32_t t, uint64_t example,
                            uint32_t group, float* uniforms, float* normals) {
  const ExampleNoise noise = example_noise(seed, stream, t, example);
  fill_blocks<Uniforms>(noise, group, 64, uniforms);
  fill_blocks<Normals>(noise, group, 64, normals);
}

struct BoxMullerErrors {
  double log_relative;   // of log_unit
  double radius;         // of sqrt(-2 ln u)
  double cos_sin;        // of cos and sin
  double normal;         // bound for radius times cos or sin, whichever the two words are
  int64_t num_uniforms;  // different u among all words
};

// Over all 2^32 words; each u, which many words share, is computed once.
extern "C" void box_muller_errors(BoxMullerErrors* errors) {
  *errors = {};
  std::vector<float> uniforms;
  float last = 0.0f;
  for (uint64_t word = 0; word < uint64_t{1} << 32; word += 16) {
    float u[16];
    for (int i = 0; i < 16; ++i) u[i] = uniform_of_word<float>(static_cast<uint32_t>(word) + i);
    if (u[0] == last && u[15] == last) continue;  // u never decreases
    for (const float x : u) {
      if (x != last) uniforms.push_back(last = x);
    }
  }
  errors->num_uniforms = static_cast<int64_t>(uniforms.size());
  while (uniforms.size() % 16) uniforms.push_back(last);

  double largest_radius = 0.0;
  for (size_t i = 0; i < uniforms.size(); i += 16) {
    const f32x16 u = load16(&uniforms[i]);
    const f32x16 log = log_unit(u), radius = sqrt_fast(-2.0f * log);
    const CosSin<f32x16> turn = cos_sin_of_turns(u);
    for (int k = 0; k < 16; ++k) {
      const float one = uniforms[i + k];
      const double exact_log = std::log(double{one});
      const double exact_radius = std::sqrt(-2.0 * exact_log);
      const double angle = 2.0 * 3.14159265358979323846 * one;
      const double log_error = std::fabs(log[k] - exact_log);
      if (log_error > 0.0) {
        errors->log_relative = std::max(errors->log_relative, log_error / -exact_log);
      }
      errors->radius = std::max(errors->radius, std::fabs(radius[k] - exact_radius));
      largest_radius = std::max(largest_radius, exact_radius);
      errors->cos_sin = std::max({errors->cos_sin, std::fabs(turn.cos[k] - std::cos(angle)),
                                  std::fabs(turn.sin[k] - std::sin(angle))});
    }
  }
  // The last term is the rounding of the product, half the spacing of floats in [4, 8).
  errors->normal = errors->radius * (1.0 + errors->cos_sin) + largest_radius * errors->cos_sin +
                   0x1p-22;
}
