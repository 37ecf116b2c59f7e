// Batch statistics of z = x [+ pre_add] in one read: mean and M2 = sum (z - mean)^2 of every channel, in float32 around
// the channel's first element. Every block leaves those of its rows; a second kernel merges them.
#pragma once

#include "batch_norm.cuh"

namespace resnet_fused {

struct StatisticsParams {
  const void* x;        // [rows, channels]
  const void* pre_add;  // [rows, channels] or null
  void* sum;            // [rows, channels]: x + pre_add rounded to x's dtype; null without pre_add
  float* partial_mean;  // [splits, channels], less the first element
  float* partial_m2;    // [splits, channels]
  Tiling tiling;
};

// [channels] in float32 or in the activations' type, updated in place; data is null where it is absent.
struct Running {
  void* data;
  bool is_float;
};

struct MergeStatisticsParams {
  const void* z;              // [rows, channels]
  const float* partial_mean;  // [splits, channels]
  const float* partial_m2;    // [splits, channels]
  float* mean;                // [channels]
  float* m2;                  // [channels] or null, as the next
  float* var;                 // [channels]
  Running running_mean;
  Running running_var;
  float momentum;
  Tiling tiling;
};

// What several processes found, as the whole batch's.
struct MergeRanksParams {
  const float* ranks;   // [world, 2 * channels + 1]: every rank's means, M2 and count
  float* mean;          // [channels]
  float* var;           // [channels]
  float* count;         // []
  float* running_mean;  // [channels] or null, as the next
  float* running_var;
  float momentum;
  int64_t world;
  int64_t channels;
};

template <int kVec>
struct Moments {
  float count;
  float mean[kVec];
  float m2[kVec];
};

// Chan's formula.
template <int kVec>
__device__ __forceinline__ void merge(Moments<kVec>& into, const Moments<kVec>& other) {
  const float count = into.count + other.count;
  const float weight = count > 0.f ? other.count / count : 0.f;
#pragma unroll
  for (int k = 0; k < kVec; ++k) {
    const float delta = other.mean[k] - into.mean[k];
    into.m2[k] += other.m2[k] + delta * delta * into.count * weight;
    into.mean[k] += delta * weight;
  }
  into.count = count;
}

// Of the block's threads i, i + columns, ... that share kVec channels: thread t < columns * kVec gets channel t's.
template <int kVec>
__device__ __forceinline__ Moments<1> merge_block(Moments<kVec>& own, int columns) {
  constexpr int kWarps = kThreads / kWarp;
  __shared__ float counts[kWarps][kWarp];
  __shared__ float means[kWarps][kWarp * kVec];
  __shared__ float m2s[kWarps][kWarp * kVec];
  const int thread = threadIdx.x;
  const int warp = thread / kWarp;
  const int lane = thread % kWarp;
  for (int offset = kWarp / 2; offset >= columns; offset /= 2) {
    Moments<kVec> other;
    other.count = __shfl_xor_sync(kAllLanes, own.count, offset);
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
      other.mean[k] = __shfl_xor_sync(kAllLanes, own.mean[k], offset);
      other.m2[k] = __shfl_xor_sync(kAllLanes, own.m2[k], offset);
    }
    merge(own, other);
  }
  if (lane < columns) {
    counts[warp][lane] = own.count;
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
      means[warp][lane * kVec + k] = own.mean[k];
      m2s[warp][lane * kVec + k] = own.m2[k];
    }
  }
  __syncthreads();
  Moments<1> merged{};
  if (thread < columns * kVec) {
    for (int w = 0; w < kWarps; ++w) merge(merged, {counts[w][thread / kVec], {means[w][thread]}, {m2s[w][thread]}});
  }
  return merged;
}

template <bool kPreAdd>
constexpr int kStatisticsBlocks = kPreAdd ? 2 : 3;  // of a multiprocessor, by their registers

// Welford's recurrence down each thread's rows.
template <typename T, bool kPacked, bool kPreAdd>
__global__ void __launch_bounds__(kThreads, kStatisticsBlocks<kPreAdd>) statistics_kernel(const StatisticsParams p) {
  constexpr int kInFlight = (kPacked ? 2 : 1) * kRowsInFlight<T, kPacked>;
  const Place at = place(p.tiling);
  const int64_t channels = p.tiling.channels;

  const auto load_x = [&](int64_t row) {
    return load_some<kGroup, kPacked>(static_cast<const T*>(p.x) + row * channels + at.channel, at.valid);
  };
  const auto load_addend = [&](int64_t row) {
    return load_some<kGroup, kPacked>(static_cast<const T*>(p.pre_add) + row * channels + at.channel, at.valid);
  };
  const auto add = [](const Pack<T, kGroup>& x, const Pack<T, kGroup>& addend, float (&z)[kGroup]) {
    float a[kGroup];
    unpack(x, z);
    unpack(addend, a);
#pragma unroll
    for (int k = 0; k < kGroup; ++k) z[k] += a[k];
    unpack(round_to<T>(z), z);
  };

  float pivot[kGroup];
  if constexpr (kPreAdd) {
    add(load_x(0), load_addend(0), pivot);
  } else {
    unpack(load_x(0), pivot);
  }

  Moments<kGroup> own{};
  for (int64_t base = at.row; base < at.end; base += kInFlight * at.step) {
    Pack<T, kGroup> x[kInFlight];
    [[maybe_unused]] Pack<T, kGroup> addend[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const int64_t row = base + u * at.step;
      if (row >= at.end) break;
      x[u] = load_x(row);
      if constexpr (kPreAdd) addend[u] = load_addend(row);
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const int64_t row = base + u * at.step;
      if (row >= at.end) break;
      float z[kGroup];
      if constexpr (kPreAdd) {
        add(x[u], addend[u], z);
        store_some<kPacked>(static_cast<T*>(p.sum) + row * channels + at.channel, z, at.valid);
      } else {
        unpack(x[u], z);
      }
      own.count += 1.f;
      const float part = 1.f / own.count;
#pragma unroll
      for (int k = 0; k < kGroup; ++k) {
        const float d = z[k] - pivot[k] - own.mean[k];
        own.mean[k] += d * part;
        own.m2[k] += d * d * (1.f - part);
      }
    }
  }

  const Moments<1> merged = merge_block(own, p.tiling.columns);
  const int64_t channel = blockIdx.x % p.tiling.column_blocks * p.tiling.columns * kGroup + threadIdx.x;
  if (threadIdx.x < p.tiling.columns * kGroup && channel < channels) {
    p.partial_mean[at.split * channels + channel] = merged.mean[0];
    p.partial_m2[at.split * channels + channel] = merged.m2[0];
  }
}

template <typename T>
__device__ __forceinline__ void move_towards(T& running, float value, float momentum) {
  const float old = to_float(running);
  from_float(old + (value - old) * momentum, running);
}

template <typename T>
__device__ __forceinline__ void update(const Running& running, int64_t channel, float value, float momentum) {
  if (running.data == nullptr) return;
  if (running.is_float) {
    move_towards(static_cast<float*>(running.data)[channel], value, momentum);
  } else {
    move_towards(static_cast<T*>(running.data)[channel], value, momentum);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) merge_statistics_kernel(const MergeStatisticsParams p) {
  const Tiling& t = p.tiling;
  const int64_t channel = int64_t{blockIdx.x} * kMergeChannels + threadIdx.x % kMergeChannels;
  Moments<1> own{};
  if (channel < t.channels) {
#pragma unroll 4
    for (int64_t split = threadIdx.x / kMergeChannels; split < t.splits; split += kThreads / kMergeChannels) {
      const int64_t left = t.rows - split * t.split_rows;
      const int64_t i = split * t.channels + channel;
      const float count = static_cast<float>(left < t.split_rows ? left : t.split_rows);
      merge(own, {count, {p.partial_mean[i]}, {p.partial_m2[i]}});
    }
  }
  const Moments<1> merged = merge_block(own, kMergeChannels);
  if (threadIdx.x < kMergeChannels && channel < t.channels) {
    const float mean = to_float(static_cast<const T*>(p.z)[channel]) + merged.mean[0];
    const float count = static_cast<float>(t.rows);
    p.mean[channel] = mean;
    if (p.m2 != nullptr) p.m2[channel] = merged.m2[0];
    if (p.var != nullptr) p.var[channel] = merged.m2[0] / count;
    update<T>(p.running_mean, channel, mean, p.momentum);
    update<T>(p.running_var, channel, merged.m2[0] / (count - 1.f), p.momentum);
  }
}

// Rank by rank; one may have counted nothing.
__global__ void __launch_bounds__(kThreads) merge_ranks_kernel(const MergeRanksParams p) {
  const int64_t channel = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (channel >= p.channels) return;
  Moments<1> merged{};
  for (int64_t rank = 0; rank < p.world; ++rank) {
    const float* const own = p.ranks + rank * (2 * p.channels + 1);
    merge(merged, {own[2 * p.channels], {own[channel]}, {own[p.channels + channel]}});
  }
  if (!(merged.count > 0.f)) merged.mean[0] = merged.m2[0] = nanf("");  // as PyTorch's mean of nothing
  p.mean[channel] = merged.mean[0];
  p.var[channel] = merged.m2[0] / merged.count;
  if (channel == 0) *p.count = merged.count;
  if (p.running_mean == nullptr) return;
  move_towards(p.running_mean[channel], merged.mean[0], p.momentum);
  move_towards(p.running_var[channel], merged.m2[0] / (merged.count - 1.f), p.momentum);
}

inline Tiling tile_statistics(int64_t rows, int64_t channels, bool pre_add) {
  return tile(rows, channels, kProcessors * (pre_add ? kStatisticsBlocks<true> : kStatisticsBlocks<false>));
}

inline Launch<StatisticsParams> plan_statistics(const StatisticsParams& p, DType dtype) {
  const bool packed = p.tiling.channels % kGroup == 0 && is_aligned({p.x, p.pre_add, p.sum});
  const bool pre_add = p.pre_add != nullptr;
  const auto kernel = dispatch(dtype, packed, [&](auto type, auto is_packed) {
    using T = typename decltype(type)::type;
    constexpr bool kPacked = decltype(is_packed)::value;
    return pre_add ? statistics_kernel<T, kPacked, true> : statistics_kernel<T, kPacked, false>;
  });
  return {kernel, blocks(p.tiling)};
}

inline Launch<MergeStatisticsParams> plan_merge_statistics(const MergeStatisticsParams& p, DType dtype) {
  const auto kernel =
      dispatch(dtype, true, [](auto type, auto) { return merge_statistics_kernel<typename decltype(type)::type>; });
  return {kernel, ceil_div(p.tiling.channels, kMergeChannels)};
}

inline Launch<MergeRanksParams> plan_merge_ranks(const MergeRanksParams& p) {
  return {merge_ranks_kernel, ceil_div(p.channels, kThreads)};
}

}  // namespace resnet_fused
