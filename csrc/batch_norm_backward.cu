// batch_norm_act's backward pass: checks, allocation and launch, on the LibTorch Stable ABI.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "batch_norm.h"
#include "batch_norm_backward.cuh"

namespace resnet_fused {
namespace {

BackwardParams to_params(const Tensor& dy, const Tensor& z, const OptionalTensor& weight, const OptionalTensor& bias,
                         const Tensor& mean, const Tensor& var, double eps, const OptionalTensor& residual,
                         const OptionalTensor& residual_weight, const OptionalTensor& residual_bias,
                         const OptionalTensor& residual_mean, const OptionalTensor& residual_var,
                         const OptionalTensor& relu_mask, bool relu) {
  check_activation(dy, "dy");
  check_like(z, "z", dy, "dy");
  if (residual) check_like(*residual, "residual", dy, "dy");
  STD_TORCH_CHECK(residual || !residual_mean, "residual_mean and residual_var need residual; dy is ", shape(dy));
  if (relu_mask) {
    const Tensor& m = *relu_mask;
    STD_TORCH_CHECK(m.scalar_type() == ScalarType::Byte && m.dim() == 2 && m.size(0) == rows(dy) &&
                        m.size(1) == ceil_div(dy.size(1), kGroup) && m.is_contiguous() && same_device(m, dy),
                    "relu_mask must be [N * H * W, ceil(C / 8)] uint8, contiguous and on dy's device; dy is ",
                    shape(dy), ", relu_mask ", layout(m));
  }
  BackwardParams params{};
  params.dy = dy.const_data_ptr();
  params.z = z.const_data_ptr();
  params.residual = data_or_null(residual);
  params.relu_mask = relu && relu_mask ? relu_mask->const_data_ptr<uint8_t>() : nullptr;
  params.bn = to_batch_norm(weight, bias, mean, var, "", dy);
  params.residual_bn = to_batch_norm(residual_weight, residual_bias, residual_mean, residual_var, "residual_", dy);
  params.eps = static_cast<float>(eps);
  params.relu = relu;
  return params;
}

const float* sums_or_null(const OptionalTensor& t, const char* name, const Tensor& dy) {
  if (!t) return nullptr;
  check_channel_vector(*t, name, dy);
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float, name, " must be float32; its shape is ", shape(*t));
  return t->const_data_ptr<float>();
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_act_backward_sums(
    const Tensor& dy, const Tensor& z, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean,
    const Tensor& var, double eps, const OptionalTensor& residual, const OptionalTensor& residual_weight,
    const OptionalTensor& residual_bias, const OptionalTensor& residual_mean, const OptionalTensor& residual_var,
    const OptionalTensor& relu_mask, bool relu) {
  BackwardSumsParams params{};
  params.in = to_params(dy, z, weight, bias, mean, var, eps, residual, residual_weight, residual_bias, residual_mean,
                        residual_var, relu_mask, relu);
  const DeviceGuard guard(dy.get_device_index());
  const int64_t channels = dy.size(1);
  const int count = residual_mean ? 3 : 2;
  Tensor sum_dz = empty_vector(dy, channels);
  Tensor sum_dz_xhat = empty_vector(dy, channels);
  Tensor sum_dz_rhat = empty_vector(dy, count == 3 ? channels : 0);
  if (dy.numel() == 0) {
    for (Tensor* sum : {&sum_dz, &sum_dz_xhat, &sum_dz_rhat}) torch::stable::zero_(*sum);
    return {sum_dz, sum_dz_xhat, sum_dz_rhat};
  }

  params.in.tiling = tile_backward_sums(rows(dy), channels);
  Tensor partial = empty_vector(dy, count * params.in.tiling.splits * channels);
  params.partial = partial.mutable_data_ptr<float>();
  launch(plan_backward_sums(params, to_dtype(dy)), params, "batch_norm_act_backward_sums", dy);
  const MergeSumsParams merge{params.partial, sum_dz.mutable_data_ptr<float>(), sum_dz_xhat.mutable_data_ptr<float>(),
                              count == 3 ? sum_dz_rhat.mutable_data_ptr<float>() : nullptr, params.in.tiling};
  launch(plan_merge_sums(merge), merge, "batch_norm_act_backward_sums", dy);
  return {sum_dz, sum_dz_xhat, sum_dz_rhat};
}

std::tuple<Tensor, Tensor> batch_norm_act_backward_dx(
    const Tensor& dy, const Tensor& z, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean,
    const Tensor& var, double eps, const OptionalTensor& residual, const OptionalTensor& residual_weight,
    const OptionalTensor& residual_bias, const OptionalTensor& residual_mean, const OptionalTensor& residual_var,
    const OptionalTensor& relu_mask, bool relu, const OptionalTensor& sum_dz, const OptionalTensor& sum_dz_xhat,
    const OptionalTensor& sum_dz_rhat, const OptionalTensor& count, const OptionalTensor& dtotal, bool need_dx,
    bool need_dresidual) {
  BackwardDxParams params{};
  params.in = to_params(dy, z, weight, bias, mean, var, eps, residual, residual_weight, residual_bias, residual_mean,
                        residual_var, relu_mask, relu);
  STD_TORCH_CHECK(sum_dz || !(sum_dz_xhat || sum_dz_rhat), "sum_dz_xhat and sum_dz_rhat need sum_dz; dy is ",
                  shape(dy));
  STD_TORCH_CHECK(!sum_dz_rhat || residual_mean, "sum_dz_rhat needs residual_mean and residual_var; dy is ", shape(dy));
  if (count) {
    STD_TORCH_CHECK(count->numel() == 1 && count->scalar_type() == ScalarType::Float && same_device(*count, dy),
                    "count must be one float32 on dy's device; dy is ", shape(dy), ", count ", shape(*count));
  }
  if (dtotal) check_like(*dtotal, "dtotal", dy, "dy");
  params.sum_dz = sums_or_null(sum_dz, "sum_dz", dy);
  params.sum_dz_xhat = sums_or_null(sum_dz_xhat, "sum_dz_xhat", dy);
  params.sum_dz_rhat = sums_or_null(sum_dz_rhat, "sum_dz_rhat", dy);

  const DeviceGuard guard(dy.get_device_index());
  Tensor dx = need_dx ? empty_channels_last(dy) : torch::stable::new_empty(dy, {0});
  Tensor dresidual = need_dresidual ? empty_channels_last(dy) : torch::stable::new_empty(dy, {0});
  if (dy.numel() == 0 || !(need_dx || need_dresidual)) return {dx, dresidual};
  params.count = count ? count->const_data_ptr<float>() : nullptr;
  params.dtotal = data_or_null(dtotal);
  params.dx = need_dx ? dx.mutable_data_ptr() : nullptr;
  params.dresidual = need_dresidual ? dresidual.mutable_data_ptr() : nullptr;
  params.in.tiling = tile_elementwise(rows(dy), dy.size(1));
  launch(plan_backward_dx(params, to_dtype(dy)), params, "batch_norm_act_backward_dx", dy);
  return {dx, dresidual};
}

}  // namespace
}  // namespace resnet_fused

STABLE_TORCH_LIBRARY_FRAGMENT(resnet_fused_cuda, m) {
  m.def(
      "batch_norm_act_backward_sums(Tensor dy, Tensor z, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, "
      "float eps, Tensor? residual, Tensor? residual_weight, Tensor? residual_bias, Tensor? residual_mean, "
      "Tensor? residual_var, Tensor? relu_mask, bool relu) -> (Tensor, Tensor, Tensor)");
  m.def(
      "batch_norm_act_backward_dx(Tensor dy, Tensor z, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, "
      "float eps, Tensor? residual, Tensor? residual_weight, Tensor? residual_bias, Tensor? residual_mean, "
      "Tensor? residual_var, Tensor? relu_mask, bool relu, Tensor? sum_dz, Tensor? sum_dz_xhat, Tensor? sum_dz_rhat, "
      "Tensor? count, Tensor? dtotal, bool need_dx, bool need_dresidual) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused_cuda, CUDA, m) {
  m.impl("batch_norm_act_backward_sums", TORCH_BOX(&resnet_fused::batch_norm_act_backward_sums));
  m.impl("batch_norm_act_backward_dx", TORCH_BOX(&resnet_fused::batch_norm_act_backward_dx));
}
