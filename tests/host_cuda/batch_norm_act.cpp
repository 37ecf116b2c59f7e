// C ABI over raw pointers for csrc/batch_norm_act.cuh, compiled for the host.
#include "bindings.h"
// The kernels see the keywords of the header above.
#include "batch_norm_act.cuh"

using namespace resnet_fused;

// in: x, weight, bias, mean, var, residual, its weight, bias, mean and var, pre_add
EXPORT const char* batch_norm_act(Inputs in, Run run, DType dtype, int64_t rows, int64_t channels, float eps, bool relu,
                                  void* y, void* sum, int64_t max_threads, int64_t* blocks) {
  BatchNormActParams params{};
  params.x = in.data[0];
  params.y = y;
  params.residual = in.data[5];
  params.pre_add = in.data[10];
  params.sum = sum;
  params.bn = in.batch_norm(1);
  params.residual_bn = in.batch_norm(6);
  params.eps = eps;
  params.relu = relu;
  params.rows = rows;
  params.channels = channels;
  const auto plan = plan_batch_norm_act(params, dtype, max_threads);
  *blocks = plan.blocks;
  return run_on_host(plan, params, run);
}

// in: x, weight, bias, mean, var, residual
EXPORT const char* batch_norm_mask(Inputs in, Run run, DType dtype, int64_t rows, int64_t channels, float eps, void* y,
                                   uint8_t* relu_mask) {
  BatchNormMaskParams params{};
  params.x = in.data[0];
  params.residual = in.data[5];
  params.y = y;
  params.relu_mask = relu_mask;
  params.bn = in.batch_norm(1);
  params.eps = eps;
  params.tiling = retile(tile_elementwise(rows, channels), run);
  return run_on_host(plan_batch_norm_mask(params, dtype), params, run);
}
