// Runs CUDA kernels without barriers on the CPU: a plain loop over blocks and threads. fp16 and bf16 are the toolkit's,
// in their host form. Include it before the kernels.
#pragma once

#include <vector_functions.h>
#include <vector_types.h>

#include <cmath>
#include <cstdint>

#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __launch_bounds__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

#include <cuda_bf16.h>
#include <cuda_fp16.h>

inline uint3 blockIdx, threadIdx;

template <typename Params>
void run_on_host(void (*kernel)(Params), int64_t blocks, int threads, const Params& params) {
  for (int64_t block = 0; block < blocks; ++block) {
    for (int thread = 0; thread < threads; ++thread) {
      blockIdx = {static_cast<unsigned>(block), 0, 0};
      threadIdx = {static_cast<unsigned>(thread), 0, 0};
      kernel(params);
    }
  }
}
