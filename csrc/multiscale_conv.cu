// The CUDA launcher of `multiscale_conv`, forward: a block takes an image through all layers in its
// shared memory, so that device memory is read and written once. Activations, means and maps of a
// scale are stored in the type of x, as torch under autocast has them; sums are float.
#include <algorithm>

#include "conv_tile.cuh"

namespace dpm {
namespace {

// On a multiprocessor, in one block or in several, with 128 registers each.
constexpr int kThreadsOfAll = 512;
constexpr int kMostBlocks = 4;

struct StackArgs {
  ResidentStack stack;
  Images x, out;
  bool x_in_units, out_in_units;
  int64_t N;
  bool after_sum;
  float slope;
  unsigned char* packed;
};
static_assert(sizeof(StackArgs) <= 4096, "a kernel takes 4 KB of parameters");

// How far from a pixel's first unit a layer finds its unit number i: of a tap, and of its channels.
__device__ __forceinline__ int offset_of(const ResidentLayer& layer, const TileShape& shape,
                                         int units, int i) {
  const int tap = i / units, y = tap / layer.K - layer.K / 2, x = tap % layer.K - layer.K / 2;
  return y * (shape.W * shape.stride + shape.gap) + x * shape.stride + i - tap * units;
}

// order[place] = the number of the unit there, or `count`: each step takes an offset of every residue
// modulo 4, as long as there are (TileShape says why). By one thread, in a microsecond.
__device__ void order_units(const ResidentLayer& layer, const TileShape& shape, int units,
                            int count, int* order) {
  const int num_places = layer.num_steps * kUnitsPerStep;
  for (int place = 0; place < num_places; ++place) order[place] = count;
  for (int free = 0, pass = 0; pass < 2; ++pass) {
    uint64_t met = 0;  // of each residue, 16 bits
    for (int i = 0; i < count; ++i) {
      const int residue = offset_of(layer, shape, units, i) & 3;
      const int place = static_cast<int>(met >> (16 * residue) & 0xffff) * kUnitsPerStep + residue;
      met += uint64_t{1} << (16 * residue);
      if (pass == 0 && place < num_places) order[place] = i;
      if (pass == 1 && place >= num_places) {
        while (order[free] < count) ++free;
        order[free] = i;
      }
    }
  }
}

// An operand for each block, in the order of ResidentLayer.
template <class Element>
__global__ void __launch_bounds__(256) pack_operands(const __grid_constant__ StackArgs args) {
  constexpr int kCount = kPerUnit<Element>;
  const int s = blockIdx.x % args.stack.num_scales;
  const ResidentLayer& layer = args.stack.layers[blockIdx.x / args.stack.num_scales];
  const TileShape& shape = args.stack.shapes[s];
  const int taps = layer.K * layer.K, units = ceil_div(layer.C, kCount);
  const auto order = dynamic_shared<int>();
  if (threadIdx.x == 0) order_units(layer, shape, units, taps * units, order);
  __syncthreads();
  unsigned char* operand = args.packed + layer.operands[s];
  for (int i = threadIdx.x; i < layer.num_steps * kUnitsPerStep; i += blockDim.x) {
    int number = order[i];  // or that of another place of the step, which is fuller than empty
    for (int k = i & -kUnitsPerStep; number == taps * units; ++k) number = order[k];
    const int offset = offset_of(layer, shape, units, number);
    reinterpret_cast<int*>(operand)[i] = offset * kUnitBytes;
  }
  operand += layer.offset_bytes();
  const auto biases = static_cast<const Element*>(layer.biases[s]);
  for (int i = threadIdx.x; i < layer.num_columns * kColumn; i += blockDim.x) {
    const bool has = i < layer.F && !layer.bias_per_location;
    reinterpret_cast<float*>(operand)[i] = has ? to_float(biases[i]) : 0;
  }
  operand += layer.bias_bytes();
  const auto weights = static_cast<const Element*>(layer.weights[s]);  // (F, C, K, K)
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
        unit.channel[k] = weights[(int64_t{f} * layer.C + c + k) * taps + tap];
      }
    }
    reinterpret_cast<Unit*>(operand)[i] = unit;
  }
}

template <class Element, bool kSplit>
__global__ void __launch_bounds__(kThreadsOfAll, 1)
    multiscale_conv_image_per_block(const __grid_constant__ StackArgs args) {
  const ResidentStack& stack = args.stack;
  const auto shared = dynamic_shared<unsigned char>();
  const auto tile = [&](int s, int begin) {
    return Tile{stack.shapes[s], reinterpret_cast<uint2*>(shared) + begin + stack.shapes[s].first};
  };
  const int operand_bytes = static_cast<int>(stack.operand_bytes);
  const int shared_bytes = static_cast<int>(stack.shared_bytes);
  for (int i = threadIdx.x * 16; i < operand_bytes; i += blockDim.x * 16) {
    *reinterpret_cast<uint4*>(shared + i) = *reinterpret_cast<const uint4*>(args.packed + i);
  }
  // Halos stay what they are now.
  for (int i = operand_bytes + threadIdx.x * kUnitBytes; i < shared_bytes;
       i += blockDim.x * kUnitBytes) {
    *reinterpret_cast<uint2*>(shared + i) = {};
  }
  __syncthreads();
  int turn = 0;  // the image that is the input
#pragma unroll 1
  for (int64_t n = blockIdx.x; n < args.N; n += gridDim.x) {
    load_image<Element>(args.x, n, stack.layers[0].C, args.x_in_units,
                        tile(0, stack.images[turn]));
    __syncthreads();
#pragma unroll 1
    for (int l = 0; l < stack.num_layers; ++l) {
      const ResidentLayer& layer = stack.layers[l];
      const auto input = [&](int s) {
        return tile(s, s == 0 ? stack.images[turn] : stack.pooled[s]);
      };
      const auto output = [&](int s) {
        return tile(s, s == 0 ? stack.images[1 - turn] : stack.coarse[s]);
      };
#pragma unroll 1
      for (int s = 1; s < stack.num_scales; ++s) {
        pool_tile<Element>(input(s - 1), layer.C, input(s));
        __syncthreads();
      }
#pragma unroll 1
      for (int s = stack.num_scales - 1; s >= 0; --s) {
        const unsigned char* at = shared + layer.operands[s];
        const unsigned char* biases = at + layer.offset_bytes();
        const Operand operand{layer.F, layer.num_steps, layer.num_columns,
                              reinterpret_cast<const int*>(at),
                              reinterpret_cast<const float*>(biases),
                              reinterpret_cast<const uint2*>(biases + layer.bias_bytes())};
        Finish finish{};
        finish.bias_of_locations = layer.bias_per_location ? layer.biases[s] : nullptr;
        finish.has_coarse = s + 1 < stack.num_scales;
        if (finish.has_coarse) finish.coarse = output(s + 1);
        finish.is_finest = s == 0;
        finish.after_sum = args.after_sum;
        finish.slope = args.slope;
        finish.mean = 1.0f / static_cast<float>(stack.num_scales);
        convolve_tile<Element, kSplit>(input(s), operand, finish, output(s));
        __syncthreads();
      }
      turn = 1 - turn;
    }
    store_image<Element>(tile(0, stack.images[turn]), args.out, n,
                         stack.layers[stack.num_layers - 1].F, args.out_in_units);
    turn = 1 - turn;  // the next image is loaded beside the one that is being stored
  }
}

template <class Element, bool kSplit>
void run(const ResidentConvArgs& given, cudaStream_t stream) {
  const MultiscaleConvArgs& conv = given.conv;
  const ResidentStack stack(conv.H, conv.W, conv.num_scales, conv.layers, conv.num_layers,
                            conv.dtype);
  const int64_t bytes = stack.shared_bytes;
  if (bytes > cuda::most_shared_bytes()) {
    throw std::invalid_argument("a stack needs " + std::to_string(bytes) +
                                " bytes of shared memory, more than a block can have");
  }
  const StackArgs args{stack, conv.x, conv.out,
                       in_units<Element>(conv.x, conv.layers[0].C),
                       in_units<Element>(conv.out, conv.layers[conv.num_layers - 1].F),
                       conv.N, conv.after_sum, static_cast<float>(conv.slope),
                       static_cast<unsigned char*>(given.packed)};
  const int of_all = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  int blocks = kMostBlocks;  // of a multiprocessor
  while (blocks > 1 && blocks * (bytes + kReservedBytes) > of_all) blocks /= 2;
  const int64_t most = int64_t{blocks} * device_attribute(cudaDevAttrMultiProcessorCount);
  int most_steps = 0;
  for (int l = 0; l < stack.num_layers; ++l) {
    most_steps = std::max(most_steps, stack.layers[l].num_steps);
  }
  launch("pack_operands", pack_operands<Element>, conv.num_layers * conv.num_scales, 256,
         static_cast<std::size_t>(most_steps) * kUnitsPerStep * sizeof(int), stream, args);
  launch("multiscale_conv_image_per_block", multiscale_conv_image_per_block<Element, kSplit>,
         static_cast<unsigned>(conv.N < most ? conv.N : most), kThreadsOfAll / blocks,
         static_cast<std::size_t>(bytes), stream, args);
}

}  // namespace

namespace cuda {

int64_t most_shared_bytes() { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

void multiscale_conv(const ResidentConvArgs& args, void* stream_address) {
  const auto stream = static_cast<cudaStream_t>(stream_address);
  switch (args.conv.dtype) {
    case DType::bfloat16: return run<bf16, false>(args, stream);
    case DType::float16: return run<f16, false>(args, stream);
    case DType::float32:
      return args.tf32 ? run<float, false>(args, stream) : run<float, true>(args, stream);
    default: throw std::invalid_argument("a kernel takes float32, bfloat16 or float16");
  }
}

}  // namespace cuda
}  // namespace dpm
