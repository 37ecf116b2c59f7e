#pragma once
#include "emulator.h"

namespace emulator {

// Runs a launch to its end, or throws Fault.
void run(Launch& launch);

}  // namespace emulator
