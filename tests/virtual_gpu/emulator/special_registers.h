// %tid.x, %ctaid.x and the other special registers that hold one value while a warp runs.
#pragma once
#include <string>

#include "emulator.h"

namespace emulator {

// The index of a special register; -1: the name is none of them.
int special_register(const std::string& name);
// Writes a warp's special registers.
void set_special_registers(Warp& warp);

}  // namespace emulator
