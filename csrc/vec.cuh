// Packed input and output for fp16, bf16 and fp32: N channels a thread in accesses of up to 128 bits, arithmetic in
// float32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace resnet_fused {

constexpr int kAccessBytes = 16;

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

__device__ __forceinline__ float2 to_float(float2 v) { return v; }
__device__ __forceinline__ float2 to_float(__half2 v) { return __half22float2(v); }
__device__ __forceinline__ float2 to_float(__nv_bfloat162 v) { return __bfloat1622float2(v); }

// Rounds to nearest even.
__device__ __forceinline__ void from_float(float v, float& out) { out = v; }
__device__ __forceinline__ void from_float(float v, __half& out) { out = __float2half_rn(v); }
__device__ __forceinline__ void from_float(float v, __nv_bfloat16& out) { out = __float2bfloat16_rn(v); }

__device__ __forceinline__ void from_float(float2 v, float2& out) { out = v; }
__device__ __forceinline__ void from_float(float2 v, __half2& out) { out = __float22half2_rn(v); }
__device__ __forceinline__ void from_float(float2 v, __nv_bfloat162& out) { out = __float22bfloat162_rn(v); }

template <typename T>
struct PairOf;
template <>
struct PairOf<float> {
  using type = float2;
};
template <>
struct PairOf<__half> {
  using type = __half2;
};
template <>
struct PairOf<__nv_bfloat16> {
  using type = __nv_bfloat162;
};

// N values as they lie in memory, in pairs: two 16-bit values share a register until they are used.
template <typename T, int N>
struct alignas(kAccessBytes) Pack {
  typename PairOf<T>::type pairs[N / 2];
};
template <typename T>
struct Pack<T, 1> {
  T value;
};

// p is aligned to 16 bytes, or to T where N = 1.
template <int N, typename T>
__device__ __forceinline__ Pack<T, N> load(const T* p) {
  Pack<T, N> pack;
  if constexpr (N == 1) {
    pack.value = *p;
  } else {
#pragma unroll
    for (int j = 0; j < int{sizeof(pack)} / kAccessBytes; ++j) {
      reinterpret_cast<uint4*>(&pack)[j] = reinterpret_cast<const uint4*>(p)[j];
    }
  }
  return pack;
}

template <typename T, int N>
__device__ __forceinline__ void store(T* p, const Pack<T, N>& pack) {
  if constexpr (N == 1) {
    *p = pack.value;
  } else {
#pragma unroll
    for (int j = 0; j < int{sizeof(pack)} / kAccessBytes; ++j) {
      const uint4 bits = reinterpret_cast<const uint4*>(&pack)[j];
      uint4* const to = reinterpret_cast<uint4*>(p) + j;
#ifdef __CUDA_ARCH__  // nvcc splits this store into four when its loop is unrolled
      asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(bits.x),
                   "r"(bits.y), "r"(bits.z), "r"(bits.w)
                   : "memory");
#else
      *to = bits;
#endif
    }
  }
}

template <typename T, int N>
__device__ __forceinline__ void unpack(const Pack<T, N>& pack, float (&out)[N]) {
  if constexpr (N == 1) {
    out[0] = to_float(pack.value);
  } else {
#pragma unroll
    for (int k = 0; k < N / 2; ++k) {
      const float2 pair = to_float(pack.pairs[k]);
      out[2 * k] = pair.x;
      out[2 * k + 1] = pair.y;
    }
  }
}

template <typename T, int N>
__device__ __forceinline__ Pack<T, N> round_to(const float (&values)[N]) {
  Pack<T, N> pack;
  if constexpr (N == 1) {
    from_float(values[0], pack.value);
  } else {
#pragma unroll
    for (int k = 0; k < N / 2; ++k) from_float(make_float2(values[2 * k], values[2 * k + 1]), pack.pairs[k]);
  }
  return pack;
}

// The first `valid` values of a pack, zeros after them. Packed: all of them, from a p that is aligned to 16 bytes.
template <int N, bool kPacked, typename T>
__device__ __forceinline__ Pack<T, N> load_some(const T* p, [[maybe_unused]] int valid) {
  if constexpr (kPacked) {
    return load<N>(p);
  } else {
    float values[N];
#pragma unroll
    for (int k = 0; k < N; ++k) values[k] = k < valid ? to_float(p[k]) : 0.f;
    return round_to<T>(values);
  }
}

template <bool kPacked, typename T, int N>
__device__ __forceinline__ void store_some(T* p, const float (&values)[N], [[maybe_unused]] int valid) {
  if constexpr (kPacked) {
    store(p, round_to<T>(values));
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      if (k < valid) from_float(values[k], p[k]);
    }
  }
}

}  // namespace resnet_fused
