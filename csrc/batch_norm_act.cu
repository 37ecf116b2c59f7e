// batch_norm_act with given statistics: checks, allocation and launch, on the LibTorch Stable ABI.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

#include <initializer_list>
#include <tuple>
#include <utility>

#include "batch_norm_act.cuh"
#include "checks.h"

namespace resnet_fused {
namespace {

using OptionalTensor = std::optional<Tensor>;

DType to_dtype(ScalarType dtype) {
  if (dtype == ScalarType::Half) return DType::kHalf;
  return dtype == ScalarType::BFloat16 ? DType::kBFloat16 : DType::kFloat;
}

const void* data_or_null(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }

Tensor empty_channels_last(const Tensor& x) {
  return torch::stable::empty(x.sizes(), x.scalar_type(), std::nullopt, x.device(), std::nullopt,
                              torch::headeronly::MemoryFormat::ChannelsLast);
}

int64_t max_resident_threads(int32_t device) {
  int processors = 0;
  int threads = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&threads, cudaDevAttrMaxThreadsPerMultiProcessor, device));
  return int64_t{processors} * threads;
}

std::tuple<Tensor, Tensor> batch_norm_act(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                                          const OptionalTensor& mean, const OptionalTensor& var, double eps,
                                          const OptionalTensor& residual, const OptionalTensor& residual_weight,
                                          const OptionalTensor& residual_bias, const OptionalTensor& residual_mean,
                                          const OptionalTensor& residual_var, const OptionalTensor& pre_add,
                                          bool relu) {
  check_activation(x, "x");
  STD_TORCH_CHECK(mean.has_value() == var.has_value(), "mean and var must be given together; x is ", shape(x));
  STD_TORCH_CHECK(mean || !(weight || bias), "weight and bias need mean and var; x is ", shape(x));
  STD_TORCH_CHECK(residual_mean.has_value() == residual_var.has_value(),
                  "residual_mean and residual_var must be given together; x is ", shape(x));
  STD_TORCH_CHECK(residual_mean || !(residual_weight || residual_bias),
                  "residual_weight and residual_bias need residual_mean and residual_var; x is ", shape(x));
  STD_TORCH_CHECK(residual || !residual_mean, "residual_mean and residual_var need residual; x is ", shape(x));
  if (residual) check_like(*residual, "residual", x);
  if (pre_add) check_like(*pre_add, "pre_add", x);

  const OptionalTensor& first_stat = mean ? mean : residual_mean;
  const bool float_stats = !first_stat || first_stat->scalar_type() == ScalarType::Float;
  const ScalarType stat_dtype = float_stats ? ScalarType::Float : x.scalar_type();
  const std::initializer_list<std::pair<const OptionalTensor&, const char*>> vectors = {
      {weight, "weight"},
      {bias, "bias"},
      {mean, "mean"},
      {var, "var"},
      {residual_weight, "residual_weight"},
      {residual_bias, "residual_bias"},
      {residual_mean, "residual_mean"},
      {residual_var, "residual_var"}};
  for (const auto& [vector, name] : vectors) {
    if (vector) check_channel_vector(*vector, name, x, stat_dtype);
  }

  const int32_t device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  Tensor y = empty_channels_last(x);
  Tensor sum = pre_add ? empty_channels_last(x) : torch::stable::new_empty(x, {0});
  if (x.numel() == 0) return {y, sum};

  BatchNormActParams params{};
  params.x = x.const_data_ptr();
  params.y = y.mutable_data_ptr();
  params.residual = data_or_null(residual);
  params.pre_add = data_or_null(pre_add);
  params.sum = pre_add ? sum.mutable_data_ptr() : nullptr;
  params.bn = {data_or_null(weight), data_or_null(bias), data_or_null(mean), data_or_null(var)};
  params.residual_bn = {data_or_null(residual_weight), data_or_null(residual_bias), data_or_null(residual_mean),
                        data_or_null(residual_var)};
  params.eps = static_cast<float>(eps);
  params.relu = relu;
  params.channels = x.size(1);
  params.rows = x.numel() / x.size(1);
  const BatchNormActPlan plan =
      plan_batch_norm_act(params, to_dtype(x.scalar_type()), to_dtype(stat_dtype), max_resident_threads(device));

  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  plan.kernel<<<static_cast<unsigned>(plan.blocks), kBatchNormActThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      params);
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "batch_norm_act on x ", shape(x), ": ", cudaGetErrorString(error));
  return {y, sum};
}

}  // namespace
}  // namespace resnet_fused

STABLE_TORCH_LIBRARY(resnet_fused_cuda, m) {
  m.def(
      "batch_norm_act(Tensor x, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, float eps, Tensor? residual, "
      "Tensor? residual_weight, Tensor? residual_bias, Tensor? residual_mean, Tensor? residual_var, Tensor? pre_add, "
      "bool relu) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused_cuda, CUDA, m) {
  m.impl("batch_norm_act", TORCH_BOX(&resnet_fused::batch_norm_act));
}
