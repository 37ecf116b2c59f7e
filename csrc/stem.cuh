// y = maxpool3x3(relu(BN(conv7x7(x)))), both of stride 2, of which only y is written: 16-bit types, tensor cores of
// sm_80 and later. A block keeps the weights of 64 channels and walks over tiles: 3 x 15 pooled pixels, of 7 x 32 of
// the convolution, a warp for each of the 7 rows. The image's tile lies in shared memory as pixels of 4 channels. There
// a filter's row is 8 pixels next to each other, the last with weights 0, and the next column's begin 16 bytes on:
// ldmatrix reads the product's left side out of the image itself.
#pragma once

#include <cstdint>

#include "batch_norm.cuh"

namespace resnet_fused {

struct StemParams {
  const void* x;       // [N, C, H, W] of any strides, of T or bytes
  const void* weight;  // [K, 7, 7, C]
  void* y;             // [N, P, Q, K], aligned to 16 bytes
  const float* mean;   // [C] of pixels between 0 and 1, where x is of bytes; null elsewhere
  const float* std;
  BatchNorm bn;  // [K]
  float eps;
  int64_t stride_n, stride_c, stride_h, stride_w;  // of x
  int channels;                                    // C, up to kStemDepth
  int height, width;
  int filters;                    // K, a multiple of kGroup
  unsigned tiles, bands, strips;  // tiles of all images, and down and across one
};

constexpr int kStemDepth = 4;  // channels of a pixel in shared memory
constexpr int kStemTaps = 8;   // pixels of a filter's row there
constexpr int kStemFilters = 64;
constexpr int kStemPooledRows = 3, kStemPooledColumns = 15;
constexpr int kStemRows = 2 * kStemPooledRows + 1, kStemColumns = 32;  // of the convolution
constexpr int kStemThreads = kStemRows * kWarp;
constexpr int kStemBlocks = 2;  // of a multiprocessor, where its shared memory has room
constexpr int kStemImageRows = 2 * (kStemRows - 1) + 7, kStemImageColumns = 2 * (kStemColumns - 1) + kStemTaps;
constexpr int kStemK = 7 * kStemTaps * kStemDepth;
constexpr int kStemWeightPitch = kStemK + 8;     // elements; 8 rows fall on banks of their own
constexpr int kStemMapPitch = kStemFilters + 8;  // likewise

// In elements of 2 bytes. The convolution's map takes the image's place.
constexpr int kStemWeightSize = kStemFilters * kStemWeightPitch;
constexpr int kStemImageSize = kStemImageRows * kStemImageColumns * kStemDepth;
constexpr int kStemMapSize = kStemRows * kStemColumns * kStemMapPitch;
constexpr int kStemShared =
    2 * (kStemWeightSize + (kStemMapSize > kStemImageSize ? kStemMapSize : kStemImageSize)) + 3 * 4 * kStemFilters;

__device__ __forceinline__ void load_matrices(const void* row, unsigned (&out)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row))));
}

// sum [16, 8] += a [16, 16] b [16, 8]
template <typename T>
__device__ __forceinline__ void multiply(const unsigned (&a)[4], unsigned b0, unsigned b1, float (&sum)[4]) {
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// NaN where either is.
template <typename T>
__device__ __forceinline__ Pack<T, kGroup> max_of(Pack<T, kGroup> a, const Pack<T, kGroup>& b) {
#pragma unroll
  for (int k = 0; k < kGroup / 2; ++k) a.pairs[k] = __hmax2_nan(a.pairs[k], b.pairs[k]);
  return a;
}

template <typename T>
__device__ __forceinline__ void load_stem_weights(const StemParams& p, int first, T* weights) {
  const T* const from = static_cast<const T*>(p.weight);
  for (int i = threadIdx.x; i < kStemFilters * kStemK; i += kStemThreads) {
    const int k = i / kStemK, c = i % kStemDepth, s = i / kStemDepth % kStemTaps;
    const int r = i / (kStemDepth * kStemTaps) % 7;
    const bool given = first + k < p.filters && s < 7 && c < p.channels;
    T value;
    from_float(0.f, value);
    if (given) value = from[((static_cast<int64_t>(first + k) * 7 + r) * 7 + s) * p.channels + c];
    weights[k * kStemWeightPitch + i % kStemK] = value;
  }
}

// Pixels from (row, column) of an image on; what is outside it is 0, of bytes 0 of what is normalised.
template <typename T, typename X>
__device__ __forceinline__ void load_stem_image(const StemParams& p, const X* image, int row, int column, T* tile) {
  float scale[kStemDepth], shift[kStemDepth];
  if constexpr (!std::is_same_v<X, T>) {
#pragma unroll
    for (int c = 0; c < kStemDepth; ++c) {
      const float std = c < p.channels ? p.std[c] : 1.f;
      scale[c] = 1.f / (255.f * std);
      shift[c] = c < p.channels ? p.mean[c] / std : 0.f;
    }
  }
  for (int i = threadIdx.x; i < kStemImageRows * kStemImageColumns; i += kStemThreads) {
    const int h = row + i / kStemImageColumns, w = column + i % kStemImageColumns;
    const bool inside = h >= 0 && h < p.height && w >= 0 && w < p.width;
    const X* const pixel = image + h * p.stride_h + w * p.stride_w;
    alignas(8) T values[kStemDepth];
#pragma unroll
    for (int c = 0; c < kStemDepth; ++c) {
      from_float(0.f, values[c]);
      if (!inside || c >= p.channels) continue;
      if constexpr (std::is_same_v<X, T>) {
        values[c] = pixel[c * p.stride_c];
      } else {
        from_float(static_cast<float>(pixel[c * p.stride_c]) * scale[c] - shift[c], values[c]);
      }
    }
    reinterpret_cast<uint2*>(tile)[i] = *reinterpret_cast<const uint2*>(values);
  }
}

template <typename T, typename X>
__global__ void __launch_bounds__(kStemThreads, kStemBlocks) stem_kernel(const StemParams p) {
  extern __shared__ __align__(16) unsigned char shared[];
  T* const weights = reinterpret_cast<T*>(shared);
  T* const tile = weights + kStemWeightSize;                                                // of the image
  T* const map = tile;                                                                      // of the convolution
  float* const affine = reinterpret_cast<float*>(shared + kStemShared) - 3 * kStemFilters;  // scale, mean, shift
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int first_filter = blockIdx.y * kStemFilters;

  load_stem_weights(p, first_filter, weights);
  for (int k = threadIdx.x; k < kStemFilters; k += kStemThreads) {
    const bool given = first_filter + k < p.filters;
    const Affine<1> bn = load_affine<T, 1, false>(p.bn, given ? first_filter + k : 0, 1, p.eps);
    affine[k] = bn.scale[0];
    affine[kStemFilters + k] = bn.mean[0];
    affine[2 * kStemFilters + k] = bn.shift[0];
  }

  for (unsigned i = blockIdx.x; i < p.tiles; i += gridDim.x) {
    const int strip = i % p.strips, band = i / p.strips % p.bands;
    const int64_t image = i / p.strips / p.bands;
    const int first_p = band * kStemPooledRows, first_q = strip * kStemPooledColumns;
    const int first_row = 2 * first_p - 1, first_column = 2 * first_q - 1;  // of the convolution

    __syncthreads();  // the map of the tile before was read
    load_stem_image(p, static_cast<const X*>(p.x) + image * p.stride_n, 2 * first_row - 3, 2 * first_column - 3, tile);
    __syncthreads();

    float sums[2][kStemFilters / 8][4] = {};
#pragma unroll 2  // a row of the filter
    for (int step = 0; step < kStemK / 16; ++step) {
      const int r = step / 2, half = step % 2;  // 4 of its 8 pixels
      unsigned a[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const int column = 2 * (16 * m + lane % 16) + 4 * half + 2 * (lane / 16);
        load_matrices(tile + ((2 * warp + r) * kStemImageColumns + column) * kStemDepth, a[m]);
        if (half == 1 && lane % 4 >= 2) a[m][2] = a[m][3] = 0;  // the eighth pixel, whose NaN times 0 were NaN
      }
#pragma unroll
      for (int n = 0; n < kStemFilters / 16; ++n) {
        unsigned b[4];
        const int k = 16 * n + lane / 16 * 8 + lane % 8;
        load_matrices(weights + k * kStemWeightPitch + 16 * step + lane / 8 % 2 * 8, b);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          multiply<T>(a[m], b[0], b[1], sums[m][2 * n]);
          multiply<T>(a[m], b[2], b[3], sums[m][2 * n + 1]);
        }
      }
    }
    __syncthreads();  // the image was read

    const bool row_inside = first_row + warp >= 0 && first_row + warp < (p.height + 1) / 2;
#pragma unroll
    for (int n = 0; n < kStemFilters / 8; ++n) {
      const int k = 8 * n + lane % 4 * 2;
      const float2 scale = *reinterpret_cast<const float2*>(affine + k);
      const float2 mean = *reinterpret_cast<const float2*>(affine + kStemFilters + k);
      const float2 bias = *reinterpret_cast<const float2*>(affine + 2 * kStemFilters + k);
#pragma unroll
      for (int part = 0; part < 4; ++part) {  // a fragment's rows are lane / 4 and 8 on
        const int column = 8 * part + lane / 4;
        const float* const sum = sums[part / 2][n] + part % 2 * 2;
        float2 v{scale.x * (sum[0] - mean.x) + bias.x, scale.y * (sum[1] - mean.y) + bias.y};
        const int w = first_column + column;
        const bool inside = row_inside && w >= 0 && w < (p.width + 1) / 2;
        if (v.x <= 0.f || !inside) v.x = 0.f;  // NaN passes; after ReLU 0 stands for what is outside the map
        if (v.y <= 0.f || !inside) v.y = 0.f;
        T* const to = map + (warp * kStemColumns + column) * kStemMapPitch + k;
        from_float(v, *reinterpret_cast<typename PairOf<T>::type*>(to));
      }
    }
    __syncthreads();

    const int P = (p.height + 3) / 4, Q = (p.width + 3) / 4;
    constexpr int kGroups = kStemFilters / kGroup;
    for (int j = threadIdx.x; j < kStemPooledRows * kStemPooledColumns * kGroups; j += kStemThreads) {
      const int group = j % kGroups, column = j / kGroups % kStemPooledColumns;
      const int row = j / (kGroups * kStemPooledColumns);
      const int k = first_filter + group * kGroup;
      if (first_p + row >= P || first_q + column >= Q || k >= p.filters) continue;
      Pack<T, kGroup> most;
#pragma unroll
      for (int t = 0; t < 9; ++t) {
        const int pixel = (2 * row + t / 3) * kStemColumns + 2 * column + t % 3;
        const Pack<T, kGroup> value = load<kGroup>(map + pixel * kStemMapPitch + group * kGroup);
        most = t == 0 ? value : max_of(most, value);
      }
      const int64_t pixel = (image * P + first_p + row) * Q + first_q + column;
      store(static_cast<T*>(p.y) + pixel * p.filters + k, most);
    }
  }
}

}  // namespace resnet_fused
