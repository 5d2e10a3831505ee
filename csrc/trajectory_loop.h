// Reverse trajectories of tiles of examples: every thread takes its tiles through all timesteps, with
// x and all that a network makes of it in its cache. Lanes never meet, so results depend on neither
// the number of threads nor the batch.
//
// A Network has kTileGroups, the groups of a tile at most, and a class Tile, the examples of a thread
// in groups of 16:
//   Tile(arena, network, groups)   with its working memory
//   x(group, d)                    the lanes of an element, 16 floats
//   evaluate(t, groups)            computes the outputs from all x
//   out(group, k)                  the lanes of an output: mu_out from 0 on, sigma2_out from D on
#pragma once

#include <omp.h>

#include "lane_process.h"
#include "memory.h"
#include "tile.h"
#include "trajectory.h"

namespace dpm {
namespace DPM_ISA {

// One thread's tile with what goes along with the network's.
template <class Process, class Network>
class Trajectory {
 public:
  DPM_INLINE Trajectory(Arena& arena, const TrajectoryArgs& args, const Network& network,
                        int64_t num_groups)
      : args_(args),
        tile_(arena, network, num_groups),
        examples_(arena.take<LaneExamples>(num_groups)),
        numbers_(arena.take<float>((args.D + 3) * kImages)),
        levels_(arena.take<float>(args.levels ? (args.D + 3) * kImages : 0)),
        observed_(arena.take<Observed>(args.y.data ? num_groups * args.D : 0)),
        mask_(arena.take<float>(args.mask.data ? num_groups * args.D * kImages : 0)),
        values_(arena.take<float>(args.mask.data ? num_groups * args.D * kImages : 0)) {}

  // Takes examples from n on through all timesteps.
  DPM_INLINE void run(int64_t n, int64_t num_groups) {
    for (int64_t g = 0; g < num_groups; ++g) read(n + g * kImages, g);
    for (int64_t t = args_.first; t >= args_.last; t = args_.previous[t]) {
      tile_.evaluate(t, num_groups);
      for (int64_t g = 0; g < num_groups; ++g) step(t, g);
      if (float* const state = args_.state(args_.previous[t])) write(n, num_groups, state);
    }
    write(n, num_groups, args_.out);
  }

 private:
  DPM_INLINE int count(int64_t n) const { return static_cast<int>(smaller(kImages, args_.N - n)); }

  // The lanes of element d of examples from n on.
  template <class T>
  DPM_INLINE f32x16 lanes(const Strided& tensor, int64_t n, int64_t d) const {
    const T* from = static_cast<const T*>(tensor.data) + n * tensor.n + d * tensor.c;
    float lanes[kImages] = {};
    for (int i = 0; i < count(n); ++i) lanes[i] = from[i * tensor.n];
    return load<f32x16>(lanes);
  }

  DPM_INLINE void read(int64_t n, int64_t g) {
    examples_[g] = LaneExamples(args_.seed, args_.ids + n, count(n));
    for (int64_t d = 0; d < args_.D; ++d) {
      const int64_t place = g * args_.D + d;
      store(tile_.x(g, d), load16(args_.x + n * args_.D + d, args_.D, count(n)));
      if (args_.y.data) {
        observed_[place] = Process::observed(lanes<float>(args_.y, n, d),
                                             lanes<float>(args_.spread, n, d));
      }
      if (args_.mask.data) {
        store(mask_ + place * kImages, lanes<uint8_t>(args_.mask, n, d));
        store(values_ + place * kImages, lanes<float>(args_.values, n, d));
      }
    }
  }

  DPM_INLINE void step(int64_t t, int64_t g) {
    using Row = typename Process::Row;
    const Row row = reinterpret_cast<const Row*>(args_.rows)[t];
    const int64_t D = args_.D, previous = args_.previous[t];
    const bool is_drawn = args_.is_drawn(previous), is_noised = args_.is_noised(previous);
    if (is_drawn) fill<false>(g, t);
    if (is_noised) fill<true>(g, previous);
    for (int64_t d = 0; d < D; ++d) {
      float* place = tile_.x(g, d);
      f32x16 x = Process::step(row, load<f32x16>(place), load<f32x16>(tile_.out(g, d)),
                               Process::kHasVariance ? tile_.out(g, D + d) : nullptr,
                               args_.y.data ? observed_ + g * D + d : nullptr,
                               is_drawn ? numbers_ + d * kImages : nullptr);
      if (args_.mask.data) {
        const int64_t known = (g * D + d) * kImages;
        f32x16 value = load<f32x16>(values_ + known);
        if (is_noised) {
          value = Process::noised(args_.levels + 2 * previous, value,
                                  load<f32x16>(levels_ + d * kImages));
        }
        x = select(load<f32x16>(mask_ + known) != 0.0f, value, x);
      }
      store(place, x);
    }
  }

  template <bool kForward>
  DPM_INLINE void fill(int64_t g, int64_t t) {
    const uint32_t stream = kForward ? args_.forward_stream : args_.reverse_stream;
    fill_lanes<typename Process::Random>(examples_[g].at(stream, static_cast<uint32_t>(t)),
                                         args_.D, kForward ? levels_ : numbers_);
  }

  DPM_INLINE void write(int64_t n, int64_t num_groups, float* to) const {
    for (int64_t g = 0; g < num_groups; ++g, n += kImages) {
      for (int64_t d = 0; d < args_.D; ++d) {
        store16(to + n * args_.D + d, load<f32x16>(tile_.x(g, d)), args_.D, count(n));
      }
    }
  }

  const TrajectoryArgs& args_;
  typename Network::Tile tile_;
  LaneExamples* examples_;
  float *numbers_, *levels_;  // of a group: random numbers, and those of known elements
  Observed* observed_;
  float *mask_, *values_;
};

template <class Process, class Network>
static void run_trajectories(const TrajectoryArgs& args, const Network& network, int num_threads) {
  const int64_t num_groups = (args.N + kImages - 1) / kImages;
  const int64_t per_thread = (num_groups + num_threads - 1) / num_threads;
  const int64_t groups_of_tile = smaller(Network::kTileGroups, per_thread);
  const int64_t num_tiles = (num_groups + groups_of_tile - 1) / groups_of_tile;
  const int threads = static_cast<int>(smaller(num_threads, num_tiles));
  Arena needed(nullptr);
  Trajectory<Process, Network>(needed, args, network, groups_of_tile);
  const Memory64 memory(needed.used() * threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Arena arena(memory.data() + needed.used() * omp_get_thread_num());
    Trajectory<Process, Network> trajectory(arena, args, network, groups_of_tile);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < num_tiles; ++i) {
      const int64_t first = i * groups_of_tile;
      trajectory.run(first * kImages, smaller(groups_of_tile, num_groups - first));
    }
  }
}

}  // namespace DPM_ISA
}  // namespace dpm
