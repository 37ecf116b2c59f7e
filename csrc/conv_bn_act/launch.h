// What the host function hands to the kernels; without Torch and CUTLASS headers.
// RESNET_FUSED_SM80 and RESNET_FUSED_SM90A say which families this build has.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "planner.h"

namespace resnet_fused {

// Vectors [K]. A null bias is 0, a null weight 1, a null bn_bias 0; mean and var null together: no normalisation.
struct ConvVectors {
  const void* bias;
  const void* weight;
  const void* bn_bias;
  const void* mean;
  const void* var;
  float eps;
  bool float_bias;  // else in x's dtype
  bool float_bn;    // else in x's dtype
};

struct ConvArguments {
  ConvProblem problem;
  ConvPlan plan;
  const void* x;         // [N, H, W, C]
  const void* weight;    // [K, R, S, C]
  const void* residual;  // [N, P, Q, K] or null
  void* y;               // [N, P, Q, K]
  ConvVectors vectors;
  bool relu;
  int device;
  int multiprocessors;
};

inline std::optional<ConvFamily> conv_family(int major, int minor) {
#ifdef RESNET_FUSED_SM80
  constexpr bool has_sm80 = true;
#else
  constexpr bool has_sm80 = false;
#endif
#ifdef RESNET_FUSED_SM90A
  constexpr bool has_sm90a = true;
#else
  constexpr bool has_sm90a = false;
#endif
  return conv_family(major, minor, has_sm80, has_sm90a);
}

using Failure = const char*;  // what went wrong, or null

// Launches a kernel; CUTLASS's own launchers clear CUDA's error, which says what went wrong.
inline Failure launch_kernel(const void* kernel, dim3 grid, dim3 block, int shared, void* params, cudaStream_t stream) {
  void* arguments[] = {params};
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error == cudaSuccess) error = cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // it is told here, and not once more at the next check
  return cudaGetErrorString(error);
}

// Element: cutlass::half_t, cutlass::bfloat16_t, or float, which is multiplied as TF32.
namespace sm90a {
template <class Element>
Failure conv(const ConvArguments& args, cudaStream_t stream);
template <class Element>
size_t split_workspace(const ConvArguments& args);
template <class Element>
Failure split_gemm(const ConvArguments& args, void* workspace, cudaStream_t stream);
}  // namespace sm90a

namespace sm80 {
template <class Element>
Failure conv(const ConvArguments& args, cudaStream_t stream);
}  // namespace sm80

}  // namespace resnet_fused
