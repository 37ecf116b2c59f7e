// stem: checks, allocation and launch, on the LibTorch Stable ABI.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "batch_norm.h"
#include "stem.cuh"

namespace resnet_fused {
namespace {

template <typename T>
void launch_stem(const StemParams& p, bool of_bytes, dim3 grid, cudaStream_t stream) {
  const auto kernel = of_bytes ? stem_kernel<T, uint8_t> : stem_kernel<T, T>;
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kStemShared));
  kernel<<<grid, kStemThreads, kStemShared, stream>>>(p);
}

const float* pixel_values(const OptionalTensor& t, const char* name, const Tensor& x, bool of_bytes) {
  STD_TORCH_CHECK(t.has_value() == of_bytes, name, " must be given where x is of bytes, and only there; x is ",
                  shape(x));
  if (!t) return nullptr;
  STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == x.size(1) && t->scalar_type() == ScalarType::Float &&
                      (t->size(0) <= 1 || t->stride(0) == 1) && same_device(*t, x),
                  name, " must be a contiguous float32 vector, one value per channel of x ", shape(x), ", got ",
                  layout(*t));
  return t->const_data_ptr<float>();
}

Tensor stem(const Tensor& x, const Tensor& weight, const OptionalTensor& bn_weight, const OptionalTensor& bn_bias,
            const Tensor& running_mean, const Tensor& running_var, double eps, const OptionalTensor& mean,
            const OptionalTensor& std) {
  const ScalarType dtype = weight.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
                  "weight must be float16 or bfloat16; its shape is ", shape(weight));
  const bool of_bytes = x.scalar_type() == ScalarType::Byte;
  STD_TORCH_CHECK(x.dim() == 4 && (of_bytes || x.scalar_type() == dtype) && x.size(1) >= 1 && x.size(1) <= kStemDepth,
                  "x must be [N, C, H, W] of weight's dtype or of bytes, with 1 to ", kStemDepth, " channels; got ",
                  shape(x));
  STD_TORCH_CHECK(x.size(2) > 0 && x.size(3) > 0, "x must have images of 1 pixel or more, got ", shape(x));
  STD_TORCH_CHECK(std::max(x.size(2), x.size(3)) < int64_t{1} << 30, "x must have sides below 2^30, got ", shape(x));
  STD_TORCH_CHECK(is_dense_channels_last(weight) && weight.size(1) == x.size(1) && weight.size(2) == 7 &&
                      weight.size(3) == 7 && weight.size(0) % kGroup == 0 && same_device(weight, x),
                  "weight must be a dense channels_last tensor [K, C, 7, 7] on x's device, K a multiple of ", kGroup,
                  "; x is ", shape(x), ", weight ", layout(weight));
  const DeviceGuard guard(x.get_device_index());
  const int64_t N = x.size(0), H = x.size(2), W = x.size(3), K = weight.size(0);
  const int64_t P = ceil_div(H, 4), Q = ceil_div(W, 4);
  const int64_t result[] = {N, K, P, Q};
  Tensor y = torch::stable::empty(result, dtype, std::nullopt, x.device(), std::nullopt,
                                  torch::headeronly::MemoryFormat::ChannelsLast);
  StemParams p{};
  const auto vector = [&](const OptionalTensor& t, const char* name) -> Vector {
    if (t) check_channel_vector(*t, name, y, "the result");
    return {data_or_null(t), t && t->scalar_type() == ScalarType::Float};
  };
  p.bn = {vector(bn_weight, "bn_weight"), vector(bn_bias, "bn_bias"), vector(running_mean, "running_mean"),
          vector(running_var, "running_var")};
  p.mean = pixel_values(mean, "mean", x, of_bytes);
  p.std = pixel_values(std, "std", x, of_bytes);
  if (y.numel() == 0) return y;

  p.x = x.const_data_ptr();
  p.weight = weight.const_data_ptr();
  p.y = y.mutable_data_ptr();
  p.eps = static_cast<float>(eps);
  p.stride_n = x.stride(0);
  p.stride_c = x.stride(1);
  p.stride_h = x.stride(2);
  p.stride_w = x.stride(3);
  p.channels = static_cast<int>(x.size(1));
  p.height = static_cast<int>(H);
  p.width = static_cast<int>(W);
  p.filters = static_cast<int>(K);
  p.bands = static_cast<unsigned>(ceil_div(P, kStemPooledRows));
  p.strips = static_cast<unsigned>(ceil_div(Q, kStemPooledColumns));
  const int64_t tiles = N * p.bands * p.strips;
  STD_TORCH_CHECK(tiles < int64_t{1} << 31, "x must be of fewer than 2^31 tiles of 12 x 60 pixels, got ", shape(x));
  p.tiles = static_cast<unsigned>(tiles);
  int processors = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, x.get_device_index()));
  const dim3 grid(static_cast<unsigned>(std::min(tiles, int64_t{kStemBlocks} * processors)),
                  static_cast<unsigned>(ceil_div(K, kStemFilters)));
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  (dtype == ScalarType::Half ? launch_stem<__half> : launch_stem<__nv_bfloat16>)(p, of_bytes, grid,
                                                                                 static_cast<cudaStream_t>(stream));
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "stem on x ", shape(x), ": ", cudaGetErrorString(error));
  return y;
}

}  // namespace
}  // namespace resnet_fused

STABLE_TORCH_LIBRARY_FRAGMENT(resnet_fused_cuda, m) {
  m.def(
      "stem(Tensor x, Tensor weight, Tensor? bn_weight, Tensor? bn_bias, Tensor running_mean, Tensor running_var, "
      "float eps, Tensor? mean, Tensor? std) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused_cuda, CUDA, m) { m.impl("stem", TORCH_BOX(&resnet_fused::stem)); }
