// The CUDA launchers of binomial diffusion: loads, the mathematics of bernoulli.h, stores.
#include "bernoulli.h"

#include "launch.cuh"
#include "philox.h"
#include "team.cuh"
#include "vec.cuh"

namespace dpm {
namespace {

// Blocks on a multiprocessor: asking for more makes ptxas spill.
template <class Storage>
constexpr int kBlocks = std::is_same_v<Storage, float> ? 4 : 3;

__device__ __forceinline__ Floats4 uniforms_of(const ExampleNoise& noise, const Quad& at) {
  const Group<float> u = uniforms4(noise, static_cast<uint32_t>(at.first / 4));
  return {{u.x[0], u.x[1], u.x[2], u.x[3]}};
}

template <class Storage>
__global__ void __launch_bounds__(kThreads)
    noise_piece_per_team(const BernoulliNoiseArgs args, Team team, bool aligned) {
  const Share share = share_of_thread(args.extent, team);
  const auto* row = static_cast<const float*>(args.rows) + 2 * share.n;
  const float rates[2] = {row[0], row[1]};
  const bool is_valid = is_timestep(args.noise.t[share.n]);
  const ExampleNoise noise = example_noise(args.noise, share.n);
  for_quads(share, team, aligned, [&](const Quad& at) {
    const Floats4 x_0 = load4<Storage>(args.x_0, args.dtype, args.extent, at);
    const Floats4 u = uniforms_of(noise, at);
    Floats4 x_t;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x_t.lane[i] = is_valid ? bernoulli_noised(rates, x_0.lane[i], u.lane[i]) : NAN;
    }
    store4<Storage>(args.x_t, args.dtype, args.extent, at, x_t);
  });
}

template <class Storage>
__global__ void __launch_bounds__(kThreads)
    step_piece_per_team(const BernoulliStepArgs args, Team team, bool aligned) {
  const Share share = share_of_thread(args.extent, team);
  auto row = static_cast<const BernoulliRow<float>*>(args.rows)[share.n];
  const int64_t t = args.noise.t[share.n];
  if (t == 0 || !is_timestep(t)) row.o[0] = row.o[1] = NAN;
  const ExampleNoise noise = example_noise(args.noise, share.n);
  for_quads(share, team, aligned, [&](const Quad& at) {
    const auto load_x = [&](const Strided& tensor) {
      return load4<Storage>(tensor, args.x_dtype, args.extent, at);
    };
    const Floats4 x_t = load_x(args.x_t);
    const Floats4 logit_out = load4<Storage>(args.logit_out, args.out_dtype, args.extent, at);
    Floats4 shift{}, x_prev, u{};
    if (args.y.data) {
      const Floats4 y = load_x(args.y), flip = load_x(args.flip);
#pragma unroll
      for (int i = 0; i < 4; ++i) shift.lane[i] = bernoulli_observed(y.lane[i], flip.lane[i]);
    }
    if (args.drift.data) {
      const Floats4 drift = load_x(args.drift);
#pragma unroll
      for (int i = 0; i < 4; ++i) shift.lane[i] += drift.lane[i];
    }
    if (!args.deterministic) u = uniforms_of(noise, at);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Odds<float> odds =
          bernoulli_odds(row, x_t.lane[i], logit_out.lane[i], shift.lane[i]);
      x_prev.lane[i] =
          args.deterministic ? bernoulli_likelier(odds) : bernoulli_drawn(odds, u.lane[i]);
    }
    if (args.mask.data) {
      const Floats4 values = load_x(args.values);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool known = i < at.count && *address<const uint8_t>(args.mask, args.extent, at.n,
                                                                   at.first + i) != 0;
        x_prev.lane[i] = known ? values.lane[i] : x_prev.lane[i];
      }
    }
    store4<Storage>(args.x_prev, args.x_dtype, args.extent, at, x_prev);
  });
}

template <class Storage, bool kGradient>
__global__ void __launch_bounds__(kThreads, kBlocks<Storage>)
    kl_piece_per_team(const BernoulliKlArgs args, Team team, bool aligned) {
  const Share share = share_of_thread(args.extent, team);
  const auto row = static_cast<const BernoulliRow<float>*>(args.rows)[share.n];
  double sums[1] = {};
  for_quads(share, team, aligned, [&](const Quad& at) {
    const Floats4 x_0 = load4<Storage>(args.x_0, args.x_dtype, args.extent, at);
    const Floats4 x_t = load4<Storage>(args.x_t, args.x_dtype, args.extent, at);
    const Floats4 logit_out = load4<Storage>(args.logit_out, args.out_dtype, args.extent, at);
    Floats4 slope;
    float nats = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const BitNats<float> term =
          bernoulli_nats(row, x_0.lane[i], x_t.lane[i], logit_out.lane[i]);
      nats += i < at.count ? term.nats : 0.0f;
      slope.lane[i] = term.slope;
    }
    sums[0] += nats;
    if constexpr (kGradient) {
      store4<Storage>(args.grad_logit_out, args.out_dtype, args.extent, at, slope);
    }
  });
  team_sum(sums, team);
  if (!share.leads) return;
  const int64_t num_pieces = args.extent.num_pieces();
  (num_pieces > 1 ? args.pieces + share.n * num_pieces + share.piece : args.nats + share.n)[0] =
      sums[0];
}

__global__ void __launch_bounds__(kThreads) sum_pieces(const BernoulliKlArgs args) {
  const int64_t n = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (n < args.extent.N) bernoulli_write_pieces(args, n);
}

// Whether quads of all these tensors can be loaded in one access.
template <class... Tensors>
bool all_aligned(const Extent& extent, DType dtype, const Tensors&... tensors) {
  return (quads_aligned(tensors, dtype, extent) && ...);
}

bool all_float(DType x, DType out) { return x == DType::float32 && out == DType::float32; }

}  // namespace

namespace cuda {

void bernoulli_noise(const BernoulliNoiseArgs& args, void* stream_address) {
  const auto stream = static_cast<cudaStream_t>(stream_address);
  const bool aligned = all_aligned(args.extent, args.dtype, args.x_0, args.x_t);
  const auto kernel = all_float(args.dtype, args.dtype) ? noise_piece_per_team<float>
                                                        : noise_piece_per_team<Stored>;
  launch_teams("bernoulli_noise_piece_per_team", kernel, args, aligned, args.extent.num_pieces(),
               stream);
}

void bernoulli_step(const BernoulliStepArgs& args, void* stream_address) {
  const auto stream = static_cast<cudaStream_t>(stream_address);
  const bool aligned = all_aligned(args.extent, args.x_dtype, args.x_t, args.values, args.y,
                                   args.flip, args.drift, args.x_prev) &&
                       all_aligned(args.extent, args.out_dtype, args.logit_out);
  const auto kernel = all_float(args.x_dtype, args.out_dtype) ? step_piece_per_team<float>
                                                              : step_piece_per_team<Stored>;
  launch_teams("bernoulli_step_piece_per_team", kernel, args, aligned, args.extent.num_pieces(),
               stream);
}

void bernoulli_kl(const BernoulliKlArgs& args, void* stream_address) {
  const auto stream = static_cast<cudaStream_t>(stream_address);
  const bool aligned =
      all_aligned(args.extent, args.x_dtype, args.x_0, args.x_t) &&
      all_aligned(args.extent, args.out_dtype, args.logit_out, args.grad_logit_out);
  const bool gradient = args.grad_logit_out.data;
  auto kernel = gradient ? kl_piece_per_team<Stored, true> : kl_piece_per_team<Stored, false>;
  if (all_float(args.x_dtype, args.out_dtype)) {
    kernel = gradient ? kl_piece_per_team<float, true> : kl_piece_per_team<float, false>;
  }
  launch_teams("bernoulli_kl_piece_per_team", kernel, args, aligned, args.extent.num_pieces(),
               stream);
  if (args.extent.num_pieces() > 1) {
    const dim3 blocks = grid_of(args.extent.N, 1, kThreads);
    launch("bernoulli_sum_pieces", sum_pieces, blocks, kThreads, 0, stream, args);
  }
}

}  // namespace cuda
}  // namespace dpm
