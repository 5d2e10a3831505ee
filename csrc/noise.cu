// The CUDA launchers of `noise` and of plain random numbers: four elements from one Philox call.
#include "noise.h"

#include "launch.cuh"
#include "team.cuh"
#include "vec.cuh"

namespace dpm {
namespace {

struct Place {
  int64_t n, group;
};

// The group of four of this thread, where every group of every example has one.
__device__ __forceinline__ Place place_of_thread(int64_t num_groups) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t n = i / num_groups;
  return {n, i - n * num_groups};
}

inline dim3 one_thread_per_group(int64_t N, int64_t num_groups) {
  return grid_of(N, num_groups, kThreads);
}

__device__ __forceinline__ int count_of_group(int64_t first, int64_t num_elements) {
  return static_cast<int>(num_elements - first < 4 ? num_elements - first : 4);
}

template <class Storage>
__global__ void __launch_bounds__(kThreads)
    noise_group_per_thread(const NoiseArgs args, int64_t num_groups, bool aligned) {
  const Place place = place_of_thread(num_groups);
  if (place.n >= args.extent.N) return;
  const int64_t first = 4 * place.group;
  const Quad at{place.n, first, count_of_group(first, args.extent.num_elements()), aligned};
  auto row = static_cast<const NoiseRow<float>*>(args.coefficients)[place.n];
  if (!is_timestep(args.source.t[place.n])) row.signal = NAN;
  const Floats4 x_0 = load4<Storage>(args.x_0, args.dtype, args.extent, at);
  const Group<float> eps = normals4(example_noise(args.source, place.n),
                                    static_cast<uint32_t>(place.group));
  Floats4 x_t;
#pragma unroll
  for (int i = 0; i < 4; ++i) x_t.lane[i] = noised(row, x_0.lane[i], eps.x[i]);
  store4<Storage>(args.x_t, args.dtype, args.extent, at, x_t);
}

// Without kSums only x_0 is differentiated, and no noise is needed.
template <class Storage, bool kSums>
__global__ void __launch_bounds__(kThreads, 2)
    noise_gradient_piece_per_team(const NoiseGradientArgs args, Team team, bool aligned) {
  const Share share = share_of_thread(args.extent, team);
  auto row = static_cast<const NoiseRow<float>*>(args.coefficients)[share.n];
  const bool is_valid = is_timestep(args.source.t[share.n]);
  if (!is_valid) row.signal = NAN;
  const ExampleNoise example = example_noise(args.source, share.n);
  double sums[kNoiseSums] = {};
  for_quads(share, team, aligned, [&](const Quad& at) {
    const Floats4 grad_x_t = load4<Storage>(args.grad_x_t, args.dtype, args.extent, at);
    Floats4 grad_x_0;
#pragma unroll
    for (int i = 0; i < 4; ++i) grad_x_0.lane[i] = grad_x_t.lane[i] * row.signal;
    store4<Storage>(args.grad_x_0, args.dtype, args.extent, at, grad_x_0);
    if constexpr (kSums) {
      // Beyond the event both are loaded as 0.
      const Floats4 x_0 = load4<Storage>(args.x_0, args.dtype, args.extent, at);
      const Group<float> eps = normals4(example, static_cast<uint32_t>(at.first / 4));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sums[0] += grad_x_t.lane[i] * x_0.lane[i];
        sums[1] += grad_x_t.lane[i] * eps.x[i];
      }
    }
  });
  if constexpr (kSums) {
    team_sum(sums, team);
    if (!share.leads) return;
    const int64_t num_pieces = args.extent.num_pieces();
    double* to = num_pieces > 1 ? args.pieces + (share.n * num_pieces + share.piece) * kNoiseSums
                                : args.grad_coefficients + share.n * kNoiseSums;
#pragma unroll
    for (int k = 0; k < kNoiseSums; ++k) to[k] = is_valid ? sums[k] : NAN;
  }
}

__global__ void __launch_bounds__(kThreads) noise_sum_pieces(const NoiseGradientArgs args) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < args.extent.N * kNoiseSums) {
    noise_write_pieces(args, i / kNoiseSums, static_cast<int>(i % kNoiseSums));
  }
}

template <RandomKind kRandom>
__global__ void __launch_bounds__(kThreads)
    random_group_per_thread(const FillArgs args, int64_t num_groups, bool aligned) {
  const Place place = place_of_thread(num_groups);
  if (place.n >= args.N) return;
  const int64_t first = 4 * place.group, from = place.n * args.num_elements + first;
  const int count = count_of_group(first, args.num_elements);
  const ExampleNoise example = example_noise(args.source, place.n);
  const auto group = static_cast<uint32_t>(place.group);
  const bool is_valid = is_timestep(args.source.t[place.n]);
  if constexpr (kRandom == RandomKind::words) {
    const Group<uint32_t> words = words4(example, group);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < count) static_cast<int64_t*>(args.out)[from + i] = is_valid ? int64_t{words.x[i]} : -1;
    }
  } else {
    Group<float> x =
        kRandom == RandomKind::normals ? normals4(example, group) : uniforms4(example, group);
    if (!is_valid) x = {{NAN, NAN, NAN, NAN}};
    if (args.dtype == DType::float64) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i < count) static_cast<double*>(args.out)[from + i] = x.x[i];
      }
      return;
    }
    const Strided out{args.out, args.num_elements, args.num_elements, 1};
    const Extent extent{args.N, 1, args.num_elements};
    store4<Stored>(out, args.dtype, extent, {place.n, first, count, aligned},
                   {{x.x[0], x.x[1], x.x[2], x.x[3]}});
  }
}

template <class Storage>
void run_gradient(const NoiseGradientArgs& args, bool aligned, cudaStream_t stream) {
  const auto kernel = args.grad_coefficients ? noise_gradient_piece_per_team<Storage, true>
                                             : noise_gradient_piece_per_team<Storage, false>;
  launch_teams("noise_gradient_piece_per_team", kernel, args, aligned, args.extent.num_pieces(),
               stream);
}

}  // namespace

namespace cuda {

void noise(const NoiseArgs& args, void* stream_address) {
  const auto stream = static_cast<cudaStream_t>(stream_address);
  const int64_t num_groups = (args.extent.num_elements() + 3) / 4;
  const bool aligned = quads_aligned(args.x_0, args.dtype, args.extent) &&
                       quads_aligned(args.x_t, args.dtype, args.extent);
  launch("noise_group_per_thread",
         args.dtype == DType::float32 ? noise_group_per_thread<float>
                                      : noise_group_per_thread<Stored>,
         one_thread_per_group(args.extent.N, num_groups), kThreads, 0, stream, args, num_groups,
         aligned);
}

void noise_gradient(const NoiseGradientArgs& args, void* stream_address) {
  const auto stream = static_cast<cudaStream_t>(stream_address);
  const bool aligned = quads_aligned(args.grad_x_t, args.dtype, args.extent) &&
                       quads_aligned(args.x_0, args.dtype, args.extent) &&
                       quads_aligned(args.grad_x_0, args.dtype, args.extent);
  if (args.dtype == DType::float32) {
    run_gradient<float>(args, aligned, stream);
  } else {
    run_gradient<Stored>(args, aligned, stream);
  }
  if (args.grad_coefficients && args.extent.num_pieces() > 1) {
    const dim3 blocks = grid_of(args.extent.N, kNoiseSums, kThreads);
    launch("noise_sum_pieces", noise_sum_pieces, blocks, kThreads, 0, stream, args);
  }
}

void fill(const FillArgs& args, void* stream_address) {
  const auto stream = static_cast<cudaStream_t>(stream_address);
  const int64_t num_groups = (args.num_elements + 3) / 4;
  const bool aligned = args.num_elements % 4 == 0 && reinterpret_cast<uintptr_t>(args.out) % 16 == 0;
  const auto run = [&](auto kernel) {
    launch("random_group_per_thread", kernel, one_thread_per_group(args.N, num_groups), kThreads, 0,
           stream, args, num_groups, aligned);
  };
  switch (args.random) {
    case RandomKind::words: return run(random_group_per_thread<RandomKind::words>);
    case RandomKind::uniforms: return run(random_group_per_thread<RandomKind::uniforms>);
    case RandomKind::normals: return run(random_group_per_thread<RandomKind::normals>);
  }
}

}  // namespace cuda
}  // namespace dpm
