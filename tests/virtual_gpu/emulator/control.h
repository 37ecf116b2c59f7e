#pragma once
#include "emulator.h"

namespace emulator {

// Completes one of a CTA's barriers when all have arrived, for instance because a warp has ended.
void check_barrier(Cta& cta, int id);

}  // namespace emulator
