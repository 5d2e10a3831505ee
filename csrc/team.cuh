// Which elements a thread works on, and sums over the threads that share an event.
//
// A team of threads has a piece of an event. Where events are large, a team is a block; where they
// are small, so is a team, and a block has several: most of its threads would idle with one event.
// The size of a team depends on nothing but the event, and sums have a fixed order: two runs, and
// every split of a batch, give equal bits.
#pragma once

#include "args.h"
#include "launch.cuh"
#include "vec.cuh"

namespace dpm {

constexpr int kThreads = 256;  // of a block; a 28 x 28 image is 196 quads, one for nearly each

// A power of two of neighboring threads.
struct Team {
  int log2_size;

  DPM_INLINE int size() const { return 1 << log2_size; }
};

// The smallest that has a thread for each of `count` items, or a block.
inline Team team_for(int64_t count) {
  Team team{0};
  while (team.size() < count && team.size() < kThreads) ++team.log2_size;
  return team;
}

inline dim3 grid_of_teams(Team team, int64_t N, int64_t num_pieces) {
  return grid_of(N, num_pieces, kThreads >> team.log2_size);
}

// A kernel whose threads have quads of pieces.
template <class Args>
void launch_teams(const char* name, void (*kernel)(Args, Team, bool), const Args& args,
                  bool aligned, int64_t num_pieces, cudaStream_t stream) {
  const Team team = team_for((args.extent.num_elements() + 3) / 4);
  const dim3 grid = grid_of_teams(team, args.extent.N, num_pieces);
  launch(name, kernel, grid, kThreads, 0, stream, args, team, aligned);
}

// The piece of this thread's team: elements [begin, end) of example n. A team that is left over has
// the last example, none of its elements, and leads nothing, but comes to every barrier.
struct Share {
  int64_t n, piece, begin, end;
  int rank;  // of the thread in its team
  bool leads;
};

template <int64_t kPiece = Extent::kPiece>
__device__ __forceinline__ Share share_of_thread(const Extent& extent, Team team) {
  static_assert(kPiece >= 4 * kThreads, "an event of several pieces is one for teams of a block");
  const int64_t num_elements = extent.num_elements();
  const auto num_pieces = static_cast<unsigned>((num_elements + kPiece - 1) / kPiece);
  const int teams_per_block = kThreads >> team.log2_size;
  int64_t n = int64_t{blockIdx.x} * teams_per_block + (threadIdx.x >> team.log2_size), piece = 0;
  if (num_pieces > 1) {
    n = blockIdx.x / num_pieces;  // a division of 64 bits would be a subroutine
    piece = blockIdx.x % num_pieces;
  }
  const int rank = static_cast<int>(threadIdx.x) & (team.size() - 1);
  if (n >= extent.N) return {extent.N - 1, 0, 0, 0, rank, false};
  const int64_t begin = piece * kPiece, end = begin + kPiece;
  return {n, piece, begin, end < num_elements ? end : num_elements, rank, rank == 0};
}

// visit(Quad) for this thread's quads of a piece.
template <class Visit>
__device__ __forceinline__ void for_quads(const Share& share, Team team, bool aligned,
                                          Visit visit) {
#pragma unroll 1
  for (int64_t first = share.begin + 4 * share.rank; first < share.end;
       first += 4 * team.size()) {
    const int64_t left = share.end - first;
    visit(Quad{share.n, first, static_cast<int>(left < 4 ? left : 4), aligned});
  }
}

// Sums of each value over a team; its first thread has them in `values`. All threads of a block come
// here together.
template <int kCount>
__device__ __forceinline__ void team_sum(double (&values)[kCount], Team team) {
  const int width = team.size() < 32 ? team.size() : 32;
  for (int offset = width / 2; offset > 0; offset /= 2) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      values[k] += __shfl_down_sync(kWholeWarp, values[k], offset, width);
    }
  }
  if (team.size() <= 32) return;
  __shared__ double partial[kThreads / 32][kCount];
  const int warp = threadIdx.x / 32;
  if (threadIdx.x % 32 == 0) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) partial[warp][k] = values[k];
  }
  __syncthreads();
  if ((threadIdx.x & (team.size() - 1)) == 0) {
    for (int w = 1; w < team.size() / 32; ++w) {
#pragma unroll
      for (int k = 0; k < kCount; ++k) values[k] += partial[warp + w][k];
    }
  }
}

}  // namespace dpm
