// C ABI over raw pointers for csrc/batch_norm_backward.cuh, compiled for the host.
#include "bindings.h"
// The kernels see the keywords of the header above.
#include "batch_norm_backward.cuh"

using namespace resnet_fused;

namespace {

// in: dy, z, weight, bias, mean, var, residual, its weight, bias, mean and var, relu_mask
BackwardParams to_params(Inputs in, float eps, bool relu) {
  BackwardParams params{};
  params.dy = in.data[0];
  params.z = in.data[1];
  params.residual = in.data[6];
  params.relu_mask = static_cast<const uint8_t*>(in.data[11]);
  params.bn = in.batch_norm(2);
  params.residual_bn = in.batch_norm(7);
  params.eps = eps;
  params.relu = relu;
  return params;
}

}  // namespace

EXPORT int64_t backward_splits(Run run, int64_t rows, int64_t channels) {
  return retile(tile_backward_sums(rows, channels), run).splits;
}

// partial: [2 or 3, splits, channels]; sum_dz_rhat may be null; without sum_dz the first kernel alone
EXPORT const char* backward_sums(Inputs in, Run run, DType dtype, int64_t rows, int64_t channels, float eps, bool relu,
                                 float* partial, float* sum_dz, float* sum_dz_xhat, float* sum_dz_rhat) {
  BackwardSumsParams params{to_params(in, eps, relu), partial};
  params.in.tiling = retile(tile_backward_sums(rows, channels), run);
  const char* const fault = run_on_host(plan_backward_sums(params, dtype), params, run);
  if (fault != nullptr || sum_dz == nullptr) return fault;
  const MergeSumsParams merge{partial, sum_dz, sum_dz_xhat, sum_dz_rhat, params.in.tiling};
  return run_on_host(plan_merge_sums(merge), merge, run);
}

// in: as above, then sum_dz, sum_dz_xhat, sum_dz_rhat, count, dtotal
EXPORT const char* backward_dx(Inputs in, Run run, DType dtype, int64_t rows, int64_t channels, float eps, bool relu,
                               void* dx, void* dresidual) {
  const auto vector = [&](int i) { return static_cast<const float*>(in.data[i]); };
  BackwardDxParams params{
      to_params(in, eps, relu), vector(12), vector(13), vector(14), vector(15), in.data[16], dx, dresidual};
  params.in.tiling = retile(tile_elementwise(rows, channels), run);
  return run_on_host(plan_backward_dx(params, dtype), params, run);
}
