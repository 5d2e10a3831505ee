// The CUDA launcher of `image_trajectory`: a block takes an image through all timesteps in its
// shared memory, the network's operands beside it. What a step reads from outside is a readout of a
// KB, and what is known or observed.
#include "image_tile.cuh"

namespace dpm {
namespace {

struct KernelArgs {
  TrajectoryArgs trajectory;  // its network is the one that follows
  ResidentImages images;
};
static_assert(sizeof(KernelArgs) <= 4096, "a kernel takes 4 KB of parameters");

template <class Precision>
class Trajectory : ImageTile<Precision> {
  using Base = ImageTile<Precision>;

 public:
  __device__ __forceinline__ explicit Trajectory(const KernelArgs& args)
      : Base(args.images, args.trajectory.network.packed, args.trajectory.last),
        args_(args.trajectory) {}

  __device__ __forceinline__ void run() const {
    int t = static_cast<int>(args_.first), turn = 0;  // t below 2^24
    Base::begin();
    Base::copy_readout(t);
    read();
    wait_for_copies();
    __syncthreads();
#pragma unroll 1
    while (true) {
      turn = Base::evaluate(turn);
      const auto to = static_cast<int>(args_.after(t));
      if (to >= args_.last) Base::copy_readout(to);
      with_process(args_.is_binomial, args_.is_learned,
                   [&](auto process) { step<decltype(process)>(t, to, turn); });
      wait_for_copies();
      __syncthreads();
      if (to < args_.last) return;
      t = to, turn ^= 1;
    }
  }

 private:
  template <class T>
  __device__ __forceinline__ T given(const Strided& tensor, int d) const {
    return static_cast<const T*>(tensor.data)[int64_t{blockIdx.x} * tensor.n + d * tensor.c];
  }

  __device__ __forceinline__ void read() const {
    const Tile in = Base::tile(0);
    Base::for_elements([](unsigned) { return 0; },
                       [&](int d, int channel, int pixel, int, int) {
                         const float x = args_.x[int64_t{blockIdx.x} * args_.D + d];
                         Base::store(in, d, channel, pixel, x);
                       });
  }

  // From the outputs in one place to the input in the other one.
  template <class Process>
  __device__ __forceinline__ void step(int t, int to, int turn) const {
    const Tile out = Base::tile(turn), in = Base::tile(1 - turn);
    const auto& coefficients = reinterpret_cast<const typename Process::Row*>(args_.rows)[t];
    float* const state = args_.state(to);
    const bool is_drawn = args_.is_drawn(to), is_noised = args_.is_noised(to);
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
    Base::for_elements(draw, [&](int d, int channel, int pixel, const Numbers& numbers, int i) {
      Observed observed{};
      if (args_.y.data) {
        observed = Process::observed(given<float>(args_.y, d), given<float>(args_.spread, d));
      }
      float x = Process::step(coefficients, Base::x()[d],
                              Base::template outputs<Process>(out, channel, pixel), args_.y.data,
                              observed, is_drawn, numbers.of_step.x[i]);
      if (args_.mask.data && given<uint8_t>(args_.mask, d)) {
        x = given<float>(args_.values, d);
        if (is_noised) {
          x = Process::noised(args_.levels + int64_t{2} * to, x, numbers.of_known.x[i]);
        }
      }
      Base::store(in, d, channel, pixel, x);
      const int64_t element = int64_t{blockIdx.x} * args_.D + d;
      if (state) state[element] = x;
      if (to < args_.last) args_.out[element] = x;
    });
  }

  const TrajectoryArgs& args_;
};

template <class Precision>
__global__ void __launch_bounds__(kThreadsOfAll, 1)
    trajectory_image_per_block(const __grid_constant__ KernelArgs args) {
  Trajectory<Precision>(args).run();
}

template <class Precision>
void run(const TrajectoryArgs& args, cudaStream_t stream) {
  const ResidentImages images(*args.network.stack);
  const int blocks = blocks_of_multiprocessor(images.shared_bytes, args.N);
  pack_images<typename Precision::Element>(images, args.network, args.last,
                                           args.first - args.last + 1, stream);
  const KernelArgs given{args, images};
  launch("trajectory_image_per_block", trajectory_image_per_block<Precision>, grid_of(args.N, 1),
         kThreadsOfAll / blocks, static_cast<std::size_t>(images.shared_bytes), stream, given);
}

}  // namespace

namespace cuda {

void image_trajectory(const TrajectoryArgs& args, void* stream_address) {
  const auto stream = static_cast<cudaStream_t>(stream_address);
  check_images(args.network);
  if (args.N == 0) return;
  with_precision(args.network, [&](auto precision) { run<decltype(precision)>(args, stream); });
}

}  // namespace cuda
}  // namespace dpm
