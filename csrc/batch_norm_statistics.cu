// Batch statistics: checks, allocation and launch, on the LibTorch Stable ABI.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "batch_norm.h"
#include "batch_norm_statistics.cuh"

namespace resnet_fused {
namespace {

// The sum x + pre_add, of no elements without pre_add; merge: where the statistics go.
Tensor run_statistics(const Tensor& x, const OptionalTensor& pre_add, MergeStatisticsParams merge) {
  Tensor sum = pre_add ? empty_channels_last(x) : torch::stable::new_empty(x, {0});
  const int64_t channels = x.size(1);
  const Tiling tiling = tile_statistics(rows(x), channels, pre_add.has_value());
  Tensor partial = empty_vector(x, 2 * tiling.splits * channels);
  float* const partial_mean = partial.mutable_data_ptr<float>();
  float* const partial_m2 = partial_mean + tiling.splits * channels;
  const StatisticsParams params{x.const_data_ptr(),
                                data_or_null(pre_add),
                                pre_add ? sum.mutable_data_ptr() : nullptr,
                                partial_mean,
                                partial_m2,
                                tiling};
  launch(plan_statistics(params, to_dtype(x)), params, "batch_norm_statistics", x);
  merge.z = pre_add ? sum.const_data_ptr() : x.const_data_ptr();
  merge.partial_mean = partial_mean;
  merge.partial_m2 = partial_m2;
  merge.tiling = tiling;
  launch(plan_merge_statistics(merge, to_dtype(x)), merge, "batch_norm_statistics", x);
  return sum;
}

void check_statistics(const Tensor& x, const OptionalTensor& pre_add) {
  check_activation(x, "x");
  if (pre_add) check_like(*pre_add, "pre_add", x);
  STD_TORCH_CHECK(x.numel() > 0, "an empty x has no statistics; its shape is ", shape(x));
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_statistics(const Tensor& x, const OptionalTensor& pre_add) {
  check_statistics(x, pre_add);
  const DeviceGuard guard(x.get_device_index());
  Tensor mean = empty_vector(x, x.size(1));
  Tensor m2 = empty_vector(x, x.size(1));
  MergeStatisticsParams merge{};
  merge.mean = mean.mutable_data_ptr<float>();
  merge.m2 = m2.mutable_data_ptr<float>();
  return {mean, m2, run_statistics(x, pre_add, merge)};
}

std::tuple<Tensor, Tensor, Tensor> batch_statistics(const Tensor& x, const OptionalTensor& pre_add,
                                                    const OptionalTensor& running_mean,
                                                    const OptionalTensor& running_var, double momentum) {
  check_statistics(x, pre_add);
  const auto running = [&](const OptionalTensor& t, const char* name) -> Running {
    if (!t) return {nullptr, false};
    check_channel_vector(*t, name, x);
    return {t->mutable_data_ptr(), t->scalar_type() == ScalarType::Float};
  };
  const DeviceGuard guard(x.get_device_index());
  Tensor mean = empty_vector(x, x.size(1));
  Tensor var = empty_vector(x, x.size(1));
  MergeStatisticsParams merge{};
  merge.mean = mean.mutable_data_ptr<float>();
  merge.var = var.mutable_data_ptr<float>();
  merge.running_mean = running(running_mean, "running_mean");
  merge.running_var = running(running_var, "running_var");
  merge.momentum = static_cast<float>(momentum);
  return {mean, var, run_statistics(x, pre_add, merge)};
}

std::tuple<Tensor, Tensor, Tensor> merge_ranks(const Tensor& ranks, const OptionalTensor& running_mean,
                                               const OptionalTensor& running_var, double momentum) {
  STD_TORCH_CHECK(ranks.dim() == 2 && ranks.size(0) > 0 && ranks.size(1) % 2 == 1 && ranks.is_contiguous() &&
                      ranks.scalar_type() == ScalarType::Float && ranks.is_cuda(),
                  "ranks must be a contiguous float32 CUDA tensor [ranks, 2 * channels + 1]; its shape is ",
                  shape(ranks));
  STD_TORCH_CHECK(running_mean.has_value() == running_var.has_value(),
                  "running_mean and running_var must be given together");
  const DeviceGuard guard(ranks.get_device_index());
  const int64_t channels = ranks.size(1) / 2;
  const auto running = [&](const OptionalTensor& t, const char* name) -> float* {
    if (!t) return nullptr;
    STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == channels && t->is_contiguous() &&
                        t->scalar_type() == ScalarType::Float && same_device(*t, ranks),
                    name, " must be a contiguous float32 tensor [", channels, "] on the device of ranks; its shape is ",
                    shape(*t));
    return t->mutable_data_ptr<float>();
  };
  Tensor mean = empty_vector(ranks, channels);
  Tensor var = empty_vector(ranks, channels);
  Tensor count = torch::stable::new_empty(ranks, {});
  const MergeRanksParams params{ranks.const_data_ptr<float>(),
                                mean.mutable_data_ptr<float>(),
                                var.mutable_data_ptr<float>(),
                                count.mutable_data_ptr<float>(),
                                running(running_mean, "running_mean"),
                                running(running_var, "running_var"),
                                static_cast<float>(momentum),
                                ranks.size(0),
                                channels};
  launch(plan_merge_ranks(params), params, "merge_ranks", ranks);
  return {mean, var, count};
}

}  // namespace
}  // namespace resnet_fused

STABLE_TORCH_LIBRARY_FRAGMENT(resnet_fused_cuda, m) {
  m.def("batch_norm_statistics(Tensor x, Tensor? pre_add) -> (Tensor, Tensor, Tensor)");
  m.def(
      "batch_statistics(Tensor x, Tensor? pre_add, Tensor(a!)? running_mean, Tensor(b!)? running_var, float momentum) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "merge_ranks(Tensor ranks, Tensor(a!)? running_mean, Tensor(b!)? running_var, float momentum) "
      "-> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused_cuda, CUDA, m) {
  m.impl("batch_norm_statistics", TORCH_BOX(&resnet_fused::batch_norm_statistics));
  m.impl("batch_statistics", TORCH_BOX(&resnet_fused::batch_statistics));
  m.impl("merge_ranks", TORCH_BOX(&resnet_fused::merge_ranks));
}
