// What a block does with a stack that is resident in its shared memory (resident_conv.h).
#pragma once

#include <algorithm>

#include "conv_tile.cuh"

namespace dpm {

// On a multiprocessor, in one block or in several, with 128 registers each.
constexpr int kThreadsOfAll = 512;
constexpr int kMostBlocks = 4;

// How far from a pixel's first unit a layer finds its unit number i: of a tap, and of its channels.
__device__ __forceinline__ int offset_of(const ResidentLayer& layer, const TileShape& shape,
                                         int units, int i) {
  const int tap = i / units, y = tap / layer.K - layer.K / 2, x = tap % layer.K - layer.K / 2;
  return y * (shape.W * shape.stride + shape.gap) + x * shape.stride + i - tap * units;
}

// order[place] = the number of the unit there, or `count`: each step takes an offset of every residue
// modulo 4, as long as there are (TileShape says why). What is left goes to the places that are free,
// both in their order. By a warp; `left` has room for num_places numbers.
__device__ inline void order_units(const ResidentLayer& layer, const TileShape& shape, int units,
                                   int count, int* order, int* left) {
  const int num_places = layer.num_steps * kUnitsPerStep, lane = threadIdx.x;
  const unsigned before = (1u << lane) - 1;
  for (int place = lane; place < num_places; place += 32) order[place] = count;
  __syncwarp();
  int met[kUnitsPerStep] = {}, num_left = 0;  // of each residue
  for (int first = 0; first < count; first += 32) {
    const int i = first + lane;
    const int residue = i < count ? offset_of(layer, shape, units, i) & 3 : -1;
    int place = -1;
#pragma unroll
    for (int r = 0; r < kUnitsPerStep; ++r) {
      const unsigned of_residue = __ballot_sync(kWholeWarp, residue == r);
      if (residue == r) place = (met[r] + __popc(of_residue & before)) * kUnitsPerStep + r;
      met[r] += __popc(of_residue);
    }
    const unsigned over = __ballot_sync(kWholeWarp, place >= num_places);
    if (place >= num_places) {
      left[num_left + __popc(over & before)] = i;
    } else if (place >= 0) {
      order[place] = i;
    }
    num_left += __popc(over);
  }
  __syncwarp();
  for (int first = 0, taken = 0; taken < num_left; first += 32) {
    const int place = first + lane;
    const bool is_free = place < num_places && order[place] == count;
    const unsigned free = __ballot_sync(kWholeWarp, is_free);
    const int turn = taken + __popc(free & before);
    if (is_free && turn < num_left) order[place] = left[turn];
    taken += __popc(free);
  }
}

// An operand in the order of ResidentLayer, by a block whose shared memory has bytes_of_order().
template <class Element, class Given>
__device__ __forceinline__ void pack_operand(const ResidentLayer& layer, const TileShape& shape,
                                             const Given* weights, const Given* biases,
                                             unsigned char* operand) {
  constexpr int kCount = kPerUnit<Element>;
  const int taps = layer.K * layer.K, units = ceil_div(layer.C, kCount);
  const auto order = dynamic_shared<int>();
  if (threadIdx.x < 32) {
    const int num_places = layer.num_steps * kUnitsPerStep;
    order_units(layer, shape, units, taps * units, order, order + num_places);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < layer.num_steps * kUnitsPerStep; i += blockDim.x) {
    int number = order[i];  // or that of another place of the step, which is fuller than empty
    for (int k = i & -kUnitsPerStep; number == taps * units; ++k) number = order[k];
    const int offset = offset_of(layer, shape, units, number);
    reinterpret_cast<int*>(operand)[i] = offset * kUnitBytes;
  }
  operand += layer.offset_bytes();
  for (int i = threadIdx.x; i < layer.num_columns * kColumn; i += blockDim.x) {
    const bool has = i < layer.F && !layer.bias_per_location;
    reinterpret_cast<float*>(operand)[i] = has ? to_float(biases[i]) : 0;
  }
  operand += layer.bias_bytes();
  struct alignas(kUnitBytes) Unit {
    Element channel[kCount];
  };
  for (int i = threadIdx.x; i < layer.num_steps * layer.num_columns * 32; i += blockDim.x) {
    const int lane = i % 32, column = i / 32 % layer.num_columns;
    const int number = order[i / 32 / layer.num_columns * kUnitsPerStep + lane % 4];
    const int f = column * kColumn + lane / 4, tap = number / units;
    const int c = (number - tap * units) * kCount;
    Unit unit{};
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      if (tap < taps && f < layer.F && c + k < layer.C) {
        const Given weight = weights[(int64_t{f} * layer.C + c + k) * taps + tap];  // (F, C, K, K)
        unit.channel[k] = from_float<Element>(to_float(weight));
      }
    }
    reinterpret_cast<Unit*>(operand)[i] = unit;
  }
}

// A block for each operand of the layers that have weights.
template <class Element>
static __global__ void __launch_bounds__(256)
    pack_operands(const __grid_constant__ ResidentStack stack, unsigned char* packed) {
  int l = 0, s = static_cast<int>(blockIdx.x);
  while (s >= stack.layers[l].num_scales) s -= stack.layers[l++].num_scales;
  const ResidentLayer& layer = stack.layers[l];
  if (!layer.weights[s]) return;
  pack_operand<Element>(layer, stack.shapes[s], static_cast<const Element*>(layer.weights[s]),
                        static_cast<const Element*>(layer.biases[s]), packed + layer.operands[s]);
}

__device__ __forceinline__ Tile resident_tile(const ResidentStack& stack, unsigned char* shared,
                                              int s, int begin) {
  return {stack.shapes[s], reinterpret_cast<uint2*>(shared) + begin + stack.shapes[s].first};
}

// Operands to shared memory and zeros to the rest, of which halos stay what they are now.
__device__ __forceinline__ void begin_resident(const ResidentStack& stack,
                                               const unsigned char* packed, unsigned char* shared,
                                               int64_t shared_bytes) {
  const int operand_bytes = static_cast<int>(stack.operand_bytes);
  for (int i = threadIdx.x * 16; i < operand_bytes; i += blockDim.x * 16) {
    *reinterpret_cast<uint4*>(shared + i) = *reinterpret_cast<const uint4*>(packed + i);
  }
  for (int i = operand_bytes + threadIdx.x * kUnitBytes; i < static_cast<int>(shared_bytes);
       i += blockDim.x * kUnitBytes) {
    *reinterpret_cast<uint2*>(shared + i) = {};
  }
}

// The image in images[turn] through all layers; where it is then is returned. A barrier comes after
// every layer. kSplitLast: of the last layer.
template <class Element, bool kSplit, bool kSplitLast = kSplit>
__device__ __forceinline__ int convolve_resident(const ResidentStack& stack, unsigned char* shared,
                                                 int turn) {
#pragma unroll 1
  for (int l = 0; l < stack.num_layers; ++l) {
    const ResidentLayer& layer = stack.layers[l];
    const auto input = [&](int s) {
      return resident_tile(stack, shared, s, s == 0 ? stack.images[turn] : stack.pooled[s]);
    };
    const auto output = [&](int s) {
      return resident_tile(stack, shared, s, s == 0 ? stack.images[1 - turn] : stack.coarse[s]);
    };
#pragma unroll 1
    for (int s = 1; s < layer.num_scales; ++s) {
      pool_tile<Element>(input(s - 1), layer.C, input(s));
      __syncthreads();
    }
#pragma unroll 1
    for (int s = layer.num_scales - 1; s >= 0; --s) {
      const unsigned char* at = shared + layer.operands[s];
      const unsigned char* biases = at + layer.offset_bytes();
      const Operand operand{layer.F, layer.num_steps, layer.num_columns,
                            reinterpret_cast<const int*>(at),
                            reinterpret_cast<const float*>(biases),
                            reinterpret_cast<const uint2*>(biases + layer.bias_bytes())};
      Finish finish{};
      finish.bias_of_locations = layer.bias_per_location ? layer.biases[s] : nullptr;
      finish.has_coarse = s + 1 < layer.num_scales;
      if (finish.has_coarse) finish.coarse = output(s + 1);
      finish.is_finest = s == 0;
      finish.after_sum = layer.after_sum;
      finish.slope = layer.slope;
      finish.mean = 1.0f / static_cast<float>(layer.num_scales);
      if (kSplitLast != kSplit && l + 1 == stack.num_layers) {
        convolve_tile<Element, kSplitLast>(input(s), operand, finish, output(s));
      } else {
        convolve_tile<Element, kSplit>(input(s), operand, finish, output(s));
      }
      __syncthreads();
    }
    turn = 1 - turn;
  }
  return turn;
}

// Of a launch of pack_operands and the like.
inline std::size_t bytes_of_order(const ResidentStack& stack) {
  int most_steps = 0;
  for (int l = 0; l < stack.num_layers; ++l) {
    most_steps = std::max(most_steps, stack.layers[l].num_steps);
  }
  return static_cast<std::size_t>(most_steps) * kUnitsPerStep * 2 * sizeof(int);  // and what is left
}

template <class Element>
void pack(const ResidentStack& stack, void* packed, cudaStream_t stream) {
  launch("pack_operands", pack_operands<Element>, stack.num_operands(), 256, bytes_of_order(stack),
         stream, stack, static_cast<unsigned char*>(packed));
}

// How many blocks of so much shared memory share a multiprocessor: as many as fit, unless fewer have
// a place for every image. Each then has the more threads.
inline int blocks_of_multiprocessor(int64_t shared_bytes, int64_t N) {
  if (shared_bytes > cuda::most_shared_bytes()) {
    throw std::invalid_argument("a stack needs " + std::to_string(shared_bytes) +
                                " bytes of shared memory, more than a block can have");
  }
  const int of_all = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  const int64_t count = device_attribute(cudaDevAttrMultiProcessorCount);
  int blocks = kMostBlocks;
  while (blocks > 1 && (blocks * (shared_bytes + kReservedBytes) > of_all ||
                        blocks / 2 * count >= N)) {
    blocks /= 2;
  }
  return blocks;
}

}  // namespace dpm
