// What the host functions of the BN operators share: from tensors to the kernels' parameters, and the launch.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

#include "batch_norm.cuh"
#include "checks.h"

namespace resnet_fused {

using OptionalTensor = std::optional<Tensor>;
using torch::stable::accelerator::DeviceGuard;

inline DType to_dtype(const Tensor& t) {
  if (t.scalar_type() == ScalarType::Half) return DType::kHalf;
  return t.scalar_type() == ScalarType::BFloat16 ? DType::kBFloat16 : DType::kFloat;
}

inline const void* data_or_null(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }

inline int64_t rows(const Tensor& x) { return x.size(0) * x.size(2) * x.size(3); }

inline Tensor empty_channels_last(const Tensor& x) {
  return torch::stable::empty(x.sizes(), x.scalar_type(), std::nullopt, x.device(), std::nullopt,
                              torch::headeronly::MemoryFormat::ChannelsLast);
}

inline Tensor empty_vector(const Tensor& x, int64_t size) {
  return torch::stable::new_empty(x, {size}, ScalarType::Float);
}

// The four vectors of one BN, checked; prefix is "" or "residual_".
inline BatchNorm to_batch_norm(const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& mean,
                               const OptionalTensor& var, const std::string& prefix, const Tensor& x) {
  const auto vector = [&](const OptionalTensor& t, const char* name) -> Vector {
    if (t) check_channel_vector(*t, (prefix + name).c_str(), x);
    return {data_or_null(t), t && t->scalar_type() == ScalarType::Float};
  };
  STD_TORCH_CHECK(mean.has_value() == var.has_value(), prefix, "mean and ", prefix, "var must be given together; x is ",
                  shape(x));
  STD_TORCH_CHECK(mean || !(weight || bias), prefix, "weight and ", prefix, "bias need ", prefix, "mean and ", prefix,
                  "var; x is ", shape(x));
  return {vector(weight, "weight"), vector(bias, "bias"), vector(mean, "mean"), vector(var, "var")};
}

template <typename Params>
void launch(const Launch<Params>& plan, const Params& params, const char* op, const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  plan.kernel<<<static_cast<unsigned>(plan.blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(params);
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, op, " on x ", shape(x), ": ", cudaGetErrorString(error));
}

}  // namespace resnet_fused
