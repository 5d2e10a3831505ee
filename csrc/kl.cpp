// The CPU launcher of `kl`: loops over the mathematics of kl.h.
#include "kl.h"

#include "bins.h"
#include "loop.h"

namespace dpm {
namespace DPM_ISA {
namespace {

enum class Wanted { nats, gradients, row_gradient };

template <class Storage, bool kLearned, Wanted kWanted>
void add_piece(const KlArgs& given, const Row<ScalarOf<Storage>>& given_row, int64_t n,
               int64_t piece, double* sums) {
  // Copies: what is stored might otherwise have changed the originals, for all a compiler knows.
  const KlArgs args = given;
  const auto row = given_row;
  using T = VectorOf<Storage>;
  constexpr int kColumns = kWanted == Wanted::row_gradient ? kRowColumns : 0;
  Sum<T> nats, columns[kColumns + 1];
  for_elements<T>(args.extent, args.is_run(), n, piece, [&](const auto& e) {
    const T x_0 = load<Storage>(args.x_0, args.x_dtype, e);
    const T x_t = load<Storage>(args.x_t, args.x_dtype, e);
    const T mu_out = load<Storage>(args.mu_out, args.out_dtype, e);
    const T sigma2_out = kLearned ? load<Storage>(args.sigma2_out, args.out_dtype, e) : T{};
    const ReverseVariance<T> variance = reverse_variance<kLearned>(row, sigma2_out);
    const KlMean<T> mean = kl_mean(row, variance, x_0, x_t, mu_out);
    const KlNats<T> term = kl_nats(row, variance, mean.difference);
    nats.add(term.nats, e.count);
    if constexpr (kWanted != Wanted::nats) {
      const KlGradient<T> gradient = kl_gradient(row, variance, mean, term);
      store<Storage>(args.grad_x_0, args.x_dtype, e, gradient.x_0);
      store<Storage>(args.grad_x_t, args.x_dtype, e, gradient.x_t);
      store<Storage>(args.grad_mu_out, args.out_dtype, e, gradient.mu_out);
      store<Storage>(args.grad_sigma2_out, args.out_dtype, e, gradient.sigma2_out);
    }
    if constexpr (kWanted == Wanted::row_gradient) {
      T column[kRowColumns];
      kl_row_gradient(row, variance, mean, term, x_0, x_t, mu_out, sigma2_out, column);
      for (int k = 0; k < kRowColumns; ++k) columns[k].add(column[k], e.count);
    }
  });
  sums[0] = nats.total();
  for (int k = 0; k < kColumns; ++k) sums[1 + k] = columns[k].total();
}

// The decoder of a discretized edge, in double.
void add_piece_of_bins(const KlArgs& args, const Row<double>& row, int64_t n, int64_t piece,
                       double* sums) {
  for (int k = 0; k < kKlSums; ++k) sums[k] = 0;
  for_elements<double>(args.extent, false, n, piece, [&](const Elements<false>& e) {
    const double x_0 = load_one(args.x_0, args.x_dtype, e);
    const double x_t = load_one(args.x_t, args.x_dtype, e);
    const double mu_out = load_one(args.mu_out, args.out_dtype, e);
    const bool learned = args.sigma2_out.data;
    const double sigma2_out = learned ? load_one(args.sigma2_out, args.out_dtype, e) : 0;
    const auto variance = learned ? reverse_variance<true>(row, sigma2_out)
                                  : reverse_variance<false>(row, sigma2_out);
    const KlMean<double> mean = kl_mean(row, variance, x_0, x_t, mu_out);
    const KlNats<double> term =
        bin_nats(args.edge, args.bins, x_0, mean.difference, row.base / variance.u);
    const KlGradient<double> gradient = kl_gradient(row, variance, mean, term);
    store_one(args.grad_x_0, args.x_dtype, e, gradient.x_0);
    store_one(args.grad_x_t, args.x_dtype, e, gradient.x_t);
    store_one(args.grad_mu_out, args.out_dtype, e, gradient.mu_out);
    store_one(args.grad_sigma2_out, args.out_dtype, e, gradient.sigma2_out);
    double column[kRowColumns];
    kl_row_gradient(row, variance, mean, term, x_0, x_t, mu_out, sigma2_out, column);
    sums[0] += term.nats;
    for (int k = 0; k < kRowColumns; ++k) sums[1 + k] += column[k];
  });
}

template <class Storage, bool kLearned, Wanted kWanted>
void run(const KlArgs& args, int num_threads) {
  const auto* rows = static_cast<const ReverseRow<ScalarOf<Storage>>*>(args.rows);
  const int64_t num_pieces = args.extent.num_pieces();
  check_variances(rows, args.extent.N, kLearned, false);
  for_pieces(args.extent, num_threads, [&](int64_t n, int64_t piece) {
    double of_event[kKlSums];
    double* sums = num_pieces > 1 ? args.pieces + (n * num_pieces + piece) * kKlSums : of_event;
    if (args.edge != Edge::decoder && rows[n].is_first > 0) {
      add_piece_of_bins(args, Row<double>(rows[n]), n, piece, sums);
    } else {
      using R = ScalarOf<Storage>;
      add_piece<Storage, kLearned, kWanted>(args, Row<R>(rows[n]), n, piece, sums);
    }
    if (num_pieces == 1) kl_write(args, n, sums);
  });
  if (num_pieces == 1) return;
  for (int64_t n = 0; n < args.extent.N; ++n) {
    for (int k = 0; k < (args.grad_rows ? kKlSums : 1); ++k) kl_write_pieces(args, n, k);
  }
}

template <class Storage, bool kLearned>
void run_wanted(const KlArgs& args, int num_threads) {
  if (args.grad_rows) return run<Storage, kLearned, Wanted::row_gradient>(args, num_threads);
  if (args.wants_gradients()) return run<Storage, kLearned, Wanted::gradients>(args, num_threads);
  run<Storage, kLearned, Wanted::nats>(args, num_threads);
}

}  // namespace

void kl(const KlArgs& args, int num_threads) {
  with_storage(args.x_dtype, args.out_dtype, [&](auto storage) {
    using Storage = decltype(storage);
    if (args.sigma2_out.data) return run_wanted<Storage, true>(args, num_threads);
    run_wanted<Storage, false>(args, num_threads);
  });
}

}  // namespace DPM_ISA
}  // namespace dpm
