#pragma once
#include "emulator.h"

namespace emulator {

// Computes a warp's next wgmma that is in flight; false: none is.
bool complete_next_wgmma(Warp& w);

}  // namespace emulator
