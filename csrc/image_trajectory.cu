// The CUDA launcher of `image_trajectory`: a block takes an image through all timesteps in its shared
// memory, the network's operands beside it. What a step reads from outside is a readout of a KB, and
// what is known or observed.
//
// A sum is taken by one warp in an order that sizes of the network alone decide, and an element's step
// by one thread, so that results depend on neither the batch nor the device.
#include "process.cuh"
#include "resident_conv.cuh"
#include "resident_images.h"

namespace dpm {
namespace {

struct KernelArgs {
  TrajectoryArgs trajectory;  // its network is the one that follows
  ResidentImages images;
};
static_assert(sizeof(KernelArgs) <= 4096, "a kernel takes 4 KB of parameters");

// Readouts of the timesteps from `first` on, a block for each.
__global__ void __launch_bounds__(256)
    pack_readouts(const __grid_constant__ ResidentImages images,
                  const __grid_constant__ TimedDense readout, int64_t first,
                  unsigned char* packed) {
  const ResidentStack& stack = images.stack;
  const int64_t t = first + blockIdx.x;
  pack_operand(stack.layers[stack.num_layers - 1], stack.shapes[0],
               readout.weights + t * readout.weights_step, readout.bias + t * readout.bias_step,
               packed + images.readout + int64_t{blockIdx.x} * images.readout_bytes);
}

// One thread's view of a block.
class ImageOfBlock {
 public:
  __device__ __forceinline__ explicit ImageOfBlock(const KernelArgs& args)
      : args_(args.trajectory),
        images_(args.images),
        shared_(dynamic_shared<unsigned char>()) {}

  template <bool kSplit>
  __device__ __forceinline__ void run() const {
    int t = static_cast<int>(args_.first), turn = 0;  // t below 2^24
    begin_resident(images_.stack, static_cast<const unsigned char*>(args_.network.packed), shared_,
                   images_.shared_bytes);
    __syncthreads();
    copy_readout(t);
    read();
    wait_for_copies();
    __syncthreads();
#pragma unroll 1
    while (true) {
      turn = convolve_resident<float, kSplit>(images_.stack, shared_, turn);
      const auto to = static_cast<int>(args_.after(t));
      if (to >= args_.last) copy_readout(to);
      if (args_.is_binomial) {
        step<BinomialProcess>(t, to, turn);
      } else if (args_.is_learned) {
        step<GaussianProcess<true>>(t, to, turn);
      } else {
        step<GaussianProcess<false>>(t, to, turn);
      }
      wait_for_copies();
      __syncthreads();
      if (to < args_.last) return;
      t = to, turn ^= 1;
    }
  }

 private:
  __device__ __forceinline__ Tile tile(int turn) const {
    return resident_tile(images_.stack, shared_, 0, images_.stack.images[turn]);
  }
  __device__ __forceinline__ void copy_readout(int64_t t) const {
    const auto packed = static_cast<const unsigned char*>(args_.network.packed);
    const int64_t from = images_.readout + (t - args_.last) * images_.readout_bytes;
    copy_later(reinterpret_cast<float*>(shared_ + images_.readout),
               reinterpret_cast<const float*>(packed + from), images_.readout_bytes / 4);
  }

  // visit(group, i, element, channel, pixel) of a thread's groups of four elements.
  template <class Begin, class Visit>
  __device__ __forceinline__ void for_elements(Begin begin, Visit visit) const {
    const auto count = static_cast<unsigned>(args_.D);
    const auto num_pixels = static_cast<unsigned>(tile(0).num_pixels());
#pragma unroll 1
    for (unsigned group = threadIdx.x; 4 * group < count; group += blockDim.x) {
      const auto numbers = begin(group);
      DPM_UNROLL
      for (int i = 0; i < 4; ++i) {
        const unsigned d = 4 * group + i, channel = d / num_pixels;
        if (d >= count) continue;
        visit(static_cast<int>(d), static_cast<int>(channel),
              static_cast<int>(d - channel * num_pixels), numbers, i);
      }
    }
  }

  template <class T>
  __device__ __forceinline__ T given(const Strided& tensor, int d) const {
    return static_cast<const T*>(tensor.data)[int64_t{blockIdx.x} * tensor.n + d * tensor.c];
  }

  // x of an element, also where the stack reads it; a unit is filled up with zeros.
  __device__ __forceinline__ void store(const Tile& in, int d, int channel, int pixel,
                                        float x) const {
    reinterpret_cast<float*>(shared_ + images_.x)[d] = x;
    const int C = images_.stack.layers[0].C;
    float* const channels = reinterpret_cast<float*>(in.origin + in.at(pixel));
    channels[channel] = x;
    if (channel + 1 == C && C % 2 != 0) channels[C] = 0;
  }

  __device__ __forceinline__ void read() const {
    const Tile in = tile(0);
    for_elements([](unsigned) { return 0; },
                 [&](int d, int channel, int pixel, int, int) {
                   store(in, d, channel, pixel, args_.x[int64_t{blockIdx.x} * args_.D + d]);
                 });
  }

  // From the outputs in one image to the stack's input in the other one.
  template <class Process>
  __device__ __forceinline__ void step(int t, int to, int turn) const {
    const Tile out = tile(turn), in = tile(1 - turn);
    const auto& coefficients = reinterpret_cast<const typename Process::Row*>(args_.rows)[t];
    const float* const x_t = reinterpret_cast<const float*>(shared_ + images_.x);
    float* const state = args_.state(to);
    const bool is_drawn = args_.is_drawn(to), is_noised = args_.is_noised(to);
    const int C = images_.stack.layers[0].C;
    struct Numbers {
      Group<float> of_step{}, of_known{};
    };
    const auto draw = [&](unsigned group) {
      const auto id = static_cast<uint64_t>(args_.ids[blockIdx.x]);
      Numbers numbers;
      if (is_drawn) {
        numbers.of_step = Process::random4(
            example_noise(args_.seed, args_.reverse_stream, static_cast<uint32_t>(t), id), group);
      }
      if (is_noised) {
        numbers.of_known = Process::random4(
            example_noise(args_.seed, args_.forward_stream, static_cast<uint32_t>(to), id), group);
      }
      return numbers;
    };
    for_elements(draw, [&](int d, int channel, int pixel, const Numbers& numbers, int i) {
      const float* outputs = reinterpret_cast<const float*>(out.origin + out.at(pixel)) + channel;
      Observed observed{};
      if (args_.y.data) {
        observed = Process::observed(given<float>(args_.y, d), given<float>(args_.spread, d));
      }
      float x = Process::step(coefficients, x_t[d], outputs, C, args_.y.data, observed, is_drawn,
                              numbers.of_step.x[i]);
      if (args_.mask.data && given<uint8_t>(args_.mask, d)) {
        x = given<float>(args_.values, d);
        if (is_noised) {
          x = Process::noised(args_.levels + int64_t{2} * to, x, numbers.of_known.x[i]);
        }
      }
      store(in, d, channel, pixel, x);
      const int64_t element = int64_t{blockIdx.x} * args_.D + d;
      if (state) state[element] = x;
      if (to < args_.last) args_.out[element] = x;
    });
  }

  const TrajectoryArgs& args_;
  const ResidentImages& images_;
  unsigned char* shared_;
};

template <bool kSplit>
__global__ void __launch_bounds__(kThreadsOfAll, 1)
    trajectory_image_per_block(const __grid_constant__ KernelArgs args) {
  ImageOfBlock(args).run<kSplit>();
}

}  // namespace

namespace cuda {

void image_trajectory(const TrajectoryArgs& args, void* stream_address) {
  const auto stream = static_cast<cudaStream_t>(stream_address);
  const NetworkArgs& network = args.network;
  if (!network.stack || network.num_layers != 1 ||
      ResidentStack::count_layers(*network.stack) > ResidentStack::kMaxLayers) {
    throw std::invalid_argument("a kernel takes networks of images without a dense path and with at "
                                "most " + std::to_string(ResidentStack::kMaxLayers) + " layers");
  }
  const ResidentImages images(*network.stack);
  const int64_t num_timesteps = args.first - args.last + 1;
  if (!network.packed || network.packed_bytes < images.packed_bytes(num_timesteps)) {
    throw std::invalid_argument("there must be room for the operands of a stack");
  }
  if (args.N == 0) return;
  const int blocks = blocks_of_multiprocessor(images.shared_bytes, args.N);
  pack<float>(images.stack, network.packed, stream);
  launch("pack_readouts", pack_readouts, grid_of(num_timesteps, 1), 256,
         bytes_of_order(images.stack), stream, images, network.layers[0], args.last,
         static_cast<unsigned char*>(network.packed));
  launch("trajectory_image_per_block",
         network.tf32 ? trajectory_image_per_block<false> : trajectory_image_per_block<true>,
         grid_of(args.N, 1), kThreadsOfAll / blocks,
         static_cast<std::size_t>(images.shared_bytes), stream, KernelArgs{args, images});
}

}  // namespace cuda
}  // namespace dpm
