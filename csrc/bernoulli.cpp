// The CPU launchers of binomial diffusion: loops over the mathematics of bernoulli.h.
#include "bernoulli.h"

#include "loop.h"

namespace dpm {
namespace DPM_ISA {
namespace {

template <class Storage>
void noise(const BernoulliNoiseArgs& args, int num_threads) {
  using T = VectorOf<Storage>;
  struct Rates {
    ScalarOf<Storage> of_bit[2];
  };
  const auto* rows = static_cast<const Rates*>(args.rows);
  const bool is_run = args.is_run();
  const auto visit = [&](int64_t n, int64_t piece, const auto& numbers) {
    const Rates rates = rows[n];
    for_elements<T>(args.extent, is_run, n, piece, numbers, [&](const auto& e, const float* u) {
      const T x_0 = load<Storage>(args.x_0, args.dtype, e);
      const T x_t = bernoulli_noised(rates.of_bit, x_0, lanes_as<T>(u));
      store<Storage>(args.x_t, args.dtype, e, x_t);
    });
  };
  for_random<Uniforms>(args.extent, args.noise, true, num_threads, visit);
}

template <class Storage>
void step(const BernoulliStepArgs& args, int num_threads) {
  using T = VectorOf<Storage>;
  const auto* rows = static_cast<const BernoulliRow<ScalarOf<Storage>>*>(args.rows);
  const bool is_run = args.is_run();
  const auto visit = [&](int64_t n, int64_t piece, const auto& numbers) {
    const BernoulliRow<ScalarOf<Storage>> row = rows[n];
    for_elements<T>(args.extent, is_run, n, piece, numbers, [&](const auto& e, const float* u) {
      T shift{};
      if (args.y.data) {
        const T y = load<Storage>(args.y, args.x_dtype, e);
        shift = bernoulli_observed(y, load<Storage>(args.flip, args.x_dtype, e));
      }
      if (args.drift.data) shift = shift + load<Storage>(args.drift, args.x_dtype, e);
      const T x_t = load<Storage>(args.x_t, args.x_dtype, e);
      const T logit_out = load<Storage>(args.logit_out, args.out_dtype, e);
      const Odds<T> odds = bernoulli_odds(row, x_t, logit_out, shift);
      T x_prev = args.deterministic ? bernoulli_likelier(odds)
                                    : bernoulli_drawn(odds, lanes_as<T>(u));
      if (args.mask.data) {
        x_prev = select(load_mask<T>(args.mask, e), load<Storage>(args.values, args.x_dtype, e),
                        x_prev);
      }
      store<Storage>(args.x_prev, args.x_dtype, e, x_prev);
    });
  };
  for_random<Uniforms>(args.extent, args.noise, !args.deterministic, num_threads, visit);
}

template <class Storage, bool kGradient>
void kl(const BernoulliKlArgs& args, int num_threads) {
  using T = VectorOf<Storage>;
  const auto* rows = static_cast<const BernoulliRow<ScalarOf<Storage>>*>(args.rows);
  const int64_t num_pieces = args.extent.num_pieces();
  for_pieces(args.extent, num_threads, [&](int64_t n, int64_t piece) {
    const BernoulliRow<ScalarOf<Storage>> row = rows[n];
    Sum<T> nats;
    for_elements<T>(args.extent, args.is_run(), n, piece, [&](const auto& e) {
      const T x_0 = load<Storage>(args.x_0, args.x_dtype, e);
      const T x_t = load<Storage>(args.x_t, args.x_dtype, e);
      const T logit_out = load<Storage>(args.logit_out, args.out_dtype, e);
      const BitNats<T> term = bernoulli_nats(row, x_0, x_t, logit_out);
      nats.add(term.nats, e.count);
      if constexpr (kGradient) {
        store<Storage>(args.grad_logit_out, args.out_dtype, e, term.slope);
      }
    });
    (num_pieces > 1 ? args.pieces + n * num_pieces + piece : args.nats + n)[0] = nats.total();
  });
  if (num_pieces == 1) return;
  for (int64_t n = 0; n < args.extent.N; ++n) bernoulli_write_pieces(args, n);
}

}  // namespace

void bernoulli_noise(const BernoulliNoiseArgs& args, int num_threads) {
  with_storage(args.dtype, args.dtype,
               [&](auto storage) { noise<decltype(storage)>(args, num_threads); });
}

void bernoulli_step(const BernoulliStepArgs& args, int num_threads) {
  with_storage(args.x_dtype, args.out_dtype,
               [&](auto storage) { step<decltype(storage)>(args, num_threads); });
}

void bernoulli_kl(const BernoulliKlArgs& args, int num_threads) {
  with_storage(args.x_dtype, args.out_dtype, [&](auto storage) {
    using Storage = decltype(storage);
    if (args.grad_logit_out.data) return kl<Storage, true>(args, num_threads);
    kl<Storage, false>(args, num_threads);
  });
}

}  // namespace DPM_ISA
}  // namespace dpm
