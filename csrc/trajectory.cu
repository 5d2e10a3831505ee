// The CUDA launcher of `trajectory`: a block takes a tile of examples through all timesteps. The
// parameters of the network, the examples and all that it makes of them stay in shared memory; what
// belongs to a timestep comes while the step before it is computed.
#include "vector_tile.cuh"

namespace dpm {
namespace {

struct KernelArgs {
  TrajectoryArgs trajectory;  // its network is that of the tiles
  VectorTiles tiles;
};
static_assert(sizeof(KernelArgs) <= 4096, "a kernel takes 4 KB of parameters");

template <class Process>
class Trajectory : VectorTile {
 public:
  __device__ __forceinline__ explicit Trajectory(const KernelArgs& args)
      : VectorTile(args.tiles, args.trajectory.N), args_(args.trajectory) {}

  __device__ __forceinline__ void run() {
    copy_fixed();
    int place = 0;
    int64_t t = args_.first, to = args_.after(t);
    copy_timed<Row>(args_.rows, t, args_.levels, to, place);
    read();
    wait_for_copies();
    __syncthreads();
#pragma unroll 1
    while (true) {
      const bool is_last = to < args_.last;
      const int64_t next = is_last ? 0 : args_.after(to);
      if (!is_last) copy_timed<Row>(args_.rows, to, args_.levels, next, place ^ 1);
      if (args_.is_drawn(to)) fill(args_.reverse_stream, t, network_.numbers);
      if (args_.is_noised(to)) fill(args_.forward_stream, to, network_.noise_of_known);
      const float* const of_step = timed(place);
      step(to, is_last, of_step, evaluate(of_step));
      if (is_last) return;
      wait_for_copies();
      __syncthreads();
      t = to, to = next, place ^= 1;
    }
  }

 private:
  using Row = typename Process::Row;

  __device__ __forceinline__ void fill(uint32_t stream, int64_t t, int to) const {
    draw<Process>(args_.seed, stream, t, [&](int d, int e, float number) {
      row(to, d)[e] = number;
    });
  }

  __device__ __forceinline__ void read() const {
    const int D = network_.D;
    read_ids(args_.ids);
    for_places(D, tiles_.num_examples, [&](int d, int e) {
      const bool is_there = e < count_;
      const int64_t n = first_ + e;
      const auto element = [&](const Strided& tensor) {
        return is_there ? static_cast<const float*>(tensor.data)[n * tensor.n + d * tensor.c] : 0.0f;
      };
      row(0, d)[e] = is_there ? args_.x[n * D + d] : 0.0f;
      if (args_.y.data) {
        const Observed observed = Process::observed(element(args_.y), element(args_.spread));
        row(network_.observed, d)[e] = observed.first;
        row(network_.observed, D + d)[e] = observed.second;
      }
      if (args_.mask.data) {
        const Strided& mask = args_.mask;
        const bool is_known =
            is_there && static_cast<const uint8_t*>(mask.data)[n * mask.n + d * mask.c] != 0;
        row(network_.known, d)[e] = is_known ? 1.0f : 0.0f;
        row(network_.known, D + d)[e] = element(args_.values);
      }
    });
  }

  __device__ __forceinline__ void step(int64_t to, bool is_last, const float* of_step,
                                       const float* out) const {
    const int E = tiles_.num_examples, D = network_.D;
    const Row& coefficients = *reinterpret_cast<const Row*>(of_step + network_.row);
    float* const state = args_.state(to);
    const bool is_drawn = args_.is_drawn(to), is_noised = args_.is_noised(to);
    for_places(D, E, [&](int d, int e) {
      float& place = row(0, d)[e];
      Observed observed{};
      if (args_.y.data) {
        observed = {row(network_.observed, d)[e], row(network_.observed, D + d)[e]};
      }
      const Outputs outputs = Process::outputs(out + d * E + e, D * E);
      float x = Process::step(coefficients, place, outputs, args_.y.data, observed, is_drawn,
                              is_drawn ? row(network_.numbers, d)[e] : 0.0f);
      if (args_.mask.data) {
        float value = row(network_.known, D + d)[e];
        if (is_noised) {
          value = Process::noised(of_step + network_.levels, value,
                                  row(network_.noise_of_known, d)[e]);
        }
        x = row(network_.known, d)[e] != 0.0f ? value : x;
      }
      place = x;
      if (e >= count_) return;
      const int64_t element = (first_ + e) * D + d;
      if (state) state[element] = x;
      if (is_last) args_.out[element] = x;
    });
  }

  const TrajectoryArgs& args_;
};

template <class Process>
__global__ void __launch_bounds__(kMostThreads, 2)
    trajectory_tile_per_block(const __grid_constant__ KernelArgs args) {
  Trajectory<Process>(args).run();
}

template <class Process>
void run(const TrajectoryArgs& args, cudaStream_t stream) {
  constexpr int kColumns = sizeof(typename Process::Row) / sizeof(float);
  const ResidentNetwork network(args.D, args.network, kColumns, args.y.data, args.mask.data,
                                args.levels);
  const KernelArgs given{args, VectorTiles(args.N, 1, args.network, network)};
  launch("trajectory_tile_per_block", trajectory_tile_per_block<Process>,
         grid_of(args.N, 1, given.tiles.num_examples), given.tiles.num_threads,
         given.tiles.bytes(), stream, given);
}

}  // namespace

namespace cuda {

void trajectory(const TrajectoryArgs& args, void* stream_address) {
  const auto stream = static_cast<cudaStream_t>(stream_address);
  check_dense(args.network);
  if (args.N == 0) return;
  if (args.is_binomial) return run<BinomialProcess>(args, stream);
  if (args.is_learned) return run<GaussianProcess<true>>(args, stream);
  run<GaussianProcess<false>>(args, stream);
}

}  // namespace cuda
}  // namespace dpm
