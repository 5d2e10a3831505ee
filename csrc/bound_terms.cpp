// The CPU launcher of `bound_terms`: a thread takes a tile of examples, 16 in the lanes, through a run
// of timesteps. Lanes never meet, so results depend on neither the number of threads nor the batch.
#include "bound_terms.h"

#include <omp.h>

#include "lane_process.h"
#include "tile.h"
#include "vector_network.h"

namespace dpm {
namespace DPM_ISA {
namespace {

// So few timesteps that threads end at about the same time, and so many that a tile is worth reading.
constexpr int64_t kRun = 8;

template <class Process>
class Terms {
 public:
  DPM_INLINE Terms(Arena& arena, const BoundTermsArgs& args, const VectorNetwork& network,
                   int64_t num_groups)
      : args_(args),
        tile_(arena, network, num_groups),
        examples_(arena.take<LaneExamples>(num_groups)),
        numbers_(arena.take<float>((args.D + 3) * kImages)),
        x_0_(arena.take<float>(num_groups * args.D * kImages)) {}

  // Of examples from n on, at t = first ... last.
  DPM_INLINE void run(int64_t n, int64_t num_groups, int64_t first, int64_t last) {
    const int64_t D = args_.D;
    for (int64_t g = 0; g < num_groups; ++g) {
      const int64_t from = n + g * kImages;
      examples_[g] = LaneExamples(args_.seed, args_.ids + from, count(from));
      for (int64_t d = 0; d < D; ++d) {
        store(x_0(g, d), load16(args_.x_0 + from * D + d, D, count(from)));
      }
    }
    for (int64_t t = first; t >= last; --t) {
      for (int64_t g = 0; g < num_groups; ++g) add_noise(t, g);
      tile_.evaluate(t, num_groups);
      double* const nats = args_.nats + (args_.first - t) * args_.N;
      for (int64_t g = 0; g < num_groups; ++g) write(t, g, n + g * kImages, nats);
    }
  }

 private:
  DPM_INLINE int count(int64_t n) const { return static_cast<int>(smaller(kImages, args_.N - n)); }
  DPM_INLINE float* x_0(int64_t g, int64_t d) const { return x_0_ + (g * args_.D + d) * kImages; }

  DPM_INLINE void add_noise(int64_t t, int64_t g) {
    fill_lanes<typename Process::Random>(
        examples_[g].at(args_.forward_stream, static_cast<uint32_t>(t)), args_.D, numbers_);
    for (int64_t d = 0; d < args_.D; ++d) {
      store(tile_.x(g, d), Process::noised(args_.levels + 2 * t, load<f32x16>(x_0(g, d)),
                                           load<f32x16>(numbers_ + d * kImages)));
    }
  }

  // Elements in their order, in double.
  DPM_INLINE void write(int64_t t, int64_t g, int64_t n, double* nats) const {
    const int64_t D = args_.D;
    const typename Process::RowOfTerms row(
        reinterpret_cast<const typename Process::Row*>(args_.rows)[t]);
    f64x16 sum{};
    for (int64_t d = 0; d < D; ++d) {
      const f64x16 term = to_double(
          Process::nats(row, load<f32x16>(x_0(g, d)), load<f32x16>(tile_.x(g, d)),
                        load<f32x16>(tile_.out(g, d)),
                        Process::kHasVariance ? tile_.out(g, D + d) : nullptr));
      sum.low = sum.low + term.low;
      sum.high = sum.high + term.high;
    }
    double lanes[kImages];
    store(lanes, sum.low);
    store(lanes + 8, sum.high);
    for (int i = 0; i < count(n); ++i) nats[n + i] = lanes[i];
  }

  const BoundTermsArgs& args_;
  VectorNetwork::Tile tile_;
  LaneExamples* examples_;
  float *numbers_, *x_0_;
};

template <class Process>
void run(const BoundTermsArgs& args, const VectorNetwork& network, int num_threads) {
  const int64_t num_groups = (args.N + kImages - 1) / kImages;
  const int64_t groups_of_tile = smaller(VectorNetwork::kTileGroups, num_groups);
  const int64_t num_tiles = (num_groups + groups_of_tile - 1) / groups_of_tile;
  const int64_t num_runs = (args.first - args.last + kRun) / kRun;
  const int threads = static_cast<int>(smaller(num_threads, num_tiles * num_runs));
  Arena needed(nullptr);
  Terms<Process>(needed, args, network, groups_of_tile);
  const Memory64 memory(needed.used() * threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Arena arena(memory.data() + needed.used() * omp_get_thread_num());
    Terms<Process> terms(arena, args, network, groups_of_tile);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < num_tiles * num_runs; ++i) {
      const int64_t group = i % num_tiles * groups_of_tile;
      const int64_t first = args.first - i / num_tiles * kRun;
      terms.run(group * kImages, smaller(groups_of_tile, num_groups - group), first,
                larger(first - kRun + 1, args.last));
    }
  }
}

}  // namespace

void bound_terms(const BoundTermsArgs& args, int num_threads) {
  if (!args.is_binomial) {
    check_variances(reinterpret_cast<const ReverseRow<float>*>(args.rows) + args.last,
                    args.first - args.last + 1, args.is_learned, false);
  }
  Arena needed(nullptr);
  VectorNetwork(needed, args);
  const Memory64 memory(needed.used());
  Arena arena(memory.data());
  const VectorNetwork network(arena, args);
  if (args.is_binomial) return run<BinomialProcess>(args, network, num_threads);
  if (args.is_learned) return run<GaussianProcess<true>>(args, network, num_threads);
  run<GaussianProcess<false>>(args, network, num_threads);
}

}  // namespace DPM_ISA
}  // namespace dpm
