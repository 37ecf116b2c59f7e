#pragma once
#include "emulator.h"

namespace emulator {

// One of a warp's cp.async, drawn at random, lands; nothing where none is in flight.
void land_some_copy(Warp& w);

}  // namespace emulator
