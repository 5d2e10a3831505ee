// An image in the shared memory of a block, with the network that takes it: what lies where. Sizes
// alone decide that, so a host without a GPU can say what a network needs.
#pragma once

#include "resident_conv.h"
#include "trajectory.h"

namespace dpm {

// After the stack, whose last layer is the readout, comes x_t in float: a stack overwrites its input.
// The readout's operand has one place, where the next timestep's arrives while a step is taken.
//
// The network of 2015 without its dense path has 28 x 28 pixels of 20 channels, and with one scale it
// takes 214 KB of the 227 KB of a block on sm_90: two images of 76 KB with their halos, operands of
// 55 KB for the convolutions and 3 KB for the layers of each pixel, x_t of 3 KB. So what is known or
// observed is read from outside at every step, as wanted states are written there. Three scales have
// operands of 166 KB, and do not fit; stored as bfloat16 they do, with 198 KB of all. On sm_80, with
// 163 KB, one scale of 22 x 22 pixels does, or in bfloat16 two scales of 28 x 28.
struct ResidentImages {
  ResidentStack stack;
  int readout, readout_bytes;  // where its operand begins and how long it is, in bytes
  int x;                       // bytes: (C, H, W)
  int64_t shared_bytes;

  // Sizes alone are read here; the stack has a tail.
  explicit ResidentImages(const MultiscaleConvArgs& conv)
      : stack(conv), x(int(stack.shared_bytes)), shared_bytes(stack.shared_bytes) {
    const ResidentLayer& last = stack.layers[stack.num_layers - 1];
    readout = last.operands[0];
    readout_bytes = int(last.operand_bytes());
    const int64_t num_elements = stack.layers[0].C * conv.H * conv.W;
    shared_bytes += (4 * num_elements + kUnitBytes - 1) / kUnitBytes * kUnitBytes;
  }

  // Outside: operands of the layers before the readout, then its own for so many timesteps.
  int64_t packed_bytes(int64_t num_timesteps) const {
    return readout + num_timesteps * readout_bytes;
  }
};

}  // namespace dpm
