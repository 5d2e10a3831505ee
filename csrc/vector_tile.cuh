// A tile of examples of a network of vectors in the shared memory of a block, and what the block does
// to it: device functions for kernels that keep it there. A barrier lies between two of them that touch
// the same rows, and is the caller's where it is not said.
//
// Examples are neighbors in shared memory, [row][example]: lanes of a warp read neighbors, and all
// the same weights. A sum is taken by one thread in the order of its terms, whatever the tile, so that
// results depend on neither the batch nor the device.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "mma.cuh"
#include "process.cuh"
#include "resident_network.h"

namespace dpm {

constexpr int kMostThreads = 512;  // of a block; two of them, with 64 registers a thread, fit
constexpr int kLeastThreads = 128;

// What a kernel is given of it.
struct VectorTiles {
  ResidentNetwork network;
  const float *centers, *scales;
  Activation activation;
  float slope;
  int num_examples;  // of a tile
  int num_threads, num_places;  // of a block, and how many the GPU holds at a time

  // Of N examples, cut into tiles that fill the GPU, if each goes into so many blocks.
  VectorTiles(int64_t N, int64_t blocks_of_each, const NetworkArgs& given,
              const ResidentNetwork& resident);

  std::size_t bytes() const { return static_cast<std::size_t>(network.bytes(num_examples)); }
};

// visit(row, example) of each place of so many rows, by the threads of a block in turn, or from the
// last one on.
template <class Visit>
__device__ __forceinline__ void for_places(int num_rows, int num_examples, Visit visit,
                                           bool from_last = false) {
  const unsigned rank = from_last ? blockDim.x - 1 - threadIdx.x : threadIdx.x;
  for (unsigned i = rank; i < static_cast<unsigned>(num_rows * num_examples); i += blockDim.x) {
    const unsigned row = i / static_cast<unsigned>(num_examples);
    visit(static_cast<int>(row), static_cast<int>(i - row * num_examples));
  }
}

// (outputs, inputs) to [input][column]. Lanes write neighbors; what they read are a few sectors.
__device__ __forceinline__ void copy_transposed(const float* from, int inputs, int outputs,
                                                int columns, float* to) {
  for_places(inputs, columns, [&](int k, int o) {
    float* const place = to + k * columns + o;
    if (o < outputs) {
      copy_later(place, from + int64_t{o} * inputs + k);
    } else {
      *place = 0.0f;
    }
  });
}

// Parameters for all timesteps, or for t.
template <bool kTimed>
__device__ __forceinline__ void copy_layers(const ResidentNetwork& network, int64_t t, float* to) {
  for (int l = 0; l < network.num_layers; ++l) {
    const ResidentDense& layer = network.layers[l];
    const TimedDense& from = layer.given;
    const int inputs = static_cast<int>(from.inputs), outputs = static_cast<int>(from.outputs);
    if ((from.weights_step != 0) == kTimed) {
      copy_transposed(from.weights + t * from.weights_step, inputs, outputs, layer.columns,
                      to + layer.weights);
    }
    if ((from.bias_step != 0) == kTimed) {
      copy_transposed(from.bias + t * from.bias_step, 1, outputs, layer.columns, to + layer.bias);
    }
  }
}

template <int kCount>
__device__ __forceinline__ void load_quad(const float* from, float (&to)[kCount]) {
  if constexpr (kCount == kQuad) {
    const float4 quad = *reinterpret_cast<const float4*>(from);
    to[0] = quad.x, to[1] = quad.y, to[2] = quad.z, to[3] = quad.w;
  } else {
    static_assert(kCount == 1);
    to[0] = *from;
  }
}

template <int kCount>
__device__ __forceinline__ void store_quad(const float (&from)[kCount], float* to) {
  if constexpr (kCount == kQuad) {
    *reinterpret_cast<float4*>(to) = make_float4(from[0], from[1], from[2], from[3]);
  } else {
    *to = from[0];
  }
}

struct Dense {
  int inputs, outputs, columns;
  const float *weights, *bias;  // [input][column] and [column]
  Activation activation;
  float slope;
};

// So many outputs of so many examples at a time by a thread.
template <int kOutputs, int kExamples>
__device__ __forceinline__ void dense_of_blocks(const Dense& layer, const float* in,
                                                int num_examples, float* out) {
  const int rows = kOutputs == 1 ? layer.outputs : layer.columns / kOutputs;
  for_places(rows, num_examples / kExamples, [&](int row, int group) {
    const float* weights = layer.weights + row * kOutputs;
    const float* from = in + group * kExamples;
    float sum[kOutputs][kExamples], bias[kOutputs];
    load_quad(layer.bias + row * kOutputs, bias);
    DPM_UNROLL
    for (int o = 0; o < kOutputs; ++o) {
      DPM_UNROLL
      for (int e = 0; e < kExamples; ++e) sum[o][e] = bias[o];
    }
#pragma unroll 2
    for (int k = 0; k < layer.inputs; ++k) {
      float w[kOutputs], x[kExamples];
      load_quad(weights, w);
      load_quad(from, x);
      DPM_UNROLL
      for (int o = 0; o < kOutputs; ++o) {
        DPM_UNROLL
        for (int e = 0; e < kExamples; ++e) sum[o][e] = multiply_add(w[o], x[e], sum[o][e]);
      }
      weights += layer.columns;
      from += num_examples;
    }
    const auto finish = [&](auto f) {
      DPM_UNROLL
      for (int o = 0; o < kOutputs; ++o) {
        DPM_UNROLL
        for (int e = 0; e < kExamples; ++e) sum[o][e] = f(sum[o][e]);
      }
    };
    if (is_cheap(layer.activation)) {
      with_cheap_activation(layer.activation, layer.slope, finish);
    } else {
      with_activation(layer.activation, finish);
    }
    float* to = out + row * kOutputs * num_examples + group * kExamples;
    DPM_UNROLL
    for (int o = 0; o < kOutputs; ++o) store_quad(sum[o], to + o * num_examples);
  });
}

// With the largest blocks that leave half of the threads something to do: a block of 16 sums loads
// half a number for each product, a single sum two.
__device__ __forceinline__ void dense(const Dense& layer, const float* in, int num_examples,
                                      float* out) {
  const int num_sums = layer.columns * num_examples, half = static_cast<int>(blockDim.x) / 2;
  if (num_sums >= kQuad * kQuad * half) {
    dense_of_blocks<kQuad, kQuad>(layer, in, num_examples, out);
  } else if (num_sums >= kQuad * half) {
    dense_of_blocks<1, kQuad>(layer, in, num_examples, out);
  } else {
    dense_of_blocks<1, 1>(layer, in, num_examples, out);
  }
}

// One thread's view of a tile.
class VectorTile {
 public:
  __device__ __forceinline__ VectorTile(const VectorTiles& tiles, int64_t N)
      : tiles_(tiles),
        network_(tiles.network),
        fixed_(dynamic_shared<float>()),
        timed_(fixed_ + network_.num_fixed),
        rows_(timed_ + 2 * network_.num_timed),
        first_(int64_t{blockIdx.x} * tiles.num_examples),
        count_(static_cast<int>(first_ + tiles.num_examples < N ? tiles.num_examples : N - first_)) {
  }

 protected:
  // Row `first + i` of all examples.
  __device__ __forceinline__ float* row(int first, int i = 0) const {
    return rows_ + (first + i) * tiles_.num_examples;
  }
  // Parameters of a timestep, in one of two places: the next one's are copied to the other.
  __device__ __forceinline__ float* timed(int place) const {
    return timed_ + place * network_.num_timed;
  }

  __device__ __forceinline__ void copy_fixed() const {
    copy_later(fixed_ + network_.centers, tiles_.centers, network_.D * network_.num_units);
    copy_later(fixed_ + network_.scales, tiles_.scales, network_.num_units);
    copy_layers<false>(network_, 0, fixed_);
  }

  // The coefficients of t, those of the forward process at `level` where there are any, and layers.
  template <class Row>
  __device__ __forceinline__ void copy_timed(const float* rows, int64_t t, const float* levels,
                                             int64_t level, int place) const {
    constexpr int kColumns = sizeof(Row) / sizeof(float);
    float* const of_step = timed(place);
    copy_later(of_step + network_.row, rows + t * kColumns, kColumns);
    if (levels) copy_later(of_step + network_.levels, levels + 2 * level, 2);
    copy_layers<true>(network_, t, of_step);
  }

  // Examples past the last one are zeros, which are written nowhere.
  __device__ __forceinline__ void read_ids(const int64_t* from) const {
    auto* const ids = reinterpret_cast<int64_t*>(row(network_.ids));
    for (int e = threadIdx.x; e < tiles_.num_examples; e += blockDim.x) {
      ids[e] = e < count_ ? from[first_ + e] : 0;
    }
  }

  // visit(d, e, number) with the random numbers of all elements, filled up to whole groups of four.
  // The last threads come first, as they have the fewest sums of a layer.
  template <class Process, class Visit>
  __device__ __forceinline__ void draw(uint64_t seed, uint32_t stream, int64_t t,
                                       Visit visit) const {
    const auto* const ids = reinterpret_cast<const int64_t*>(row(network_.ids));
    const auto draw_group = [&](int group, int e) {
      const ExampleNoise noise = example_noise(seed, stream, static_cast<uint32_t>(t),
                                               static_cast<uint64_t>(ids[e]));
      const Group<float> four = Process::random4(noise, static_cast<uint32_t>(group));
      DPM_UNROLL
      for (int i = 0; i < 4; ++i) visit(4 * group + i, e, four.x[i]);
    };
    for_places((network_.D + 3) / 4, tiles_.num_examples, draw_group, true);
  }

  // Where the network's outputs are; a barrier follows every layer.
  __device__ __forceinline__ const float* evaluate(const float* of_step) const {
    const int E = tiles_.num_examples;
    const float* in = rows_;
    int turn = 0;
    if (network_.num_units) {
      float* const features = row(network_.hidden[0]);
      for_places(network_.num_units, E, [&](int k, int e) {
        features[k * E + e] = exp2_of_negative(exponent(k, e));
      });
      __syncthreads();
      in = features;
      turn = 1;
    }
#pragma unroll 1
    for (int l = 0; l < network_.num_layers; ++l) {
      const ResidentDense& layer = network_.layers[l];
      const TimedDense& given = layer.given;
      const bool is_last = l + 1 == network_.num_layers;
      const Dense placed{static_cast<int>(given.inputs), static_cast<int>(given.outputs),
                         layer.columns,
                         (given.weights_step ? of_step : fixed_) + layer.weights,
                         (given.bias_step ? of_step : fixed_) + layer.bias,
                         is_last ? Activation::linear : tiles_.activation, tiles_.slope};
      float* const out = row(network_.hidden[turn]);
      if (network_.num_units) {
        normalized_readout(placed, in, out);
      } else {
        dense(placed, in, E, out);
      }
      __syncthreads();
      in = out;
      turn = 1 - turn;
    }
    return in;
  }

  // Of 2, in exp(-|x - c|^2 / 2 w^2).
  __device__ __forceinline__ float exponent(int k, int e) const {
    const float* const center = fixed_ + network_.centers + k * network_.D;
    float square = 0;
    for (int d = 0; d < network_.D; ++d) {
      const float distance = row(0, d)[e] - center[d];
      square = multiply_add(distance, distance, square);
    }
    return square * fixed_[network_.scales + k];
  }

  __device__ __forceinline__ void normalized_readout(const Dense& layer, const float* features,
                                                     float* out) const {
    const int E = tiles_.num_examples;
    for_places(layer.outputs, E, [&](int o, int e) {
      const float* const weights = layer.weights + o;
      float total = 0, sum = 0;
#pragma unroll 4
      for (int k = 0; k < layer.inputs; ++k) {
        const float height = features[k * E + e];
        total += height;
        sum = multiply_add(weights[k * layer.columns], height, sum);
      }
      if (!(total > 1e-30f)) {  // far from every center: relative to the nearest one then
        float nearest = -INFINITY;
        for (int k = 0; k < layer.inputs; ++k) nearest = max(nearest, exponent(k, e));
        total = sum = 0;
        for (int k = 0; k < layer.inputs; ++k) {
          const float height = exp2_of_negative(exponent(k, e) - nearest);
          total += height;
          sum = multiply_add(weights[k * layer.columns], height, sum);
        }
      }
      out[o * E + e] = multiply_add(sum, divide_fast(1.0f, total), layer.bias[o]);
    });
  }

  const VectorTiles& tiles_;
  const ResidentNetwork& network_;
  float *fixed_, *timed_, *rows_;
  int64_t first_;
  int count_;  // of examples that are there
};

// The most examples of a tile, of which a multiprocessor has so many at a time; 0 if none fits.
inline int most_examples(const ResidentNetwork& network, int tiles) {
  const int64_t of_block = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const int64_t of_all = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  const int64_t room = std::min(of_block, of_all / tiles - kReservedBytes) - network.bytes(0);
  const int64_t most = room < 0 ? 0 : room / (4 * network.num_rows) / kQuad * kQuad;
  return static_cast<int>(std::min<int64_t>(most, ResidentNetwork::kMostExamples));
}

inline void check_dense(const NetworkArgs& network) {
  if (network.stack || network.num_layers > ResidentNetwork::kMaxLayers) {
    throw std::invalid_argument("a kernel takes networks of vectors with at most " +
                                std::to_string(ResidentNetwork::kMaxLayers) + " layers");
  }
}

inline VectorTiles::VectorTiles(int64_t N, int64_t blocks_of_each, const NetworkArgs& given,
                                const ResidentNetwork& resident)
    : network(resident),
      centers(given.centers),
      scales(given.scales),
      activation(given.activation),
      slope(given.slope) {
  // Two tiles of a multiprocessor fill one another's waits at barriers.
  const int alone = most_examples(network, 1), shared = most_examples(network, 2);
  const bool is_shared = 2 * shared >= alone;
  const int64_t most = is_shared ? shared : alone;
  if (most == 0) {
    throw std::invalid_argument("a network needs " + std::to_string(network.bytes(kQuad)) +
                                " bytes of shared memory, more than a block can have");
  }
  num_places = (is_shared ? 2 : 1) * device_attribute(cudaDevAttrMultiProcessorCount);
  const int64_t total = N * blocks_of_each;
  const int64_t rounds = (total + num_places * most - 1) / (num_places * most);
  const int64_t share = (total + num_places * rounds - 1) / (num_places * rounds);
  num_examples = static_cast<int>(whole_quads(std::min(share, N)));
  // A sum of radial basis functions is short, one of dense layers comes in blocks of 16.
  const int64_t work = int64_t{num_examples} * network.widest / (network.num_units ? 4 : 16);
  num_threads = static_cast<int>(
      std::min<int64_t>(std::max<int64_t>((work + 31) / 32 * 32, kLeastThreads), kMostThreads));
}

}  // namespace dpm
