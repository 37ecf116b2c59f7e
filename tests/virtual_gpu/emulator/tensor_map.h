// Tensor maps: what cuTensorMapEncodeTiled and cuTensorMapEncodeIm2col make, and bulk copies read.
#pragma once
#include "emulator.h"

namespace emulator {

// The tensor map at an address; faults where it isn't one that ptx_encode_* made.
TensorMap read_tensor_map(u64 address);
u32 element_bytes(const TensorMap& map);
u32 inner_bytes(const TensorMap& map);  // of the box's innermost dimension
u32 box_bytes(const TensorMap& map);
// Bytes within which a swizzle moves 16-byte chunks; 0: none.
u32 swizzle_span(int swizzle);

}  // namespace emulator
