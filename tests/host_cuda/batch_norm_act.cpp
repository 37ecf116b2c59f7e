// C ABI over raw pointers for csrc/batch_norm_act.cuh, compiled for the host.
#include "cuda_on_host.h"
// The kernels see the keywords of the header above.
#include "../../csrc/batch_norm_act.cuh"

using namespace resnet_fused;

// inputs: x, weight, bias, mean, var, residual, its weight, bias, mean and var, pre_add; null where absent.
// dtypes: 0 float32, 1 float16, 2 bfloat16. Returns the number of blocks.
extern "C" int64_t host_batch_norm_act(const void* const* inputs, void* y, void* sum, int64_t rows, int64_t channels,
                                       float eps, bool relu, int x_dtype, int stat_dtype, int64_t max_threads) {
  BatchNormActParams params{};
  params.x = inputs[0];
  params.y = y;
  params.residual = inputs[5];
  params.pre_add = inputs[10];
  params.sum = sum;
  params.bn = {inputs[1], inputs[2], inputs[3], inputs[4]};
  params.residual_bn = {inputs[6], inputs[7], inputs[8], inputs[9]};
  params.eps = eps;
  params.relu = relu;
  params.rows = rows;
  params.channels = channels;
  const BatchNormActPlan plan =
      plan_batch_norm_act(params, static_cast<DType>(x_dtype), static_cast<DType>(stat_dtype), max_threads);
  run_on_host(plan.kernel, plan.blocks, kBatchNormActThreads, params);
  return plan.blocks;
}
