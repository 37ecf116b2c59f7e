// y = act(s * (z - mean) + beta [+ residual | + s2 * (residual - mean2) + beta2]),  z = x [+ pre_add],
// s = weight / sqrt(var + eps), on activations [rows, channels] (channels_last), in float32.
#pragma once

#include <cstdint>

#include "batch_norm.cuh"

namespace resnet_fused {

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

// A thread keeps its kVec channels: their coefficients stay in registers while it walks down the rows.
template <typename T, int kVec, Residual kResidual, bool kPreAdd>
__global__ void __launch_bounds__(kThreads) batch_norm_act_kernel(const BatchNormActParams p) {
  constexpr int kInFlight = kVec == 1 ? 8 : 2;  // packs loaded before the first is used
  const int64_t first = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kVec;
  if (first >= p.stride) return;
  const int64_t channel = first % p.channels;
  const int64_t numel = p.rows * p.channels;

  Affine<kVec> bn = load_affine<T, kVec, true>(p.bn, channel, kVec, p.eps);
  [[maybe_unused]] Affine<kVec> shortcut_bn;
  if constexpr (kResidual == Residual::kNormalized) {
    shortcut_bn = load_affine<T, kVec, true>(p.residual_bn, channel, kVec, p.eps);
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

struct BatchNormMaskParams {
  const void* x;         // [rows, channels]
  const void* residual;  // [rows, channels]
  void* y;               // [rows, channels]
  uint8_t* relu_mask;    // [rows, ceil(channels / 8)]
  BatchNorm bn;
  float eps;
  Tiling tiling;
};

// y = relu(BN(x) + residual), and where its gradient passes: channel 8 * i + j is bit j of byte i.
template <typename T, bool kPacked>
__global__ void __launch_bounds__(kThreads, 2) batch_norm_mask_kernel(const BatchNormMaskParams p) {
  constexpr int kInFlight = kRowsInFlight<T, kPacked>;
  const Place at = place(p.tiling);
  const Affine<kGroup> bn = load_affine<T, kGroup, kPacked>(p.bn, at.channel, at.valid, p.eps);
  for (int64_t base = at.row; base < at.end; base += kInFlight * at.step) {
    Pack<T, kGroup> x[kInFlight];
    Pack<T, kGroup> residual[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const int64_t row = base + u * at.step;
      if (row >= at.end) break;
      const int64_t i = row * p.tiling.channels + at.channel;
      x[u] = load_some<kGroup, kPacked>(static_cast<const T*>(p.x) + i, at.valid);
      residual[u] = load_some<kGroup, kPacked>(static_cast<const T*>(p.residual) + i, at.valid);
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const int64_t row = base + u * at.step;
      if (row >= at.end) break;
      float y[kGroup];
      float r[kGroup];
      unpack(x[u], y);
      unpack(residual[u], r);
      unsigned passes = 0;
#pragma unroll
      for (int k = 0; k < kGroup; ++k) {
        y[k] = bn.scale[k] * (y[k] - bn.mean[k]) + bn.shift[k] + r[k];
        if (y[k] <= 0.f) y[k] = 0.f;  // NaN passes
        if (k < at.valid && y[k] != 0.f) passes |= 1u << k;
      }
      store_some<kPacked>(static_cast<T*>(p.y) + row * p.tiling.channels + at.channel, y, at.valid);
      p.relu_mask[row * mask_width(p.tiling) + at.channel / kGroup] = static_cast<uint8_t>(passes);
    }
  }
}

// Chooses the kernel and the grid and sets p.stride. max_threads is how many threads the device holds at once; rows and
// channels are positive.
inline Launch<BatchNormActParams> plan_batch_norm_act(BatchNormActParams& p, DType dtype, int64_t max_threads) {
  const int size = dtype == DType::kFloat ? 4 : 2;
  const bool packed = p.channels % (kAccessBytes / size) == 0 && is_aligned({p.x, p.y, p.residual, p.pre_add, p.sum}) &&
                      is_aligned(p.bn) && is_aligned(p.residual_bn);
  const int vec = packed ? kAccessBytes / size : 1;
  const int64_t rows_at_once = ceil_div(max_threads * vec, p.channels);
  p.stride = (p.rows < rows_at_once ? p.rows : rows_at_once) * p.channels;
  const Residual residual = residual_kind(p.residual, p.residual_bn);
  const bool pre_add = p.pre_add != nullptr;
  const auto kernel = dispatch(dtype, packed, [&](auto type, auto is_packed) {
    using T = typename decltype(type)::type;
    constexpr int kVec = decltype(is_packed)::value ? kAccessBytes / int{sizeof(T)} : 1;
    return dispatch(residual, [&](auto kind) {
      constexpr Residual kResidual = decltype(kind)::value;
      return pre_add ? batch_norm_act_kernel<T, kVec, kResidual, true>
                     : batch_norm_act_kernel<T, kVec, kResidual, false>;
    });
  });
  return {kernel, ceil_div(p.stride, int64_t{kThreads} * vec)};
}

// p.tiling.rows and .channels are given and positive.
inline Launch<BatchNormMaskParams> plan_batch_norm_mask(BatchNormMaskParams& p, DType dtype) {
  const bool packed = p.tiling.channels % kGroup == 0 && is_aligned({p.x, p.residual, p.y}) && is_aligned(p.bn);
  const auto kernel = dispatch(dtype, packed, [](auto type, auto is_packed) {
    return batch_norm_mask_kernel<typename decltype(type)::type, decltype(is_packed)::value>;
  });
  return {kernel, blocks(p.tiling)};
}

}  // namespace resnet_fused
