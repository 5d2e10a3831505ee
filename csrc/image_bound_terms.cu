// The CUDA launcher of `image_bound_terms`: a block takes an image through a run of timesteps, with
// the network in its shared memory. x_t of a timestep is made, and its term found, without leaving it.
#include "bound_terms.h"
#include "image_tile.cuh"

namespace dpm {
namespace {

struct KernelArgs {
  BoundTermsArgs terms;  // its network is the one that follows
  ResidentImages images;
  Runs runs;
};
static_assert(sizeof(KernelArgs) <= 4096, "a kernel takes 4 KB of parameters");

template <class Precision>
class Terms : ImageTile<Precision> {
  using Base = ImageTile<Precision>;

 public:
  __device__ __forceinline__ explicit Terms(const KernelArgs& args)
      : Base(args.images, args.terms.network.packed, args.terms.last), args_(args.terms) {}

  __device__ __forceinline__ void run(Run timesteps) const {
    const auto [first, last] = timesteps;
    Base::begin();
    Base::copy_readout(first);
    int turn = 0;
#pragma unroll 1
    for (int64_t t = first; t >= last; --t) {
      with_process(args_.is_binomial, args_.is_learned,
                   [&](auto process) { add_noise<decltype(process)>(t, turn); });
      wait_for_copies();
      __syncthreads();
      turn = Base::evaluate(turn);
      if (t > last) Base::copy_readout(t - 1);
      with_process(args_.is_binomial, args_.is_learned,
                   [&](auto process) { find<decltype(process)>(t, turn); });
      __syncthreads();
      add_up(args_.nats + (args_.first - t) * args_.N + blockIdx.x);
      __syncthreads();
    }
  }

 private:
  __device__ __forceinline__ float x_0(int d) const {
    return args_.x_0[int64_t{blockIdx.x} * args_.D + d];
  }

  template <class Process>
  __device__ __forceinline__ void add_noise(int64_t t, int turn) const {
    const Tile in = Base::tile(turn);
    const ExampleNoise noise = example_noise(args_.seed, args_.forward_stream,
                                             static_cast<uint32_t>(t),
                                             static_cast<uint64_t>(args_.ids[blockIdx.x]));
    Base::for_elements(
        [&](unsigned group) { return Process::random4(noise, group); },
        [&](int d, int channel, int pixel, const Group<float>& numbers, int i) {
          const float x_t = Process::noised(args_.levels + 2 * t, x_0(d), numbers.x[i]);
          Base::store(in, d, channel, pixel, x_t);
        });
  }

  // The nats of each element in the place of x_t.
  template <class Process>
  __device__ __forceinline__ void find(int64_t t, int turn) const {
    const Tile out = Base::tile(turn);
    const typename Process::RowOfTerms row(
        reinterpret_cast<const typename Process::Row*>(args_.rows)[t]);
    Base::for_elements([](unsigned) { return 0; },
                       [&](int d, int channel, int pixel, int, int) {
                         float& place = Base::x()[d];
                         place = Process::nats(
                             row, x_0(d), place,
                             Base::template outputs<Process>(out, channel, pixel));
                       });
  }

  // By the first warp, in an order that D alone decides.
  __device__ __forceinline__ void add_up(double* to) const {
    if (threadIdx.x >= 32) return;
    double sum = 0;
    for (int d = threadIdx.x; d < args_.D; d += 32) sum += Base::x()[d];
    for (int offset = 16; offset > 0; offset /= 2) {
      sum += __shfl_down_sync(kWholeWarp, sum, offset);
    }
    if (threadIdx.x == 0) *to = sum;
  }

  const BoundTermsArgs& args_;
};

template <class Precision>
__global__ void __launch_bounds__(kThreadsOfAll, 1)
    bound_terms_image_per_block(const __grid_constant__ KernelArgs args) {
  Terms<Precision>(args).run(args.runs(args.terms, blockIdx.y));
}

template <class Precision>
void run(const BoundTermsArgs& args, cudaStream_t stream) {
  const ResidentImages images(*args.network.stack);
  const int64_t num_timesteps = args.num_timesteps();
  const int blocks =
      blocks_of_multiprocessor(images.shared_bytes, args.N * Runs::most(num_timesteps));
  const int64_t places = int64_t{blocks} * device_attribute(cudaDevAttrMultiProcessorCount);
  const Runs runs(num_timesteps, args.N, places);
  pack_images<typename Precision::Element>(images, args.network, args.last, num_timesteps, stream);
  dim3 grid = grid_of(args.N, 1);
  grid.y = runs.count(num_timesteps);
  const KernelArgs given{args, images, runs};
  launch("bound_terms_image_per_block", bound_terms_image_per_block<Precision>, grid,
         kThreadsOfAll / blocks, static_cast<std::size_t>(images.shared_bytes), stream, given);
}

}  // namespace

namespace cuda {

void image_bound_terms(const BoundTermsArgs& args, void* stream_address) {
  const auto stream = static_cast<cudaStream_t>(stream_address);
  check_images(args.network);
  if (args.N == 0) return;
  with_precision(args.network, [&](auto precision) { run<decltype(precision)>(args, stream); });
}

}  // namespace cuda
}  // namespace dpm
