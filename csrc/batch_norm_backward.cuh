// Backward of batch_norm_act: dz is dy where the ReLU's gradient passes,
//   dx = s * (dz - mean(dz) - xhat * mean(dz * xhat)) [+ dtotal],  xhat = (z - mean) / sqrt(var + eps),
// the residual's gradient dz, or the same through its own BN. One pass leaves every block's sums, a small kernel adds
// them up, a second pass gives the images' gradients.
#pragma once

#include "batch_norm.cuh"

namespace resnet_fused {

struct BackwardParams {
  const void* dy;            // [rows, channels]
  const void* z;             // [rows, channels]
  const void* residual;      // [rows, channels] or null
  const uint8_t* relu_mask;  // [rows, ceil(channels / 8)], or null: the pre-activation is computed anew
  BatchNorm bn;
  BatchNorm residual_bn;
  float eps;
  bool relu;
  Tiling tiling;
};

struct BackwardSumsParams {
  BackwardParams in;
  float* partial;  // [2, or 3 with residual_bn, splits, channels]: of dz, dz * xhat, dz * rhat
};

struct MergeSumsParams {
  const float* partial;  // [sums, splits, channels]
  float* sum_dz;         // [channels]
  float* sum_dz_xhat;    // [channels]
  float* sum_dz_rhat;    // [channels] or null
  Tiling tiling;
};

struct BackwardDxParams {
  BackwardParams in;
  const float* sum_dz;       // [channels] or null
  const float* sum_dz_xhat;  // [channels], or null where the statistics were given
  const float* sum_dz_rhat;  // [channels], or null where the residual's statistics were given
  const float* count;        // [1]: elements a channel behind the statistics, or null: dy's own
  const void* dtotal;        // [rows, channels] or null
  void* dx;                  // [rows, channels] or null
  void* dresidual;           // [rows, channels] or null
};

// What a thread reads of one row.
template <typename T>
struct BackwardRow {
  Pack<T, kGroup> dy;
  Pack<T, kGroup> z;
  Pack<T, kGroup> residual;
  unsigned mask;
};

// dz, z - mean and, with a residual, residual - mean2.
struct BackwardValues {
  float dz[kGroup];
  float centered[kGroup];
  float centered2[kGroup];
};

template <typename T, bool kPacked, Residual kResidual>
struct BackwardReader {
  const BackwardParams& p;
  const Place& at;
  Affine<kGroup> bn;
  Affine<kGroup> bn2;

  __device__ __forceinline__ BackwardReader(const BackwardParams& p, const Place& at) : p(p), at(at) {
    bn = load_affine<T, kGroup, kPacked>(p.bn, at.channel, at.valid, p.eps);
    if constexpr (kResidual == Residual::kNormalized) {
      bn2 = load_affine<T, kGroup, kPacked>(p.residual_bn, at.channel, at.valid, p.eps);
#pragma unroll
      for (int k = 0; k < kGroup; ++k) bn.shift[k] += bn2.shift[k];
    }
  }

  __device__ __forceinline__ Pack<T, kGroup> load(const void* image, int64_t row) const {
    const T* from = static_cast<const T*>(image) + row * p.tiling.channels + at.channel;
    return load_some<kGroup, kPacked>(from, at.valid);
  }

  __device__ __forceinline__ void load_row(int64_t row, BackwardRow<T>& out) const {
    out.dy = load(p.dy, row);
    out.z = load(p.z, row);
    if constexpr (kResidual != Residual::kNone) out.residual = load(p.residual, row);
    if (p.relu_mask != nullptr) out.mask = p.relu_mask[row * mask_width(p.tiling) + at.channel / kGroup];
  }

  __device__ __forceinline__ void values(const BackwardRow<T>& row, BackwardValues& v) const {
    unpack(row.dy, v.dz);
    unpack(row.z, v.centered);
    if constexpr (kResidual != Residual::kNone) unpack(row.residual, v.centered2);
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      v.centered[k] -= bn.mean[k];
      if constexpr (kResidual == Residual::kNormalized) v.centered2[k] -= bn2.mean[k];
      if (p.relu_mask != nullptr) {
        if (!(row.mask >> k & 1)) v.dz[k] = 0.f;
      } else if (p.relu) {
        float y = bn.scale[k] * v.centered[k] + bn.shift[k];
        if constexpr (kResidual == Residual::kPlain) y += v.centered2[k];
        if constexpr (kResidual == Residual::kNormalized) y += bn2.scale[k] * v.centered2[k];
        if (y <= 0.f) v.dz[k] = 0.f;  // NaN passes
      }
    }
  }
};

// Of the block's threads i, i + columns, ... that share kVec channels: thread t < columns * kVec gets channel t's.
template <int kVec, int kSums>
__device__ __forceinline__ void add_block(float (&own)[kSums][kVec], int columns, float (&total)[kSums]) {
  constexpr int kWarps = kThreads / kWarp;
  __shared__ float sums[kSums][kWarps][kWarp * kVec];
  const int thread = threadIdx.x;
  const int warp = thread / kWarp;
  const int lane = thread % kWarp;
#pragma unroll
  for (int s = 0; s < kSums; ++s) {
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
      for (int offset = kWarp / 2; offset >= columns; offset /= 2) {
        own[s][k] += __shfl_xor_sync(kAllLanes, own[s][k], offset);
      }
      if (lane < columns) sums[s][warp][lane * kVec + k] = own[s][k];
    }
  }
  __syncthreads();
#pragma unroll
  for (int s = 0; s < kSums; ++s) {
    total[s] = 0.f;
    if (thread < columns * kVec) {
      for (int w = 0; w < kWarps; ++w) total[s] += sums[s][w][thread];
    }
  }
}

// Of a multiprocessor: two BNs' coefficients are 64 registers.
template <typename T, bool kPacked>
constexpr int kBackwardBlocks = kPacked && sizeof(T) == 2 ? 2 : 1;

template <typename T, bool kPacked, Residual kResidual>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks<T, kPacked>)
    backward_sums_kernel(const BackwardSumsParams p) {
  constexpr bool kNormalized = kResidual == Residual::kNormalized;
  constexpr int kSums = kNormalized ? 3 : 2;
  constexpr int kInFlight = kNormalized ? 1 : kRowsInFlight<T, kPacked> * (kResidual == Residual::kNone ? 2 : 1);
  const Tiling& t = p.in.tiling;
  const Place at = place(t);
  const BackwardReader<T, kPacked, kResidual> reader(p.in, at);

  float sums[kSums][kGroup] = {};
  for (int64_t base = at.row; base < at.end; base += kInFlight * at.step) {
    BackwardRow<T> rows[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      if (base + u * at.step >= at.end) break;
      reader.load_row(base + u * at.step, rows[u]);
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      if (base + u * at.step >= at.end) break;
      BackwardValues v;
      reader.values(rows[u], v);
#pragma unroll
      for (int k = 0; k < kGroup; ++k) {
        sums[0][k] += v.dz[k];
        sums[1][k] += v.dz[k] * v.centered[k];
        if constexpr (kNormalized) sums[2][k] += v.dz[k] * v.centered2[k];
      }
    }
  }

  float rstd[kGroup];
  load_rstd<T, kGroup, kPacked>(p.in.bn.var, at.channel, at.valid, p.in.eps, rstd);
#pragma unroll
  for (int k = 0; k < kGroup; ++k) sums[1][k] *= rstd[k];
  if constexpr (kNormalized) {
    load_rstd<T, kGroup, kPacked>(p.in.residual_bn.var, at.channel, at.valid, p.in.eps, rstd);
#pragma unroll
    for (int k = 0; k < kGroup; ++k) sums[2][k] *= rstd[k];
  }

  float total[kSums];
  add_block(sums, t.columns, total);
  const int64_t channel = blockIdx.x % t.column_blocks * t.columns * kGroup + threadIdx.x;
  if (threadIdx.x < t.columns * kGroup && channel < t.channels) {
#pragma unroll
    for (int s = 0; s < kSums; ++s) p.partial[(s * t.splits + at.split) * t.channels + channel] = total[s];
  }
}

__global__ void __launch_bounds__(kThreads) merge_sums_kernel(const MergeSumsParams p) {
  const Tiling& t = p.tiling;
  const int count = p.sum_dz_rhat == nullptr ? 2 : 3;
  const int which = blockIdx.x % count;
  float* const sum = which == 0 ? p.sum_dz : which == 1 ? p.sum_dz_xhat : p.sum_dz_rhat;
  const int64_t channel = int64_t{blockIdx.x / count} * kMergeChannels + threadIdx.x % kMergeChannels;
  const float* partial = p.partial + which * t.splits * t.channels;
  float own[1][1] = {};
  if (channel < t.channels) {
#pragma unroll 8
    for (int64_t split = threadIdx.x / kMergeChannels; split < t.splits; split += kThreads / kMergeChannels) {
      own[0][0] += partial[split * t.channels + channel];
    }
  }
  float total[1];
  add_block(own, kMergeChannels, total);
  if (threadIdx.x < kMergeChannels && channel < t.channels) sum[channel] = total[0];
}

template <typename T, bool kPacked, Residual kResidual>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks<T, kPacked>) backward_dx_kernel(const BackwardDxParams p) {
  constexpr bool kNormalized = kResidual == Residual::kNormalized;
  constexpr int kInFlight = kNormalized ? 1 : kRowsInFlight<T, kPacked>;
  const Place at = place(p.in.tiling);
  const int64_t channels = p.in.tiling.channels;
  const BackwardReader<T, kPacked, kResidual> reader(p.in, at);

  // mean(dz), and mean(dz * xhat) / sqrt(var + eps)
  const auto load_means = [&](const float* sum_hat, const Vector& var, float (&mean_dz)[kGroup],
                              float (&slope)[kGroup]) {
    const float share = 1.f / (p.count == nullptr ? static_cast<float>(p.in.tiling.rows) : *p.count);
    float mean_hat[kGroup];
    load_rstd<T, kGroup, kPacked>(var, at.channel, at.valid, p.in.eps, slope);
    load_or<T, kGroup, kPacked>({p.sum_dz, true}, at.channel, at.valid, 0.f, mean_dz);
    load_or<T, kGroup, kPacked>({sum_hat, true}, at.channel, at.valid, 0.f, mean_hat);
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      mean_dz[k] *= share;
      slope[k] *= mean_hat[k] * share;
    }
  };
  float mean_dz[kGroup];
  float slope[kGroup];
  [[maybe_unused]] float slope2[kGroup];
  if (p.sum_dz_xhat != nullptr) load_means(p.sum_dz_xhat, p.in.bn.var, mean_dz, slope);
  if constexpr (kNormalized) {
    if (p.sum_dz_rhat != nullptr) load_means(p.sum_dz_rhat, p.in.residual_bn.var, mean_dz, slope2);
  }

  for (int64_t base = at.row; base < at.end; base += kInFlight * at.step) {
    BackwardRow<T> rows[kInFlight];
    Pack<T, kGroup> dtotal[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      if (base + u * at.step >= at.end) break;
      reader.load_row(base + u * at.step, rows[u]);
      if (p.dtotal != nullptr) dtotal[u] = reader.load(p.dtotal, base + u * at.step);
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      if (base + u * at.step >= at.end) break;
      const int64_t i = (base + u * at.step) * channels + at.channel;
      BackwardValues v;
      reader.values(rows[u], v);
      if (p.dx != nullptr) {
        float g[kGroup];
#pragma unroll
        for (int k = 0; k < kGroup; ++k) {
          g[k] = v.dz[k];
          if (p.sum_dz_xhat != nullptr) g[k] -= mean_dz[k] + v.centered[k] * slope[k];
          g[k] *= reader.bn.scale[k];
        }
        if (p.dtotal != nullptr) {
          float addend[kGroup];
          unpack(dtotal[u], addend);
#pragma unroll
          for (int k = 0; k < kGroup; ++k) g[k] += addend[k];
        }
        store_some<kPacked>(static_cast<T*>(p.dx) + i, g, at.valid);
      }
      if (p.dresidual != nullptr) {
        if constexpr (kNormalized) {
#pragma unroll
          for (int k = 0; k < kGroup; ++k) {
            if (p.sum_dz_rhat != nullptr) v.dz[k] -= mean_dz[k] + v.centered2[k] * slope2[k];
            v.dz[k] *= reader.bn2.scale[k];
          }
        }
        store_some<kPacked>(static_cast<T*>(p.dresidual) + i, v.dz, at.valid);
      }
    }
  }
}

// Two blocks a processor hold the coefficients of two BNs in registers.
inline Tiling tile_backward_sums(int64_t rows, int64_t channels) { return tile(rows, channels, 2 * kProcessors); }

// Which of a residual's roles is left: a mask stands for one that is added as it is, and without a ReLU it does
// nothing.
inline Residual residual_kind(const BackwardParams& p) {
  const Residual kind = residual_kind(p.residual, p.residual_bn);
  return kind == Residual::kPlain && (p.relu_mask != nullptr || !p.relu) ? Residual::kNone : kind;
}

inline bool is_packed(const BackwardParams& p) {
  return p.tiling.channels % kGroup == 0 && is_aligned({p.dy, p.z, p.residual}) && is_aligned(p.bn) &&
         is_aligned(p.residual_bn);
}

inline Launch<BackwardSumsParams> plan_backward_sums(const BackwardSumsParams& p, DType dtype) {
  const Residual residual = residual_kind(p.in);
  const auto kernel = dispatch(dtype, is_packed(p.in), [&](auto type, auto packed) {
    using T = typename decltype(type)::type;
    constexpr bool kPacked = decltype(packed)::value;
    return dispatch(residual, [](auto kind) { return backward_sums_kernel<T, kPacked, decltype(kind)::value>; });
  });
  return {kernel, blocks(p.in.tiling)};
}

inline Launch<MergeSumsParams> plan_merge_sums(const MergeSumsParams& p) {
  return {merge_sums_kernel, ceil_div(p.tiling.channels, kMergeChannels) * (p.sum_dz_rhat == nullptr ? 2 : 3)};
}

inline Launch<BackwardDxParams> plan_backward_dx(const BackwardDxParams& p, DType dtype) {
  const Residual residual = residual_kind(p.in);
  const bool all_packed = is_packed(p.in) && is_aligned({p.dtotal, p.dx, p.dresidual}) &&
                          is_aligned({p.sum_dz, p.sum_dz_xhat, p.sum_dz_rhat});
  const auto kernel = dispatch(dtype, all_packed, [&](auto type, auto packed) {
    using T = typename decltype(type)::type;
    constexpr bool kPacked = decltype(packed)::value;
    return dispatch(residual, [](auto kind) { return backward_dx_kernel<T, kPacked, decltype(kind)::value>; });
  });
  return {kernel, blocks(p.in.tiling)};
}

}  // namespace resnet_fused
