// The epilogue's per-channel values: y = act((acc - center) * scale + shift + residual).
#pragma once

#include "launch.h"

namespace resnet_fused {

template <typename T>
__device__ __forceinline__ float channel_value(const void* vector, bool is_float, int k) {
  return is_float ? static_cast<const float*>(vector)[k] : static_cast<float>(static_cast<const T*>(vector)[k]);
}

template <typename T>
__device__ __forceinline__ float channel_or(const void* vector, bool is_float, int k, float otherwise) {
  return vector == nullptr ? otherwise : channel_value<T>(vector, is_float, k);
}

template <typename T>
struct Center {
  __device__ static float at(const ConvVectors& v, int k) {
    return channel_or<T>(v.mean, v.float_bn, k, 0.f) - channel_or<T>(v.bias, v.float_bias, k, 0.f);
  }
};

template <typename T>
struct Scale {
  __device__ static float at(const ConvVectors& v, int k) {
    const float weight = channel_or<T>(v.weight, v.float_bn, k, 1.f);
    return v.var == nullptr ? weight : weight / sqrtf(channel_value<T>(v.var, v.float_bn, k) + v.eps);
  }
};

template <typename T>
struct Shift {
  __device__ static float at(const ConvVectors& v, int k) { return channel_or<T>(v.bn_bias, v.float_bn, k, 0.f); }
};

}  // namespace resnet_fused
