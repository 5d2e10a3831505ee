// The CPU launcher of `trajectory`.
#include "image_network.h"
#include "trajectory_loop.h"
#include "vector_network.h"

namespace dpm {
namespace DPM_ISA {
namespace {

template <class Network>
void run(const TrajectoryArgs& args, int num_threads) {
  Arena needed(nullptr);
  Network(needed, args);
  const Memory64 memory(needed.used());
  Arena arena(memory.data());
  const Network network(arena, args);
  if (args.is_binomial) return run_trajectories<BinomialProcess>(args, network, num_threads);
  if (args.is_learned) return run_trajectories<GaussianProcess<true>>(args, network, num_threads);
  run_trajectories<GaussianProcess<false>>(args, network, num_threads);
}

}  // namespace

void trajectory(const TrajectoryArgs& args, int num_threads) {
  if (args.network.stack) return run<ImageNetwork>(args, num_threads);
  run<VectorNetwork>(args, num_threads);
}

}  // namespace DPM_ISA
}  // namespace dpm
