// Named predicates on tensors, and the checks built on them: messages name the argument and carry the shapes.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <string>

namespace resnet_fused {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i > 0 ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

inline std::string layout(const Tensor& t) {
  std::string text = shape(t) + " with strides [";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i > 0 ? ", " : "") + std::to_string(t.stride(i));
  return text + "]";
}

inline bool is_supported_float(const Tensor& t) {
  const ScalarType dtype = t.scalar_type();
  return dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16;
}

// The strides of an empty tensor and of a dimension of size 1 say nothing.
inline bool is_dense_channels_last(const Tensor& t) {
  if (t.dim() != 4) return false;
  if (t.numel() == 0) return true;
  const int64_t c = t.size(1), h = t.size(2), w = t.size(3);
  const int64_t strides[] = {h * w * c, 1, w * c, c};
  for (int64_t i = 0; i < 4; ++i) {
    if (t.size(i) > 1 && t.stride(i) != strides[i]) return false;
  }
  return true;
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index();
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t i = 0; i < a.dim(); ++i) {
    if (a.size(i) != b.size(i)) return false;
  }
  return true;
}

inline void check_activation(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(is_supported_float(x), name, " must be float32, float16 or bfloat16; its shape is ", shape(x));
  STD_TORCH_CHECK(is_dense_channels_last(x), name, " must be a dense channels_last tensor [N, C, H, W], got ",
                  layout(x));
}

// t goes elementwise with the activation x, which the message calls `like`.
inline void check_like(const Tensor& t, const char* name, const Tensor& x, const char* like = "x") {
  STD_TORCH_CHECK(same_shape(t, x), name, " must have the shape of ", like, ", ", shape(x), ", got ", shape(t));
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), name, " must have the dtype of ", like, "; its shape is ",
                  shape(t));
  STD_TORCH_CHECK(same_device(t, x), name, " must be on the device of ", like, "; its shape is ", shape(t));
  check_activation(t, name);
}

inline void check_channel_vector(const Tensor& t, const char* name, const Tensor& x, const char* like = "x") {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == x.size(1), name, " must have shape [", x.size(1),
                  "], one value per channel of ", like, " ", shape(x), ", got ", shape(t));
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float || t.scalar_type() == x.scalar_type(), name,
                  " must be float32 or have the dtype of ", like, "; its shape is ", shape(t));
  STD_TORCH_CHECK(t.size(0) <= 1 || t.stride(0) == 1, name, " must be contiguous, got ", layout(t));
  STD_TORCH_CHECK(same_device(t, x), name, " must be on the device of ", like, "; its shape is ", shape(t));
}

}  // namespace resnet_fused
