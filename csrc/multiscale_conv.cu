// The CUDA launcher of `multiscale_conv`, forward: a block takes an image through all layers in its
// shared memory, so that device memory is read and written once. Activations, means and maps of a
// scale are stored in the type of x, as torch under autocast has them; sums are float.
#include "resident_conv.cuh"

namespace dpm {
namespace {

struct StackArgs {
  ResidentStack stack;
  Images x, out;
  bool x_in_units, out_in_units;
  int64_t N;
  const unsigned char* packed;
};
static_assert(sizeof(StackArgs) <= 4096, "a kernel takes 4 KB of parameters");

template <class Element, bool kSplit>
__global__ void __launch_bounds__(kThreadsOfAll, 1)
    multiscale_conv_image_per_block(const __grid_constant__ StackArgs args) {
  const ResidentStack& stack = args.stack;
  const auto shared = dynamic_shared<unsigned char>();
  begin_resident(stack, args.packed, shared, stack.shared_bytes);
  __syncthreads();
  int turn = 0;  // the image that is the input
#pragma unroll 1
  for (int64_t n = blockIdx.x; n < args.N; n += gridDim.x) {
    load_image<Element>(args.x, n, stack.layers[0].C, args.x_in_units,
                        resident_tile(stack, shared, 0, stack.images[turn]));
    __syncthreads();
    turn = convolve_resident<Element, kSplit>(stack, shared, turn);
    store_image<Element>(resident_tile(stack, shared, 0, stack.images[turn]), args.out, n,
                         stack.layers[stack.num_layers - 1].F, args.out_in_units);
    turn = 1 - turn;  // the next image is loaded beside the one that is being stored
  }
}

template <class Element, bool kSplit>
void run(const ResidentConvArgs& given, cudaStream_t stream) {
  const MultiscaleConvArgs& conv = given.conv;
  const ResidentStack stack(conv);
  const int blocks = blocks_of_multiprocessor(stack.shared_bytes, conv.N);
  const StackArgs args{stack, conv.x, conv.out,
                       in_units<Element>(conv.x, conv.layers[0].C),
                       in_units<Element>(conv.out, conv.layers[conv.num_layers - 1].F),
                       conv.N, static_cast<const unsigned char*>(given.packed)};
  const int64_t most = int64_t{blocks} * device_attribute(cudaDevAttrMultiProcessorCount);
  pack<Element>(stack, given.packed, stream);
  launch("multiscale_conv_image_per_block", multiscale_conv_image_per_block<Element, kSplit>,
         static_cast<unsigned>(conv.N < most ? conv.N : most), kThreadsOfAll / blocks,
         static_cast<std::size_t>(stack.shared_bytes), stream, args);
}

}  // namespace

namespace cuda {

int64_t most_shared_bytes() { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

std::string why_unusable() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, pack_operands<float>);
  switch (error) {
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorInvalidKernelImage:
    case cudaErrorUnsupportedPtxVersion:
    case cudaErrorInsufficientDriver:
      cudaGetLastError();
      return cudaGetErrorString(error);
    default:  // out of memory, say, or what an earlier kernel did
      check_cuda(error, "cudaFuncGetAttributes");
      return "";
  }
}

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
