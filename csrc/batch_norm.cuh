// What the BN kernels share: a channel's coefficients, and how [rows, channels] is shared out among blocks and threads.
// Device code and launch planning without Torch headers: the tests compile it for the host.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "vec.cuh"

namespace resnet_fused {

enum class DType { kFloat, kHalf, kBFloat16 };
enum class Residual { kNone, kPlain, kNormalized };

// [channels] in float32 or in the activations' type; data is null where it is absent.
struct Vector {
  const void* data;
  bool is_float;
};

// A weight that is absent is 1, a bias 0; mean and var absent together: no normalisation.
struct BatchNorm {
  Vector weight;
  Vector bias;
  Vector mean;
  Vector var;
};

// v -> scale * (v - mean) + shift
template <int kVec>
struct Affine {
  float scale[kVec];
  float mean[kVec];
  float shift[kVec];
};

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kGroup = 8;          // channels of a thread: 128 bits in 16-bit types, and a byte of the 1-bit mask
constexpr int kMergeChannels = 8;  // of a block that merges partial results: a 32-byte sector of each split

template <typename T, bool kPacked>
constexpr int kRowsInFlight = kPacked && sizeof(T) == 2 ? 2 : 1;  // loaded before the first is used: 32 bytes of each

template <typename T, int kVec, bool kPacked>
__device__ __forceinline__ void load_or(const Vector& vector, int64_t channel, int valid, float otherwise,
                                        float (&out)[kVec]) {
  if (vector.data == nullptr) {
#pragma unroll
    for (int k = 0; k < kVec; ++k) out[k] = otherwise;
  } else if (vector.is_float) {
    unpack(load_some<kVec, kPacked>(static_cast<const float*>(vector.data) + channel, valid), out);
  } else {
    unpack(load_some<kVec, kPacked>(static_cast<const T*>(vector.data) + channel, valid), out);
  }
}

// 1 / sqrt(var + eps), or 1 without a variance.
template <typename T, int kVec, bool kPacked>
__device__ __forceinline__ void load_rstd(const Vector& var, int64_t channel, int valid, float eps,
                                          float (&out)[kVec]) {
  load_or<T, kVec, kPacked>(var, channel, valid, 1.f, out);
  if (var.data == nullptr) return;
#pragma unroll
  for (int k = 0; k < kVec; ++k) out[k] = 1.f / sqrtf(out[k] + eps);
}

template <typename T, int kVec, bool kPacked>
__device__ __forceinline__ Affine<kVec> load_affine(const BatchNorm& bn, int64_t channel, int valid, float eps) {
  Affine<kVec> affine;
  float rstd[kVec];
  load_rstd<T, kVec, kPacked>(bn.var, channel, valid, eps, rstd);
  load_or<T, kVec, kPacked>(bn.weight, channel, valid, 1.f, affine.scale);
  load_or<T, kVec, kPacked>(bn.bias, channel, valid, 0.f, affine.shift);
  load_or<T, kVec, kPacked>(bn.mean, channel, valid, 0.f, affine.mean);
#pragma unroll
  for (int k = 0; k < kVec; ++k) affine.scale[k] *= rstd[k];
  return affine;
}

// Blocks lie side by side over the channels, `columns` groups each, and share out the rows in `splits`.
struct Tiling {
  int64_t rows;
  int64_t channels;
  int64_t splits;
  int64_t split_rows;  // of every split but the last
  int64_t column_blocks;
  int columns;  // a power of two up to kWarp
};

// A thread's group of channels, and its rows: row, row + step, ... below end.
struct Place {
  int64_t split;
  int64_t channel;
  int valid;  // channels of the group; 0 for a thread beyond the last channel, which has no rows
  int64_t row;
  int64_t end;
  int step;
};

__device__ __forceinline__ Place place(const Tiling& t) {
  const int thread = threadIdx.x;
  const int column = thread & (t.columns - 1);
  Place at;
  at.split = blockIdx.x / t.column_blocks;
  at.channel = (blockIdx.x % t.column_blocks * t.columns + column) * kGroup;
  const int64_t left = t.channels - at.channel;
  at.valid = left < 0 ? 0 : static_cast<int>(left < kGroup ? left : kGroup);
  at.step = kThreads / t.columns;
  at.row = at.split * t.split_rows + thread / t.columns;
  at.end = at.row < t.rows && at.valid > 0 ? (at.split + 1) * t.split_rows : 0;
  if (at.end > t.rows) at.end = t.rows;
  if (at.valid == 0) at.channel = 0;  // its loads of vectors stay inside
  return at;
}

__device__ __forceinline__ int64_t mask_width(const Tiling& t) { return (t.channels + kGroup - 1) / kGroup; }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Up to max_blocks blocks, or more where a thread would have over max_rows rows. By the shape alone: a sum has the same
// bits on every GPU.
inline Tiling tile(int64_t rows, int64_t channels, int64_t max_blocks, int64_t max_rows = INT64_MAX) {
  Tiling t{};
  t.rows = rows;
  t.channels = channels;
  const int64_t groups = ceil_div(channels, kGroup);
  t.columns = 1;
  while (t.columns < kWarp && t.columns < groups) t.columns *= 2;
  t.column_blocks = ceil_div(groups, t.columns);
  const int64_t step = kThreads / t.columns;
  const int64_t steps = ceil_div(rows, step);
  const int64_t max_splits = max_blocks < t.column_blocks ? 1 : max_blocks / t.column_blocks;
  const int64_t thread_rows = ceil_div(steps, max_splits);
  t.split_rows = (thread_rows < max_rows ? thread_rows : max_rows) * step;
  t.splits = ceil_div(rows, t.split_rows);
  return t;
}

inline int64_t blocks(const Tiling& t) { return t.splits * t.column_blocks; }

constexpr int64_t kProcessors = 108;  // an A100's: a grid of these times a few runs there, or on a larger GPU, at once

inline Tiling tile_elementwise(int64_t rows, int64_t channels) { return tile(rows, channels, 8 * kProcessors, 32); }

inline bool is_aligned(std::initializer_list<const void*> pointers) {
  uintptr_t bits = 0;
  for (const void* pointer : pointers) bits |= reinterpret_cast<uintptr_t>(pointer);
  return bits % kAccessBytes == 0;
}

inline bool is_aligned(const BatchNorm& bn) {
  return is_aligned({bn.weight.data, bn.bias.data, bn.mean.data, bn.var.data});
}

inline Residual residual_kind(const void* residual, const BatchNorm& residual_bn) {
  if (residual == nullptr) return Residual::kNone;
  return residual_bn.mean.data == nullptr ? Residual::kPlain : Residual::kNormalized;
}

// A kernel of kThreads threads, and its grid.
template <typename Params>
struct Launch {
  void (*kernel)(Params);
  int64_t blocks;
};

template <typename T>
struct Type {
  using type = T;
};

// select(Type<T>, packed as a constant) of the run-time values
template <typename Select>
auto dispatch(DType dtype, bool packed, Select select) {
  const auto with = [&](auto type) {
    return packed ? select(type, std::true_type{}) : select(type, std::false_type{});
  };
  if (dtype == DType::kFloat) return with(Type<float>{});
  return dtype == DType::kHalf ? with(Type<__half>{}) : with(Type<__nv_bfloat16>{});
}

template <typename Select>
auto dispatch(Residual residual, Select select) {
  if (residual == Residual::kNone) return select(std::integral_constant<Residual, Residual::kNone>{});
  if (residual == Residual::kPlain) return select(std::integral_constant<Residual, Residual::kPlain>{});
  return select(std::integral_constant<Residual, Residual::kNormalized>{});
}

}  // namespace resnet_fused
