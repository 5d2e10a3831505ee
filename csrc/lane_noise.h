// Noise of 16 examples that are the lanes of vectors: [elements][16 examples].
#pragma once

#include "philox.h"

namespace dpm {

// What the counters of 16 examples have in common for all t: the first round as far as it goes.
// Even examples come before odd ones, so that two 64-bit lanes are a pair of 32-bit lanes in order.
class LaneExamples {
 public:
  using Wide = Pair<u64x8>;

  // Lanes past `count` have numbers that nobody uses.
  DPM_INLINE LaneExamples(uint64_t seed, const int64_t* ids, int count)
      : key0_(static_cast<uint32_t>(seed)), key1_(static_cast<uint32_t>(seed >> 32)) {
    const Wide example = in_lanes(ids, count);
    round1_2_ = (example >> 32) ^ uint64_t{key1_};
    product1_ = multiply_low(example, kPhiloxMultiplier1);
  }

  // t < 2^24, stream < 256.
  DPM_INLINE LaneNoise<Wide> at(uint32_t stream, uint32_t t) const {
    return at(splat<Wide>(uint64_t{t | stream << 24}));
  }
  DPM_INLINE LaneNoise<Wide> at(uint32_t stream, const int64_t* t, int count) const {
    return at(in_lanes(t, count) | uint64_t{stream << 24});
  }

 private:
  static DPM_INLINE Wide in_lanes(const int64_t* values, int count) {
    uint64_t lanes[16] = {};
    for (int i = 0; i < count; ++i) lanes[i / 2 + i % 2 * 8] = static_cast<uint64_t>(values[i]);
    return load<Wide>(lanes);
  }

  DPM_INLINE LaneNoise<Wide> at(Wide counter) const {
    const Wide word0 = (product1_ >> 32) ^ counter ^ uint64_t{key0_};
    const Wide product0 = multiply_low(word0, kPhiloxMultiplier0);
    return {key0_, key1_, round1_2_, product1_ ^ uint64_t{key0_ + kPhiloxKeyStep0},
            (product0 >> 32) ^ uint64_t{key1_ + kPhiloxKeyStep1}, product0};
  }

  uint32_t key0_, key1_;
  Wide round1_2_, product1_;
};

DPM_INLINE u32x16 in_order(LaneExamples::Wide word) {
  return bits<u32x16>((word.low & uint64_t{0xffffffff}) | (word.high << 32));
}

// Two elements from two words, as Normals and Uniforms have them.
template <class Random>
DPM_INLINE Pair<f32x16> lane_elements(LaneExamples::Wide first, LaneExamples::Wide second) {
  if constexpr (std::is_same_v<Random, Normals>) {
    const CosSin<f32x16> z = box_muller<f32x16>(in_order(first), in_order(second));
    return {z.cos, z.sin};
  } else {
    static_assert(std::is_same_v<Random, Uniforms>);
    return {uniform_of_word<f32x16>(in_order(first)), uniform_of_word<f32x16>(in_order(second))};
  }
}

// The elements of an event, [count][16]; up to three more are written. Apart from the code that uses
// them: both then have the registers for themselves.
template <class Random>
static __attribute__((noinline)) void fill_lanes(const LaneNoise<LaneExamples::Wide>& noise,
                                                 int64_t count, float* out) {
  for (int64_t first = 0; first < count; first += 4, out += 4 * 16) {
    const auto w = philox(noise, splat<LaneExamples::Wide>(uint64_t(first / 4)));
    store(out, lane_elements<Random>(w.w0, w.w1));
    if (count - first > 2) store(out + 2 * 16, lane_elements<Random>(w.w2, w.w3));
  }
}

}  // namespace dpm
