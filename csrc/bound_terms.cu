// The CUDA launcher of `bound_terms`: a block takes a tile of examples through a run of timesteps, with
// the network in its shared memory. What belongs to a timestep comes while the one before it is
// computed. A term is added up in double.
#include "bound_terms.h"
#include "vector_tile.cuh"

namespace dpm {
namespace {

struct KernelArgs {
  BoundTermsArgs terms;  // its network is that of the tiles
  VectorTiles tiles;
  Runs runs;
};
static_assert(sizeof(KernelArgs) <= 4096, "a kernel takes 4 KB of parameters");

template <class Process>
class Terms : VectorTile {
 public:
  __device__ __forceinline__ explicit Terms(const KernelArgs& args)
      : VectorTile(args.tiles, args.terms.N), args_(args.terms) {}

  __device__ __forceinline__ void run(Run timesteps) {
    const auto [first, last] = timesteps;
    copy_fixed();
    int place = 0;
    copy_timed<Row>(args_.rows, first, args_.levels, first, place);
    read();
    wait_for_copies();
    __syncthreads();
#pragma unroll 1
    for (int64_t t = first; t >= last; --t, place ^= 1) {
      if (t > last) copy_timed<Row>(args_.rows, t - 1, args_.levels, t - 1, place ^ 1);
      const float* const of_step = timed(place);
      add_noise(t, of_step + network_.levels);
      __syncthreads();
      find(of_step, evaluate(of_step));
      wait_for_copies();
      __syncthreads();
      add_up(args_.nats + (args_.first - t) * args_.N + first_);
    }
  }

 private:
  using Row = typename Process::Row;

  __device__ __forceinline__ float& x_0(int d, int e) const { return row(network_.known, d)[e]; }
  __device__ __forceinline__ float& nats(int d, int e) const {
    return row(network_.numbers, d)[e];
  }

  __device__ __forceinline__ void read() const {
    const int D = network_.D;
    read_ids(args_.ids);
    for_places(D, tiles_.num_examples, [&](int d, int e) {
      x_0(d, e) = e < count_ ? args_.x_0[(first_ + e) * D + d] : 0.0f;
    });
  }

  __device__ __forceinline__ void add_noise(int64_t t, const float* level) const {
    draw<Process>(args_.seed, args_.forward_stream, t, [&](int d, int e, float number) {
      if (d < network_.D) row(0, d)[e] = Process::noised(level, x_0(d, e), number);
    });
  }

  __device__ __forceinline__ void find(const float* of_step, const float* out) const {
    const int E = tiles_.num_examples, D = network_.D;
    const typename Process::RowOfTerms row_of_t(
        *reinterpret_cast<const Row*>(of_step + network_.row));
    for_places(D, E, [&](int d, int e) {
      nats(d, e) = Process::nats(row_of_t, x_0(d, e), row(0, d)[e],
                                 Process::outputs(out + d * E + e, D * E));
    });
  }

  // So many lanes to an example, each with every so many-th element: in an order that D decides.
  __device__ __forceinline__ void add_up(double* to) const {
    constexpr int kLanes = 8;
    const int lane = threadIdx.x % kLanes, step = static_cast<int>(blockDim.x) / kLanes;
    for (int first = 0; first < count_; first += step) {
      const int e = first + static_cast<int>(threadIdx.x) / kLanes;
      double sum = 0;
      if (e < count_) {
        for (int d = lane; d < network_.D; d += kLanes) sum += nats(d, e);
      }
      for (int offset = kLanes / 2; offset > 0; offset /= 2) {
        sum += __shfl_down_sync(kWholeWarp, sum, offset, kLanes);
      }
      if (lane == 0 && e < count_) to[e] = sum;
    }
  }

  const BoundTermsArgs& args_;
};

template <class Process>
__global__ void __launch_bounds__(kMostThreads, 2)
    bound_terms_tile_per_block(const __grid_constant__ KernelArgs args) {
  Terms<Process>(args).run(args.runs(args.terms, blockIdx.y));
}

template <class Process>
void run(const BoundTermsArgs& args, cudaStream_t stream) {
  constexpr int kColumns = sizeof(typename Process::Row) / sizeof(float);
  const int64_t num_timesteps = args.num_timesteps();
  const ResidentNetwork network(args.D, args.network, kColumns, false, true, false);
  const VectorTiles tiles(args.N, Runs::most(num_timesteps), args.network, network);
  dim3 grid = grid_of(args.N, 1, tiles.num_examples);
  const Runs runs(num_timesteps, grid.x, tiles.num_places);
  grid.y = runs.count(num_timesteps);
  const KernelArgs given{args, tiles, runs};
  launch("bound_terms_tile_per_block", bound_terms_tile_per_block<Process>, grid,
         tiles.num_threads, tiles.bytes(), stream, given);
}

}  // namespace

namespace cuda {

void bound_terms(const BoundTermsArgs& args, void* stream_address) {
  const auto stream = static_cast<cudaStream_t>(stream_address);
  check_dense(args.network);
  if (args.N == 0) return;
  if (args.is_binomial) return run<BinomialProcess>(args, stream);
  if (args.is_learned) return run<GaussianProcess<true>>(args, stream);
  run<GaussianProcess<false>>(args, stream);
}

}  // namespace cuda
}  // namespace dpm
