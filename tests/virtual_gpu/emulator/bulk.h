#pragma once
#include "emulator.h"

namespace emulator {

// Lets one bulk copy of the CTA, drawn at random, take its next step; false: none can.
bool advance_some_transfer(Cta& cta);
// What must hold when a CTA ends: nothing in flight, no bytes expected. Its last stores land.
void finish_transfers(Cta& cta);

}  // namespace emulator
