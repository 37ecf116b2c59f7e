// batch_norm_act's forward pass with given statistics: checks, allocation and launch, on the LibTorch Stable ABI.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "batch_norm.h"
#include "batch_norm_act.cuh"

namespace resnet_fused {
namespace {

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
  STD_TORCH_CHECK(residual || !residual_mean, "residual_mean and residual_var need residual; x is ", shape(x));
  if (residual) check_like(*residual, "residual", x);
  if (pre_add) check_like(*pre_add, "pre_add", x);

  BatchNormActParams params{};
  params.bn = to_batch_norm(weight, bias, mean, var, "", x);
  params.residual_bn = to_batch_norm(residual_weight, residual_bias, residual_mean, residual_var, "residual_", x);
  const DeviceGuard guard(x.get_device_index());
  Tensor y = empty_channels_last(x);
  Tensor sum = pre_add ? empty_channels_last(x) : torch::stable::new_empty(x, {0});
  if (x.numel() == 0) return {y, sum};

  params.x = x.const_data_ptr();
  params.y = y.mutable_data_ptr();
  params.residual = data_or_null(residual);
  params.pre_add = data_or_null(pre_add);
  params.sum = pre_add ? sum.mutable_data_ptr() : nullptr;
  params.eps = static_cast<float>(eps);
  params.relu = relu;
  params.channels = x.size(1);
  params.rows = rows(x);
  const auto plan = plan_batch_norm_act(params, to_dtype(x), max_resident_threads(x.get_device_index()));
  launch(plan, params, "batch_norm_act", x);
  return {y, sum};
}

std::tuple<Tensor, Tensor> batch_norm_act_mask(const Tensor& x, const OptionalTensor& weight,
                                               const OptionalTensor& bias, const Tensor& mean, const Tensor& var,
                                               double eps, const Tensor& residual) {
  check_activation(x, "x");
  check_like(residual, "residual", x);
  BatchNormMaskParams params{};
  params.bn = to_batch_norm(weight, bias, mean, var, "", x);
  const DeviceGuard guard(x.get_device_index());
  Tensor y = empty_channels_last(x);
  Tensor relu_mask = torch::stable::new_empty(x, {rows(x), ceil_div(x.size(1), kGroup)}, ScalarType::Byte);
  if (x.numel() == 0) return {y, relu_mask};

  params.x = x.const_data_ptr();
  params.residual = residual.const_data_ptr();
  params.y = y.mutable_data_ptr();
  params.relu_mask = relu_mask.mutable_data_ptr<uint8_t>();
  params.eps = static_cast<float>(eps);
  params.tiling = tile_elementwise(rows(x), x.size(1));
  launch(plan_batch_norm_mask(params, to_dtype(x)), params, "batch_norm_act_mask", x);
  return {y, relu_mask};
}

}  // namespace
}  // namespace resnet_fused

STABLE_TORCH_LIBRARY_FRAGMENT(resnet_fused_cuda, m) {
  m.def(
      "batch_norm_act(Tensor x, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, float eps, Tensor? residual, "
      "Tensor? residual_weight, Tensor? residual_bias, Tensor? residual_mean, Tensor? residual_var, Tensor? pre_add, "
      "bool relu) -> (Tensor, Tensor)");
  m.def(
      "batch_norm_act_mask(Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, float eps, "
      "Tensor residual) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused_cuda, CUDA, m) {
  m.impl("batch_norm_act", TORCH_BOX(&resnet_fused::batch_norm_act));
  m.impl("batch_norm_act_mask", TORCH_BOX(&resnet_fused::batch_norm_act_mask));
}
