// C ABI over raw pointers for csrc/batch_norm_statistics.cuh, compiled for the host.
#include "bindings.h"
// The kernels see the keywords of the header above.
#include "batch_norm_statistics.cuh"

using namespace resnet_fused;

EXPORT int64_t statistics_splits(Run run, int64_t rows, int64_t channels, bool pre_add) {
  return retile(tile_statistics(rows, channels, pre_add), run).splits;
}

// in: x, pre_add, and, for their dtypes, running_mean and running_var; partial: [2, splits, channels]; without mean the
// first kernel alone
EXPORT const char* statistics(Inputs in, Run run, DType dtype, int64_t rows, int64_t channels, void* sum,
                              float* partial, float* mean, float* m2, float* var, void* running_mean, void* running_var,
                              float momentum) {
  const Tiling tiling = retile(tile_statistics(rows, channels, in.data[1] != nullptr), run);
  float* const partial_m2 = partial + tiling.splits * channels;
  const StatisticsParams params{in.data[0], in.data[1], sum, partial, partial_m2, tiling};
  const char* const fault = run_on_host(plan_statistics(params, dtype), params, run);
  if (fault != nullptr || mean == nullptr) return fault;
  const void* const z = in.data[1] == nullptr ? in.data[0] : sum;
  const Running to_mean{running_mean, in.is_float[2]}, to_var{running_var, in.is_float[3]};
  const MergeStatisticsParams merge{z, partial, partial_m2, mean, m2, var, to_mean, to_var, momentum, tiling};
  return run_on_host(plan_merge_statistics(merge, dtype), merge, run);
}

// in: ranks [world, width]
EXPORT const char* merge_ranks(Inputs in, Run run, DType, int64_t world, int64_t width, float momentum, float* mean,
                               float* var, float* count, float* running_mean, float* running_var) {
  const auto* const ranks = static_cast<const float*>(in.data[0]);
  const MergeRanksParams params{ranks, mean, var, count, running_mean, running_var, momentum, world, width / 2};
  return run_on_host(plan_merge_ranks(params), params, run);
}
