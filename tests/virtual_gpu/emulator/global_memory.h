// Global memory: the allocations that kernels may touch.
#pragma once
#include "emulator.h"

namespace emulator {

// The host memory at a global address; faults where an access isn't allowed on the device that runs the launch.
u8* global_memory(u64 address, u64 bytes, bool write);
// The device of the launch that runs.
void set_launch_device(int device);

}  // namespace emulator
