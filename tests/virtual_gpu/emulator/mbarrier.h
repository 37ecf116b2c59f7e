#pragma once
#include "emulator.h"

namespace emulator {

// The mbarrier at a shared address; faults where none was initialised.
Mbarrier& mbarrier_at(Cta& cta, u32 address);
// Completes the phase where nothing is outstanding.
void check_phase(Cta& cta, Mbarrier& barrier);

}  // namespace emulator
