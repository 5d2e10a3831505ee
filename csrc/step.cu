// The CUDA launcher of `step`: loads, the mathematics of step.h, stores.
#include "step.h"

#include "launch.cuh"
#include "philox.h"
#include "team.cuh"
#include "vec.cuh"

namespace dpm {
namespace {

// Elements of a block: four quads a thread, which share the row and the first two rounds of Philox.
constexpr int64_t kPart = int64_t{4} * 4 * kThreads;

__device__ __forceinline__ void load_mask4(const Strided& tensor, const Extent& extent,
                                           const Quad& at, bool (&mask)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    mask[i] = i < at.count && *address<uint8_t>(tensor, extent, at.n, at.first + i) != 0;
  }
}

// A part of an event for each team. The second bound is the most that ptxas takes without spilling.
template <class Storage, bool kLearned, bool kConditioned>
__global__ void __launch_bounds__(kThreads, kConditioned ? 2 : 4)
    step_part_per_team(const StepArgs args, Team team, bool aligned) {
  const Share share = share_of_thread<kPart>(args.extent, team);
  const int64_t t = args.noise.t[share.n];
  auto row = static_cast<const ReverseRow<float>*>(args.rows)[share.n];
  // Values that no one has looked at: the result must not look like a sample.
  if (!(row.base >= 0) || t < 1 || t >= int64_t{1} << 24) row.b = NAN;
  const ExampleNoise noise = example_noise(args.noise, share.n);
  for_quads(share, team, aligned, [&](const Quad& at) {
    const Floats4 x_t = load4<Storage>(args.x_t, args.x_dtype, args.extent, at);
    const Floats4 mu_out = load4<Storage>(args.mu_out, args.out_dtype, args.extent, at);
    Floats4 sigma2_out{}, y{}, sigma2_y{}, drift{}, values{};
    bool mask[4] = {};
    if constexpr (kLearned) {
      sigma2_out = load4<Storage>(args.sigma2_out, args.out_dtype, args.extent, at);
    }
    if constexpr (kConditioned) {
      if (args.y.data) {
        y = load4<Storage>(args.y, args.x_dtype, args.extent, at);
        sigma2_y = load4<float>(args.sigma2_y, DType::float32, args.extent, at);
      }
      if (args.drift.data) drift = load4<Storage>(args.drift, args.x_dtype, args.extent, at);
      if (args.mask.data) {
        load_mask4(args.mask, args.extent, at, mask);
        values = load4<Storage>(args.values, args.x_dtype, args.extent, at);
      }
    }
    Group<float> eps{};
    if (!args.deterministic) eps = normals4(noise, static_cast<uint32_t>(at.first / 4));
    Floats4 x_prev;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      auto p = reverse_moments<kLearned>(row, x_t.lane[i], mu_out.lane[i], sigma2_out.lane[i]);
      if constexpr (kConditioned) {
        if (args.y.data) p = observe(p, y.lane[i], sigma2_y.lane[i]);
        p.mu += p.sigma2 * drift.lane[i];
      }
      x_prev.lane[i] = with_noise(p, eps.x[i]);
      if constexpr (kConditioned) x_prev.lane[i] = mask[i] ? values.lane[i] : x_prev.lane[i];
    }
    store4<Storage>(args.x_prev, args.x_dtype, args.extent, at, x_prev);
  });
}

template <class Storage, bool kLearned>
void run(const StepArgs& args, bool aligned, cudaStream_t stream) {
  const int64_t num_parts = (args.extent.num_elements() + kPart - 1) / kPart;
  const bool conditioned = args.y.data || args.drift.data || args.mask.data;
  const auto kernel = conditioned ? step_part_per_team<Storage, kLearned, true>
                                  : step_part_per_team<Storage, kLearned, false>;
  launch_teams("step_part_per_team", kernel, args, aligned, num_parts, stream);
}

}  // namespace

namespace cuda {

void step(const StepArgs& args, void* stream_address) {
  const auto stream = static_cast<cudaStream_t>(stream_address);
  bool aligned = quads_aligned(args.sigma2_y, DType::float32, args.extent);
  for (const Strided* x : {&args.x_t, &args.y, &args.drift, &args.values, &args.x_prev}) {
    aligned = aligned && quads_aligned(*x, args.x_dtype, args.extent);
  }
  for (const Strided* z : {&args.mu_out, &args.sigma2_out}) {
    aligned = aligned && quads_aligned(*z, args.out_dtype, args.extent);
  }
  const bool learned = args.sigma2_out.data;
  if (args.x_dtype == DType::float32 && args.out_dtype == DType::float32) {
    learned ? run<float, true>(args, aligned, stream) : run<float, false>(args, aligned, stream);
  } else {
    learned ? run<Stored, true>(args, aligned, stream) : run<Stored, false>(args, aligned, stream);
  }
}

}  // namespace cuda
}  // namespace dpm
