// The CPU launcher of `step`: loops over the mathematics of step.h.
#include "step.h"

#include "loop.h"

namespace dpm {
namespace DPM_ISA {
namespace {

// kPlain: nothing is observed, known or added.
template <class Storage, bool kLearned, bool kPlain>
void run(const StepArgs& given, int num_threads) {
  using T = VectorOf<Storage>;
  const auto* rows = static_cast<const ReverseRow<ScalarOf<Storage>>*>(given.rows);
  const bool is_run = given.is_run();
  const auto visit = [&](int64_t n, int64_t piece, const auto& numbers) {
    // Copies: what is stored might otherwise have changed the originals, for all a compiler knows.
    const StepArgs args = given;
    const ReverseRow<ScalarOf<Storage>> row = rows[n];
    for_elements<T>(args.extent, is_run, n, piece, numbers, [&](const auto& e, const float* eps) {
      const T x_t = load<Storage>(args.x_t, args.x_dtype, e);
      const T mu_out = load<Storage>(args.mu_out, args.out_dtype, e);
      const T sigma2_out = kLearned ? load<Storage>(args.sigma2_out, args.out_dtype, e) : T{};
      Moments<T> p = reverse_moments<kLearned>(row, x_t, mu_out, sigma2_out);
      if (!kPlain && args.y.data) {
        p = observe(p, load<Storage>(args.y, args.x_dtype, e),
                    load<Storage>(args.sigma2_y, DType::float32, e));
      }
      if (!kPlain && args.drift.data) {
        p.mu = p.mu + p.sigma2 * load<Storage>(args.drift, args.x_dtype, e);
      }
      T x_prev = with_noise(p, lanes_as<T>(eps));
      if (!kPlain && args.mask.data) {
        x_prev = select(load_mask<T>(args.mask, e), load<Storage>(args.values, args.x_dtype, e),
                        x_prev);
      }
      store<Storage>(args.x_prev, args.x_dtype, e, x_prev);
    });
  };
  for_random<Normals>(given.extent, given.noise, !given.deterministic, num_threads, visit);
}

template <class Storage, bool kLearned>
void run(const StepArgs& args, int num_threads) {
  if (args.y.data || args.drift.data || args.mask.data) {
    return run<Storage, kLearned, false>(args, num_threads);
  }
  run<Storage, kLearned, true>(args, num_threads);
}

}  // namespace

void step(const StepArgs& args, int num_threads) {
  with_storage(args.x_dtype, args.out_dtype, [&](auto storage) {
    using Storage = decltype(storage);
    if (args.sigma2_out.data) return run<Storage, true>(args, num_threads);
    run<Storage, false>(args, num_threads);
  });
}

}  // namespace DPM_ISA
}  // namespace dpm
