// Noise of the contract in dpm_fast/noise.py: Philox4x32-10 and Box-Muller.
//
// Group g of an example is its elements 4 g ... 4 g + 3, from counter (g, t | stream << 24, example
// low, example high). CUDA computes a group at a time, a CPU 8, 16 or 32 at once.
#pragma once

#include "args.h"
#include "math.h"

namespace dpm {

constexpr uint64_t kPhiloxMultiplier0 = 0xD2511F53, kPhiloxMultiplier1 = 0xCD9E8D57;
constexpr uint32_t kPhiloxKeyStep0 = 0x9E3779B9, kPhiloxKeyStep1 = 0xBB67AE85;

// What all groups of an example share: the key, and the first two rounds as far as g is not in it.
struct ExampleNoise {
  uint32_t key0, key1;
  uint32_t round1_2;                      // what round 1 adds to word 2
  uint32_t round2_0, round2_2, round2_3;  // what round 2 adds to words 0 and 2, and word 3
};

// Whether t is one that the counter has room for. A CPU refuses others before; a GPU, where looking
// would take a synchronization, makes what they would draw NaN.
DPM_INLINE bool is_timestep(int64_t t) { return t >> 24 == 0; }

// t < 2^24, stream < 256.
DPM_INLINE ExampleNoise example_noise(uint64_t seed, uint32_t stream, uint32_t t,
                                      uint64_t example) {
  const uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  const uint64_t product1 = (example & 0xffffffffu) * kPhiloxMultiplier1;
  const uint32_t word0 = static_cast<uint32_t>(product1 >> 32) ^ (t | stream << 24) ^ key0;
  const uint64_t product0 = word0 * kPhiloxMultiplier0;
  ExampleNoise noise;
  noise.key0 = key0;
  noise.key1 = key1;
  noise.round1_2 = static_cast<uint32_t>(example >> 32) ^ key1;
  noise.round2_0 = static_cast<uint32_t>(product1) ^ (key0 + kPhiloxKeyStep0);
  noise.round2_2 = static_cast<uint32_t>(product0 >> 32) ^ (key1 + kPhiloxKeyStep1);
  noise.round2_3 = static_cast<uint32_t>(product0);
  return noise;
}

DPM_INLINE ExampleNoise example_noise(const NoiseSource& source, int64_t n) {
  return example_noise(source.seed, source.stream, static_cast<uint32_t>(source.t[n]),
                       static_cast<uint64_t>(source.example_ids[n]));
}

// Product of the low halves of 64-bit lanes.
DPM_INLINE uint64_t multiply_low(uint64_t a, uint64_t b) { return (a & 0xffffffffu) * b; }

#if !defined(__CUDACC__)
template <class V>
DPM_INLINE V multiply_low(V a, uint64_t b) {
#if defined(__AVX512F__)  // the unmasked intrinsic of GCC 12 warns of a variable of its own
  return reinterpret_cast<V>(_mm512_maskz_mul_epu32(
      0xff, reinterpret_cast<__m512i>(a), _mm512_set1_epi64(static_cast<int64_t>(b))));
#elif defined(__AVX2__)
  return reinterpret_cast<V>(
      _mm256_mul_epu32(reinterpret_cast<__m256i>(a), _mm256_set1_epi64x(static_cast<int64_t>(b))));
#elif defined(__SSE2__)
  return reinterpret_cast<V>(
      _mm_mul_epu32(reinterpret_cast<__m128i>(a), _mm_set1_epi64x(static_cast<int64_t>(b))));
#else
  return (a & 0xffffffffu) * b;
#endif
}
template <class V>
DPM_INLINE Pair<V> multiply_low(Pair<V> a, uint64_t b) {
  return {multiply_low(a.low, b), multiply_low(a.high, b)};
}
#endif

// Four words in the low halves of 64-bit lanes; the high halves hold anything.
template <class W>
struct Words {
  W w0, w1, w2, w3;
};

// The same of groups of several examples, lane by lane.
template <class W>
struct LaneNoise {
  uint32_t key0, key1;
  W round1_2, round2_0, round2_2, round2_3;
};

DPM_INLINE uint64_t wide(uint32_t x) { return x; }
template <class W>
DPM_INLINE W wide(W x) {
  return x;
}

// W is uint64_t or u64x8, Noise is ExampleNoise or LaneNoise<W>.
template <class Noise, class W>
DPM_INLINE Words<W> philox(const Noise& noise, W group) {
  W product0 = multiply_low(group, kPhiloxMultiplier0);
  W w2 = (product0 >> 32) ^ wide(noise.round1_2);
  W product1 = multiply_low(w2, kPhiloxMultiplier1);
  Words<W> w = {(product1 >> 32) ^ wide(noise.round2_0), product1,
                product0 ^ wide(noise.round2_2), splat<W>(wide(noise.round2_3))};
  uint32_t key0 = noise.key0 + kPhiloxKeyStep0, key1 = noise.key1 + kPhiloxKeyStep1;
  DPM_UNROLL
  for (int round = 3; round <= 10; ++round) {
    key0 += kPhiloxKeyStep0;
    key1 += kPhiloxKeyStep1;
    product0 = multiply_low(w.w0, kPhiloxMultiplier0);
    product1 = multiply_low(w.w2, kPhiloxMultiplier1);
    w = {(product1 >> 32) ^ w.w1 ^ uint64_t{key0}, product1,
         (product0 >> 32) ^ w.w3 ^ uint64_t{key1}, product0};
  }
  return w;
}

// In [2^-33, 1], rounded to nearest as the contract says.
template <class T>
DPM_INLINE T uniform_of_word(UnsignedOf<T> word) {
  return convert<T>(word) * 0x1p-32f + 0x1p-33f;
}

// Within 2e-6 of the formula in float64 for any two words, and mostly within 3e-7.
template <class T>
DPM_INLINE CosSin<T> box_muller(UnsignedOf<T> radius_word, UnsignedOf<T> angle_word) {
  const T radius = sqrt_fast(-2.0f * log_unit(uniform_of_word<T>(radius_word)));
  const auto [cos, sin] = cos_sin_of_turns(uniform_of_word<T>(angle_word));
  return {radius * cos, radius * sin};
}

template <class T>
struct Group {
  T x[4];
};

DPM_INLINE Group<uint32_t> words4(const ExampleNoise& noise, uint32_t group) {
  const Words<uint64_t> w = philox(noise, uint64_t{group});
  return {{static_cast<uint32_t>(w.w0), static_cast<uint32_t>(w.w1), static_cast<uint32_t>(w.w2),
           static_cast<uint32_t>(w.w3)}};
}

DPM_INLINE Group<float> uniforms4(const ExampleNoise& noise, uint32_t group) {
  const Group<uint32_t> w = words4(noise, group);
  return {{uniform_of_word<float>(w.x[0]), uniform_of_word<float>(w.x[1]),
           uniform_of_word<float>(w.x[2]), uniform_of_word<float>(w.x[3])}};
}

DPM_INLINE Group<float> normals4(const ExampleNoise& noise, uint32_t group) {
  const Group<uint32_t> w = words4(noise, group);
  const CosSin<float> a = box_muller<float>(w.x[0], w.x[1]);
  const CosSin<float> b = box_muller<float>(w.x[2], w.x[3]);
  return {{a.cos, a.sin, b.cos, b.sin}};
}

#if !defined(__CUDACC__)

// T = f32x16 computes 8 groups, Pair<f32x16> 16, Pair<Pair<f32x16>> 32, each of 4 elements. Rounds
// are a chain of dependent operations: more groups at once keep the processor busy, at 32 (AVX-512,
// Zen 4) by 12 % more than at 16, as long as there are registers for them.
#if defined(__AVX512F__)
using f32_block = Pair<Pair<f32x16>>;
#elif defined(__AVX2__)
using f32_block = Pair<f32x16>;
#else
using f32_block = f32x16;
#endif
template <class T>
constexpr int kBlockOf = 2 * sizeof(T) / sizeof(float);
constexpr int kBlock = kBlockOf<f32_block>;

template <class T>
struct Counters;
template <>
struct Counters<f32x16> {
  using type = u64x8;
};
template <class V>
struct Counters<Pair<V>> {
  using type = Pair<typename Counters<V>::type>;
};

// Words (0, 1) and (2, 3) of each group: the first of a pair, and the second.
template <class T>
struct WordPairs {
  UnsignedOf<T> first, second;
};

template <class T, class Noise>
DPM_INLINE WordPairs<T> word_pairs(const Noise& noise, typename Counters<T>::type groups) {
  const auto w = philox(noise, groups);
  constexpr uint64_t low = 0xffffffffu;
  return {bits<UnsignedOf<T>>((w.w0 & low) | (w.w2 << 32)),
          bits<UnsignedOf<T>>((w.w1 & low) | (w.w3 << 32))};
}

template <class T>
DPM_INLINE WordPairs<T> word_pairs(const ExampleNoise& noise, uint32_t group) {
  static constexpr uint64_t numbers[32] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10,
                                           11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21,
                                           22, 23, 24, 25, 26, 27, 28, 29, 30, 31};
  return word_pairs<T>(noise, load<typename Counters<T>::type>(numbers) + uint64_t{group});
}

// Elements in order from element 4 group on: 32, 64 or 128 of them. Or those of each lane's group.
template <class T, class Noise, class G>
DPM_INLINE Pair<UnsignedOf<T>> words(const Noise& noise, G group) {
  const WordPairs<T> w = word_pairs<T>(noise, group);
  return interleave(w.first, w.second);
}

template <class T, class Noise, class G>
DPM_INLINE Pair<T> uniforms(const Noise& noise, G group) {
  return uniform_of_word<Pair<T>>(words<T>(noise, group));
}

template <class T, class Noise, class G>
DPM_INLINE Pair<T> normals(const Noise& noise, G group) {
  const WordPairs<T> w = word_pairs<T>(noise, group);
  const CosSin<T> z = box_muller<T>(w.first, w.second);
  return interleave(z.cos, z.sin);
}

// The groups of a block, of neighboring examples: the first `num_groups` of each, for events too small
// to fill the lanes.
struct ManyExamples {
  using W = Counters<f32_block>::type;
  static constexpr int kLanes = kBlock / 4;

  LaneNoise<W> noise;
  W groups;

  DPM_INLINE ManyExamples(const NoiseSource& source, int64_t first, int64_t end, int num_groups) {
    uint64_t lanes[5][kLanes] = {};
    int lane = 0;
    for (int64_t n = first; n < end; ++n) {
      const ExampleNoise example = example_noise(source, n);
      for (int group = 0; group < num_groups; ++group, ++lane) {
        lanes[0][lane] = example.round1_2;
        lanes[1][lane] = example.round2_0;
        lanes[2][lane] = example.round2_2;
        lanes[3][lane] = example.round2_3;
        lanes[4][lane] = static_cast<uint64_t>(group);
      }
    }
    noise = {static_cast<uint32_t>(source.seed), static_cast<uint32_t>(source.seed >> 32),
             load<W>(lanes[0]), load<W>(lanes[1]), load<W>(lanes[2]), load<W>(lanes[3])};
    groups = load<W>(lanes[4]);
  }
};

// What fill() makes.
struct RandomWords {
  using Element = uint32_t;
  template <class T, class... At>
  static DPM_INLINE auto compute(const At&... at) {
    return words<T>(at...);
  }
};
struct Uniforms {
  using Element = float;
  template <class T, class... At>
  static DPM_INLINE auto compute(const At&... at) {
    return uniforms<T>(at...);
  }
};
struct Normals {
  using Element = float;
  template <class T, class... At>
  static DPM_INLINE auto compute(const At&... at) {
    return normals<T>(at...);
  }
};

// `count` elements of an example from 4 group on; the last block is written whole, which is 32
// elements or more, in all no more than the next multiple of kBlock.
template <class Random, class T = f32_block>
DPM_INLINE void fill_blocks(const ExampleNoise& noise, uint32_t group, int64_t count,
                            typename Random::Element* out) {
  constexpr int block = kBlockOf<T>;
  constexpr bool smallest = std::is_same_v<T, f32x16>;
  for (; count > (smallest ? 0 : block / 2); count -= block, group += block / 4, out += block) {
    store(out, Random::template compute<T>(noise, group));
  }
  if constexpr (!smallest) fill_blocks<Random, decltype(T::low)>(noise, group, count, out);
}

// kBlock elements.
template <class Random>
DPM_INLINE void fill_blocks(const ManyExamples& many, typename Random::Element* out) {
  store(out, Random::template compute<f32_block>(many.noise, many.groups));
}

// `count` elements of an example from 4 group on and no more.
template <class Random>
DPM_INLINE void fill(const ExampleNoise& noise, uint32_t group, int64_t count,
                     typename Random::Element* out) {
  const int64_t whole = count & ~int64_t{kBlock - 1};
  fill_blocks<Random>(noise, group, whole, out);
  typename Random::Element last[kBlock];
  fill_blocks<Random>(noise, group + static_cast<uint32_t>(whole / 4), count - whole, last);
  for (int64_t i = whole; i < count; ++i) out[i] = last[i - whole];
}

#endif

}  // namespace dpm
