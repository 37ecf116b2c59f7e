// y = act(s * (z - mean) + beta [+ residual | + s2 * (residual - mean2) + beta2]),  z = x [+ pre_add],
// s = weight / sqrt(var + eps), on activations [rows, channels] (channels_last), in float32.
// Device code and launch planning without Torch headers: the tests compile this file for the host.
#pragma once

#include <cstdint>

#include "vec.cuh"

namespace resnet_fused {

enum class DType { kFloat, kHalf, kBFloat16 };
enum class Residual { kNone, kPlain, kNormalized };

// Vectors [channels]. A null weight is 1, a null bias 0; mean and var null together: no normalisation.
struct BatchNorm {
  const void* weight;
  const void* bias;
  const void* mean;
  const void* var;
};

struct BatchNormActParams {
  const void* x;         // [rows, channels]
  void* y;               // [rows, channels]
  const void* residual;  // [rows, channels] or null
  const void* pre_add;   // [rows, channels] or null
  void* sum;             // [rows, channels]: x + pre_add rounded to x's dtype; null without pre_add
  BatchNorm bn;
  BatchNorm residual_bn;
  float eps;
  bool relu;
  int64_t rows;
  int64_t channels;
  int64_t stride;  // from one of a thread's packs to its next, in elements: whole rows; set by the plan
};

constexpr int kBatchNormActThreads = 256;

// v -> scale * (v - mean) + shift
template <int kVec>
struct Affine {
  float scale[kVec];
  float mean[kVec];
  float shift[kVec];
};

template <typename Stat, int kVec>
__device__ __forceinline__ void load_or(const void* vector, int64_t channel, float otherwise, float (&out)[kVec]) {
  if (vector != nullptr) {
    unpack(load<kVec>(static_cast<const Stat*>(vector) + channel), out);
  } else {
#pragma unroll
    for (int k = 0; k < kVec; ++k) out[k] = otherwise;
  }
}

template <typename Stat, int kVec>
__device__ __forceinline__ Affine<kVec> load_affine(const BatchNorm& bn, int64_t channel, float eps) {
  Affine<kVec> affine;
  load_or<Stat>(bn.weight, channel, 1.f, affine.scale);
  load_or<Stat>(bn.bias, channel, 0.f, affine.shift);
  load_or<Stat>(bn.mean, channel, 0.f, affine.mean);
  if (bn.var != nullptr) {
    float var[kVec];
    unpack(load<kVec>(static_cast<const Stat*>(bn.var) + channel), var);
#pragma unroll
    for (int k = 0; k < kVec; ++k) affine.scale[k] /= sqrtf(var[k] + eps);
  }
  return affine;
}

// A thread keeps its kVec channels: their coefficients stay in registers while it walks down the rows.
template <typename T, typename Stat, int kVec, Residual kResidual, bool kPreAdd>
__global__ void __launch_bounds__(kBatchNormActThreads) batch_norm_act_kernel(const BatchNormActParams p) {
  constexpr int kInFlight = kVec == 1 ? 8 : 2;  // packs loaded before the first is used
  const int64_t first = (int64_t{blockIdx.x} * kBatchNormActThreads + threadIdx.x) * kVec;
  if (first >= p.stride) return;
  const int64_t channel = first % p.channels;
  const int64_t numel = p.rows * p.channels;

  Affine<kVec> bn = load_affine<Stat, kVec>(p.bn, channel, p.eps);
  [[maybe_unused]] Affine<kVec> shortcut_bn;
  if constexpr (kResidual == Residual::kNormalized) {
    shortcut_bn = load_affine<Stat, kVec>(p.residual_bn, channel, p.eps);
#pragma unroll
    for (int k = 0; k < kVec; ++k) bn.shift[k] += shortcut_bn.shift[k];
  }

  for (int64_t base = first; base < numel; base += kInFlight * p.stride) {
    Pack<T, kVec> x[kInFlight];
    [[maybe_unused]] Pack<T, kVec> pre_add[kInFlight];
    [[maybe_unused]] Pack<T, kVec> residual[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const int64_t i = base + u * p.stride;
      if (i >= numel) break;
      x[u] = load<kVec>(static_cast<const T*>(p.x) + i);
      if constexpr (kPreAdd) pre_add[u] = load<kVec>(static_cast<const T*>(p.pre_add) + i);
      if constexpr (kResidual != Residual::kNone) residual[u] = load<kVec>(static_cast<const T*>(p.residual) + i);
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const int64_t i = base + u * p.stride;
      if (i >= numel) break;
      float z[kVec];
      unpack(x[u], z);
      if constexpr (kPreAdd) {
        float addend[kVec];
        unpack(pre_add[u], addend);
#pragma unroll
        for (int k = 0; k < kVec; ++k) z[k] += addend[k];
        const Pack<T, kVec> sum = round_to<T>(z);
        store(static_cast<T*>(p.sum) + i, sum);
        unpack(sum, z);
      }
#pragma unroll
      for (int k = 0; k < kVec; ++k) z[k] = bn.scale[k] * (z[k] - bn.mean[k]) + bn.shift[k];
      if constexpr (kResidual != Residual::kNone) {
        float r[kVec];
        unpack(residual[u], r);
#pragma unroll
        for (int k = 0; k < kVec; ++k) {
          z[k] += kResidual == Residual::kPlain ? r[k] : shortcut_bn.scale[k] * (r[k] - shortcut_bn.mean[k]);
        }
      }
#pragma unroll
      for (int k = 0; k < kVec; ++k) z[k] = p.relu && z[k] <= 0.f ? 0.f : z[k];  // NaN passes
      store(static_cast<T*>(p.y) + i, round_to<T>(z));
    }
  }
}

using BatchNormActKernel = void (*)(BatchNormActParams);

struct BatchNormActPlan {
  BatchNormActKernel kernel;
  int64_t blocks;
};

template <typename T, typename Stat, int kVec, Residual kResidual>
BatchNormActKernel select_pre_add(const BatchNormActParams& p) {
  return p.pre_add == nullptr ? batch_norm_act_kernel<T, Stat, kVec, kResidual, false>
                              : batch_norm_act_kernel<T, Stat, kVec, kResidual, true>;
}

template <typename T, typename Stat, int kVec>
BatchNormActPlan plan_vec(BatchNormActParams& p, int64_t max_threads) {
  const int64_t rows_at_once = (max_threads * kVec + p.channels - 1) / p.channels;
  p.stride = (p.rows < rows_at_once ? p.rows : rows_at_once) * p.channels;
  const int64_t per_block = int64_t{kBatchNormActThreads} * kVec;
  const int64_t blocks = (p.stride + per_block - 1) / per_block;
  if (p.residual == nullptr) return {select_pre_add<T, Stat, kVec, Residual::kNone>(p), blocks};
  if (p.residual_bn.mean == nullptr) return {select_pre_add<T, Stat, kVec, Residual::kPlain>(p), blocks};
  return {select_pre_add<T, Stat, kVec, Residual::kNormalized>(p), blocks};
}

inline bool is_aligned(const BatchNormActParams& p) {
  uintptr_t bits = 0;
  for (const void* pointer :
       {p.x, static_cast<const void*>(p.y), p.residual, p.pre_add, static_cast<const void*>(p.sum)}) {
    bits |= reinterpret_cast<uintptr_t>(pointer);
  }
  for (const BatchNorm& bn : {p.bn, p.residual_bn}) {
    for (const void* pointer : {bn.weight, bn.bias, bn.mean, bn.var}) bits |= reinterpret_cast<uintptr_t>(pointer);
  }
  return bits % kAccessBytes == 0;
}

template <typename T, typename Stat>
BatchNormActPlan plan_dtype(BatchNormActParams& p, int64_t max_threads) {
  constexpr int kVec = kAccessBytes / sizeof(T);
  return p.channels % kVec == 0 && is_aligned(p) ? plan_vec<T, Stat, kVec>(p, max_threads)
                                                 : plan_vec<T, Stat, 1>(p, max_threads);
}

// Chooses the kernel and the grid and sets p.stride. stat_dtype is kFloat or x_dtype; max_threads is how many threads
// the device holds at once; rows and channels are positive.
inline BatchNormActPlan plan_batch_norm_act(BatchNormActParams& p, DType x_dtype, DType stat_dtype,
                                            int64_t max_threads) {
  const bool float_stats = stat_dtype == DType::kFloat;
  if (x_dtype == DType::kFloat) return plan_dtype<float, float>(p, max_threads);
  if (x_dtype == DType::kHalf) {
    return float_stats ? plan_dtype<__half, float>(p, max_threads) : plan_dtype<__half, __half>(p, max_threads);
  }
  return float_stats ? plan_dtype<__nv_bfloat16, float>(p, max_threads)
                     : plan_dtype<__nv_bfloat16, __nv_bfloat16>(p, max_threads);
}

}  // namespace resnet_fused
