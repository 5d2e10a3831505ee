// The CUDA launcher of `kl`: loads, the mathematics of kl.h, stores.
#include "kl.h"

#include "bins.h"
#include "launch.cuh"
#include "reduce.cuh"
#include "vec.cuh"

namespace dpm {
namespace {

constexpr int kThreads = 256;  // a 28 x 28 image is 196 quads, one for nearly each of them

enum class Wanted { nats, gradients, row_gradient };

// Blocks on a multiprocessor: asking for more makes ptxas spill.
template <Wanted kWanted>
constexpr int kBlocks = kWanted == Wanted::row_gradient ? 1 : 2;

template <int kCount>
__device__ __forceinline__ void write_sums(const KlArgs& args, int64_t n, int64_t piece,
                                           const double (&sums)[kCount]) {
  const int64_t num_pieces = args.extent.num_pieces();
  double* nats = args.nats + n;
  double* columns = args.grad_rows + n * kRowColumns;
  if (num_pieces > 1) {
    nats = args.pieces + (n * num_pieces + piece) * kKlSums;
    columns = nats + 1;
  }
  *nats = sums[0];
  if constexpr (kCount > 1) {
    if (!args.grad_rows) return;
#pragma unroll
    for (int k = 1; k < kCount; ++k) columns[k - 1] = sums[k];
  }
}

// One block for a piece of an event. Rows of bins are left to the kernel below.
template <class Storage, bool kLearned, Wanted kWanted>
__global__ void __launch_bounds__(kThreads, kBlocks<kWanted>)
    kl_piece_per_block(const KlArgs args, bool aligned) {
  constexpr int kCount = kWanted == Wanted::row_gradient ? kKlSums : 1;
  const int64_t num_pieces = args.extent.num_pieces();
  const int64_t n = blockIdx.x / num_pieces, piece = blockIdx.x - n * num_pieces;
  const Row<float> row(static_cast<const ReverseRow<float>*>(args.rows)[n]);
  if (args.edge != Edge::decoder && row.is_first > 0) return;
  const int64_t begin = piece * Extent::kPiece, num_elements = args.extent.num_elements();
  const int64_t end = begin + Extent::kPiece < num_elements ? begin + Extent::kPiece : num_elements;
  double sums[kCount] = {};
  for (int64_t first = begin + 4 * threadIdx.x; first < end; first += 4 * kThreads) {
    const Quad at{n, first, int(end - first < 4 ? end - first : 4), aligned};
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
  }
  block_sum<kThreads>(sums);
  if (threadIdx.x == 0) {
    // A row that is no variance must not look like one.
    if (!(row.base > 0)) sums[0] = nan("");
    write_sums(args, n, piece, sums);
  }
}

// The decoder of a discretized edge, in double: one block for a piece of an event at t = 1.
__global__ void __launch_bounds__(kThreads, 1) kl_bins_piece_per_block(const KlArgs args) {
  const int64_t num_pieces = args.extent.num_pieces();
  const int64_t n = blockIdx.x / num_pieces, piece = blockIdx.x - n * num_pieces;
  const Row<double> row(static_cast<const ReverseRow<float>*>(args.rows)[n]);
  if (!(row.is_first > 0)) return;
  const int64_t begin = piece * Extent::kPiece, num_elements = args.extent.num_elements();
  const int64_t end = begin + Extent::kPiece < num_elements ? begin + Extent::kPiece : num_elements;
  const bool learned = args.sigma2_out.data;
  double sums[kKlSums] = {};
  for (int64_t first = begin + threadIdx.x; first < end; first += kThreads) {
    const Quad at{n, first, 1, false};
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
  block_sum<kThreads>(sums);
  if (threadIdx.x == 0) {
    if (!(row.base > 0)) sums[0] = nan("");
    write_sums(args, n, piece, sums);
  }
}

__global__ void __launch_bounds__(kThreads) kl_sum_pieces(const KlArgs args) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int num_sums = args.grad_rows ? kKlSums : 1;
  if (i < args.extent.N * num_sums) kl_write_pieces(args, i / num_sums, i % num_sums);
}

template <class Storage, bool kLearned>
void run(const KlArgs& args, bool aligned, dim3 grid, cudaStream_t stream) {
  constexpr auto kName = "kl_piece_per_block";
  if (args.grad_rows) {
    launch(kName, kl_piece_per_block<Storage, kLearned, Wanted::row_gradient>, grid, kThreads, 0,
           stream, args, aligned);
  } else if (args.wants_gradients()) {
    launch(kName, kl_piece_per_block<Storage, kLearned, Wanted::gradients>, grid, kThreads, 0,
           stream, args, aligned);
  } else {
    launch(kName, kl_piece_per_block<Storage, kLearned, Wanted::nats>, grid, kThreads, 0, stream,
           args, aligned);
  }
}

}  // namespace

namespace cuda {

void kl(const KlArgs& args, void* stream_address) {
  const auto stream = static_cast<cudaStream_t>(stream_address);
  const int64_t num_pieces = args.extent.num_pieces();
  const dim3 grid = grid_of(args.extent.N, num_pieces);
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
    learned ? run<float, true>(args, aligned, grid, stream)
            : run<float, false>(args, aligned, grid, stream);
  } else {
    learned ? run<Stored, true>(args, aligned, grid, stream)
            : run<Stored, false>(args, aligned, grid, stream);
  }
  if (args.edge != Edge::decoder) {
    launch("kl_bins_piece_per_block", kl_bins_piece_per_block, grid, kThreads, 0, stream, args);
  }
  if (num_pieces > 1) {
    const dim3 blocks = grid_of(args.extent.N, args.grad_rows ? kKlSums : 1, kThreads);
    launch("kl_sum_pieces", kl_sum_pieces, blocks, kThreads, 0, stream, args);
  }
}

}  // namespace cuda
}  // namespace dpm
