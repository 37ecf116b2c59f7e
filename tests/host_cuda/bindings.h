// What the C ABIs over the kernels share. Every function returns null, or what went wrong.
#pragma once

#include "cuda_on_host.h"
// The kernels see the keywords of the header above.
#include "batch_norm.cuh"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace resnet_fused {

// An operator's tensors in the order of its arguments, null where absent.
struct Inputs {
  const void* const* data;
  const bool* is_float;

  BatchNorm batch_norm(int first) const {
    const auto vector = [&](int i) { return Vector{data[i], is_float[i]}; };
    return {vector(first), vector(first + 1), vector(first + 2), vector(first + 3)};
  }
};

struct Run {
  int64_t max_blocks;   // in place of the plan's where it is positive
  int64_t first_block;  // of those that run
  unsigned seed;
};

inline Tiling retile(const Tiling& planned, const Run& run) {
  return run.max_blocks > 0 ? tile(planned.rows, planned.channels, run.max_blocks) : planned;
}

template <typename Params>
const char* run_on_host(const Launch<Params>& plan, const Params& params, const Run& run) {
  return host_cuda::run_on_host(plan.kernel, plan.blocks, kThreads, params, run.seed, run.first_block);
}

}  // namespace resnet_fused
