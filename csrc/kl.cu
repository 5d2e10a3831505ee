// The CUDA launcher of `kl`: loads, the mathematics of kl.h, stores.
#include "kl.h"

#include "bins.h"
#include "launch.cuh"
#include "team.cuh"
#include "vec.cuh"

namespace dpm {
namespace {

enum class Wanted { nats, gradients, row_gradient };

// Blocks on a multiprocessor: asking for more makes ptxas spill.
template <class Storage, Wanted kWanted>
constexpr int blocks_of() {
  if (kWanted == Wanted::row_gradient) return 1;
  return std::is_same_v<Storage, Stored> ? 2 : 3;
}

template <class Base, int kCount>
__device__ __forceinline__ void write_sums(const KlArgs& args, const Share& share, Base base,
                                           const double (&sums)[kCount]) {
  const int64_t num_pieces = args.extent.num_pieces();
  double* nats = args.nats + share.n;
  double* columns = args.grad_rows + share.n * kRowColumns;
  if (num_pieces > 1) {
    nats = args.pieces + (share.n * num_pieces + share.piece) * kKlSums;
    columns = nats + 1;
  }
  *nats = base > 0 ? sums[0] : nan("");  // a row that is no variance must not look like one
  if constexpr (kCount > 1) {
    if (!args.grad_rows) return;
#pragma unroll
    for (int k = 1; k < kCount; ++k) columns[k - 1] = sums[k];
  }
}

// A piece of an event for each team. Rows of bins are left to the kernel below.
template <class Storage, bool kLearned, Wanted kWanted>
__global__ void __launch_bounds__(kThreads, blocks_of<Storage, kWanted>())
    kl_piece_per_team(const KlArgs args, Team team, bool aligned) {
  constexpr int kCount = kWanted == Wanted::row_gradient ? kKlSums : 1;
  Share share = share_of_thread(args.extent, team);
  const Row<float> row(static_cast<const ReverseRow<float>*>(args.rows)[share.n]);
  if (args.edge != Edge::decoder && row.is_first > 0) {
    share.end = share.begin;
    share.leads = false;
  }
  double sums[kCount] = {};
  for_quads(share, team, aligned, [&](const Quad& at) {
    const Floats4 x_0 = load4<Storage>(args.x_0, args.x_dtype, args.extent, at);
    const Floats4 x_t = load4<Storage>(args.x_t, args.x_dtype, args.extent, at);
    const Floats4 mu_out = load4<Storage>(args.mu_out, args.out_dtype, args.extent, at);
    Floats4 sigma2_out{};
    if constexpr (kLearned) {
      sigma2_out = load4<Storage>(args.sigma2_out, args.out_dtype, args.extent, at);
    }
    float nats = 0, columns[kCount] = {};
    Floats4 per_x_0, per_x_t, per_mu_out, per_sigma2_out;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const auto variance = reverse_variance<kLearned>(row, sigma2_out.lane[i]);
      const auto mean = kl_mean(row, variance, x_0.lane[i], x_t.lane[i], mu_out.lane[i]);
      const auto term = kl_nats(row, variance, mean.difference);
      const bool counts = i < at.count;
      nats += counts ? term.nats : 0.0f;
      if constexpr (kWanted != Wanted::nats) {
        const auto gradient = kl_gradient(row, variance, mean, term);
        per_x_0.lane[i] = gradient.x_0;
        per_x_t.lane[i] = gradient.x_t;
        per_mu_out.lane[i] = gradient.mu_out;
        per_sigma2_out.lane[i] = gradient.sigma2_out;
      }
      if constexpr (kWanted == Wanted::row_gradient) {
        float column[kRowColumns];
        kl_row_gradient(row, variance, mean, term, x_0.lane[i], x_t.lane[i], mu_out.lane[i],
                        sigma2_out.lane[i], column);
#pragma unroll
        for (int k = 0; k < kRowColumns; ++k) columns[1 + k] += counts ? column[k] : 0.0f;
      }
    }
    sums[0] += nats;
    if constexpr (kWanted == Wanted::row_gradient) {
#pragma unroll
      for (int k = 1; k < kCount; ++k) sums[k] += columns[k];
    }
    if constexpr (kWanted != Wanted::nats) {
      store4<Storage>(args.grad_x_0, args.x_dtype, args.extent, at, per_x_0);
      store4<Storage>(args.grad_x_t, args.x_dtype, args.extent, at, per_x_t);
      store4<Storage>(args.grad_mu_out, args.out_dtype, args.extent, at, per_mu_out);
      store4<Storage>(args.grad_sigma2_out, args.out_dtype, args.extent, at, per_sigma2_out);
    }
  });
  team_sum(sums, team);
  if (share.leads) write_sums(args, share, row.base, sums);
}

// The decoder of a discretized edge, in double: a piece of an event at t = 1 for each team, an
// element at a time for each thread.
__global__ void __launch_bounds__(kThreads, 1)
    kl_bins_piece_per_team(const KlArgs args, Team team) {
  Share share = share_of_thread(args.extent, team);
  const Row<double> row(static_cast<const ReverseRow<float>*>(args.rows)[share.n]);
  if (!(row.is_first > 0)) {
    share.end = share.begin;
    share.leads = false;
  }
  const bool learned = args.sigma2_out.data;
  double sums[kKlSums] = {};
#pragma unroll 1
  for (int64_t first = share.begin + share.rank; first < share.end; first += team.size()) {
    const Quad at{share.n, first, 1, false};
    const auto one = [&](const Strided& tensor, DType dtype) {
      return double(load4<Stored>(tensor, dtype, args.extent, at).lane[0]);
    };
    const auto put = [&](const Strided& tensor, DType dtype, double value) {
      store4<Stored>(tensor, dtype, args.extent, at, {{float(value)}});
    };
    const double x_0 = one(args.x_0, args.x_dtype), x_t = one(args.x_t, args.x_dtype);
    const double mu_out = one(args.mu_out, args.out_dtype);
    const double sigma2_out = learned ? one(args.sigma2_out, args.out_dtype) : 0;
    const auto variance = learned ? reverse_variance<true>(row, sigma2_out)
                                  : reverse_variance<false>(row, sigma2_out);
    const auto mean = kl_mean(row, variance, x_0, x_t, mu_out);
    const auto term = bin_nats(args.edge, args.bins, x_0, mean.difference, row.base / variance.u);
    const auto gradient = kl_gradient(row, variance, mean, term);
    put(args.grad_x_0, args.x_dtype, gradient.x_0);
    put(args.grad_x_t, args.x_dtype, gradient.x_t);
    put(args.grad_mu_out, args.out_dtype, gradient.mu_out);
    put(args.grad_sigma2_out, args.out_dtype, gradient.sigma2_out);
    double column[kRowColumns];
    kl_row_gradient(row, variance, mean, term, x_0, x_t, mu_out, sigma2_out, column);
    sums[0] += term.nats;
#pragma unroll
    for (int k = 0; k < kRowColumns; ++k) sums[1 + k] += column[k];
  }
  team_sum(sums, team);
  if (share.leads) write_sums(args, share, row.base, sums);
}

__global__ void __launch_bounds__(kThreads) kl_sum_pieces(const KlArgs args) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int num_sums = args.grad_rows ? kKlSums : 1;
  if (i < args.extent.N * num_sums) kl_write_pieces(args, i / num_sums, i % num_sums);
}

template <class Storage, bool kLearned>
void run(const KlArgs& args, bool aligned, cudaStream_t stream) {
  auto kernel = kl_piece_per_team<Storage, kLearned, Wanted::nats>;
  if (args.grad_rows) {
    kernel = kl_piece_per_team<Storage, kLearned, Wanted::row_gradient>;
  } else if (args.wants_gradients()) {
    kernel = kl_piece_per_team<Storage, kLearned, Wanted::gradients>;
  }
  launch_teams("kl_piece_per_team", kernel, args, aligned, args.extent.num_pieces(), stream);
}

}  // namespace

namespace cuda {

void kl(const KlArgs& args, void* stream_address) {
  const auto stream = static_cast<cudaStream_t>(stream_address);
  bool aligned = true;
  for (const Strided* x : {&args.x_0, &args.x_t, &args.grad_x_0, &args.grad_x_t}) {
    aligned = aligned && quads_aligned(*x, args.x_dtype, args.extent);
  }
  for (const Strided* z :
       {&args.mu_out, &args.sigma2_out, &args.grad_mu_out, &args.grad_sigma2_out}) {
    aligned = aligned && quads_aligned(*z, args.out_dtype, args.extent);
  }
  const bool learned = args.sigma2_out.data;
  if (args.x_dtype == DType::float32 && args.out_dtype == DType::float32) {
    learned ? run<float, true>(args, aligned, stream) : run<float, false>(args, aligned, stream);
  } else {
    learned ? run<Stored, true>(args, aligned, stream) : run<Stored, false>(args, aligned, stream);
  }
  const int64_t num_pieces = args.extent.num_pieces();
  if (args.edge != Edge::decoder) {
    const Team team = team_for(args.extent.num_elements());
    const dim3 grid = grid_of_teams(team, args.extent.N, num_pieces);
    launch("kl_bins_piece_per_team", kl_bins_piece_per_team, grid, kThreads, 0, stream, args, team);
  }
  if (num_pieces > 1) {
    const dim3 blocks = grid_of(args.extent.N, args.grad_rows ? kKlSums : 1, kThreads);
    launch("kl_sum_pieces", kl_sum_pieces, blocks, kThreads, 0, stream, args);
  }
}

}  // namespace cuda
}  // namespace dpm
