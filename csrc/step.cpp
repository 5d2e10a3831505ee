// The CPU launcher of `step`: loops over the mathematics of step.h.
#include "step.h"

#include "loop.h"
#include "philox.h"

namespace dpm {
namespace DPM_ISA {
namespace {

// Elements whose noise is made together and stays in the L1 cache until it is used.
constexpr int kChunk = 1024;

template <class Storage, bool kLearned, bool kFull>
DPM_INLINE void step_elements(const StepArgs& args, const ReverseRow<ScalarOf<Storage>>& row,
                              const Elements<kFull>& e, const float* eps) {
  using T = VectorOf<Storage>;
  const T x_t = load<Storage>(args.x_t, args.x_dtype, e);
  const T mu_out = load<Storage>(args.mu_out, args.out_dtype, e);
  const T sigma2_out = kLearned ? load<Storage>(args.sigma2_out, args.out_dtype, e) : T{};
  Moments<T> p = reverse_moments<kLearned>(row, x_t, mu_out, sigma2_out);
  if (args.y.data) {
    p = observe(p, load<Storage>(args.y, args.x_dtype, e),
                load<Storage>(args.sigma2_y, DType::float32, e));
  }
  if (args.drift.data) p.mu = p.mu + p.sigma2 * load<Storage>(args.drift, args.x_dtype, e);
  T x_prev = with_noise(p, lanes_as<T>(eps));
  if (args.mask.data) {
    x_prev = select(load_mask<T>(args.mask, e), load<Storage>(args.values, args.x_dtype, e), x_prev);
  }
  store<Storage>(args.x_prev, args.x_dtype, e, x_prev);
}

// Nothing to load but x_t and the network's outputs, each in one run of floats: how many of the
// elements were done, a multiple of 16.
template <bool kLearned>
int step_run(const StepArgs& args, const ReverseRow<float>& row, const Elements<false>& e,
             const float* eps) {
  using T = f32x16;
  const float* x_t = at<float>(args.x_t, e);
  const float* mu_out = at<float>(args.mu_out, e);
  const float* sigma2_out = kLearned ? at<float>(args.sigma2_out, e) : nullptr;
  float* x_prev = at<float>(args.x_prev, e);
  const ReverseRow<float> r = row;  // stores below cannot change a copy
  int i = 0;
  for (; i + 16 <= e.count; i += 16) {
    const T s = kLearned ? dpm::load<T>(sigma2_out + i) : T{};
    const auto p = reverse_moments<kLearned>(r, dpm::load<T>(x_t + i), dpm::load<T>(mu_out + i), s);
    dpm::store(x_prev + i, with_noise(p, dpm::load<T>(eps + i)));
  }
  return i;
}

template <class Storage, bool kLearned>
void step_piece(const StepArgs& args, bool run, bool plain, int64_t n, int64_t piece) {
  constexpr int kStep = kLanes<VectorOf<Storage>>;
  const auto& row = static_cast<const ReverseRow<ScalarOf<Storage>>*>(args.rows)[n];
  const auto [seed, stream, ids, t] = args.noise;
  const ExampleNoise noise = example_noise(seed, stream, static_cast<uint32_t>(t[n]),
                                           static_cast<uint64_t>(ids[n]));
  const Extent& extent = args.extent;
  const int64_t begin = piece * Extent::kPiece;
  const int64_t end = smaller(begin + Extent::kPiece, extent.num_elements());
  int64_t c = begin / extent.S, s = begin % extent.S;
  float eps[kChunk + 16];
  if (args.deterministic) {
    __builtin_memset(eps, 0, sizeof(float) * (smaller(kChunk, end - begin) + 16));
  }
  for (int64_t first = begin; first < end; first += kChunk) {
    const int count = static_cast<int>(smaller(kChunk, end - first));
    if (!args.deterministic) {
      fill_blocks<Normals>(noise, static_cast<uint32_t>(first / 4), count, eps);
    }
    for (int i = 0; i < count;) {
      const int stop = i + static_cast<int>(smaller(count - i, extent.S - s));
      if constexpr (std::is_same_v<Storage, float>) {
        if (plain) {
          const int done = step_run<kLearned>(args, row, {n, c, s, stop - i}, eps + i);
          i += done, s += done;
        }
      }
      if constexpr (kStep > 1) {
        for (; run && i + kStep <= stop; i += kStep, s += kStep) {
          step_elements<Storage, kLearned>(args, row, Elements<true>{n, c, s, kStep}, eps + i);
        }
      }
      for (int lanes; i < stop; i += lanes, s += lanes) {
        lanes = static_cast<int>(smaller(kStep, stop - i));
        step_elements<Storage, kLearned>(args, row, Elements<false>{n, c, s, lanes}, eps + i);
      }
      if (s == extent.S) ++c, s = 0;
    }
  }
}

template <class Storage, bool kLearned>
void run(const StepArgs& args, int num_threads) {
  const bool run = args.is_run();
  const bool plain = run && !(args.y.data || args.drift.data || args.mask.data);
  for_pieces(args.extent, num_threads, [&](int64_t n, int64_t piece) {
    step_piece<Storage, kLearned>(args, run, plain, n, piece);
  });
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
