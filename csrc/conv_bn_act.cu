// conv_bn_act: checks, allocation and launch, on the LibTorch Stable ABI.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <optional>
#include <type_traits>
#include <vector>

#include "checks.h"
#include "conv_bn_act/launch.h"

namespace cutlass {
struct half_t;
struct bfloat16_t;
}  // namespace cutlass

namespace resnet_fused {
namespace {

using OptionalTensor = std::optional<Tensor>;

const void* data_or_null(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }

int attribute(cudaDeviceAttr which, int32_t device) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

void check_aligned(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0, name,
                  " must start at a multiple of 16 bytes; its shape is ", shape(t));
}

void check_vector(const OptionalTensor& t, const char* name, const Tensor& x, int64_t channels, ScalarType dtype) {
  if (!t) return;
  STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == channels, name, " must have shape [", channels, "], got ", shape(*t));
  STD_TORCH_CHECK(t->scalar_type() == dtype, name,
                  " must be float32 or have x's dtype, and all batch-norm vectors of a call must have the same dtype");
  STD_TORCH_CHECK(channels <= 1 || t->stride(0) == 1, name, " must be contiguous, got ", layout(*t));
  STD_TORCH_CHECK(same_device(*t, x), name, " must be on x's device; its shape is ", shape(*t));
}

ScalarType vector_dtype(const OptionalTensor& t, const Tensor& x) {
  return !t || t->scalar_type() == ScalarType::Float ? ScalarType::Float : x.scalar_type();
}

template <class Element>
Failure launch([[maybe_unused]] const ConvArguments& args, [[maybe_unused]] ConvFamily family,
               [[maybe_unused]] const Tensor& x, [[maybe_unused]] cudaStream_t stream) {
#ifdef RESNET_FUSED_SM90A
  if (family == ConvFamily::kSm90a) {
    if (args.plan.splits == 1) return sm90a::conv<Element>(args, stream);
    if constexpr (!std::is_same_v<Element, float>) {
      const auto bytes = static_cast<int64_t>(sm90a::split_workspace<Element>(args));
      const Tensor workspace = torch::stable::new_empty(x, {bytes}, ScalarType::Byte);
      return sm90a::split_gemm<Element>(args, workspace.mutable_data_ptr(), stream);
    }
  }
#endif
#ifdef RESNET_FUSED_SM80
  if (family == ConvFamily::kSm80) return sm80::conv<Element>(args, stream);
#endif
  return "this build has no such kernel";
}

Tensor conv_bn_act(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& bn_weight,
                   const OptionalTensor& bn_bias, const OptionalTensor& mean, const OptionalTensor& var, double eps,
                   const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                   const std::vector<int64_t>& dilation, const OptionalTensor& residual, bool relu, int64_t tile_m,
                   int64_t tile_n, int64_t splits) {
  check_activation(x, "x");
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type() && same_device(weight, x) && is_dense_channels_last(weight) &&
                      weight.size(1) == x.size(1),
                  "weight must be a dense channels_last tensor [K, C, R, S] of x's dtype, device and channels; x is ",
                  shape(x), ", weight ", layout(weight));
  STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
                  "stride, padding and dilation must have two values each; x is ", shape(x));
  STD_TORCH_CHECK(mean.has_value() == var.has_value() && (mean || !(bn_weight || bn_bias)),
                  "mean and var must be given together, and where bn_weight or bn_bias is; x is ", shape(x));
  const int64_t K = weight.size(0);
  const ScalarType bn_dtype = vector_dtype(mean, x);
  const ScalarType bias_dtype = vector_dtype(bias, x);
  check_vector(bias, "bias", x, K, bias_dtype);
  check_vector(bn_weight, "bn_weight", x, K, bn_dtype);
  check_vector(bn_bias, "bn_bias", x, K, bn_dtype);
  check_vector(mean, "mean", x, K, bn_dtype);
  check_vector(var, "var", x, K, bn_dtype);

  const int32_t device = x.get_device_index();
  const int major = attribute(cudaDevAttrComputeCapabilityMajor, device);
  const int minor = attribute(cudaDevAttrComputeCapabilityMinor, device);
  const ConvProblem problem{x.size(0),      x.size(2),      x.size(3),   x.size(1), K,
                            weight.size(2), weight.size(3), stride[0],   stride[1], padding[0],
                            padding[1],     dilation[0],    dilation[1], 1,         int64_t(x.element_size())};
  const std::optional<ConvFamily> family = conv_family(major, minor);
  const ConvPlan plan{int(tile_m), int(tile_n), int(splits)};
  const char* reason = family ? why_not_conv(problem, *family) : "this build has no convolutions for the device";
  if (reason == nullptr) reason = why_not_plan(problem, plan, *family);
  const auto check = [&](const char* wrong) {
    STD_TORCH_CHECK(wrong == nullptr, "conv_bn_act on x ", shape(x), " with weight ", shape(weight), ", tile ", tile_m,
                    "x", tile_n, ", splits ", splits, ": ", wrong);
  };
  check(reason);

  const torch::stable::accelerator::DeviceGuard guard(device);
  Tensor y = torch::stable::empty({problem.N, K, problem.P(), problem.Q()}, x.scalar_type(), std::nullopt, x.device(),
                                  std::nullopt, torch::headeronly::MemoryFormat::ChannelsLast);
  if (residual) check_like(*residual, "residual", y, "the output");
  if (y.numel() == 0) return y;
  check_aligned(x, "x");
  check_aligned(weight, "weight");
  if (residual) check_aligned(*residual, "residual");

  const ConvArguments args{
      problem,
      plan,
      x.const_data_ptr(),
      weight.const_data_ptr(),
      data_or_null(residual),
      y.mutable_data_ptr(),
      {data_or_null(bias), data_or_null(bn_weight), data_or_null(bn_bias), data_or_null(mean), data_or_null(var),
       static_cast<float>(eps), bias_dtype == ScalarType::Float, bn_dtype == ScalarType::Float},
      relu,
      device,
      attribute(cudaDevAttrMultiProcessorCount, device)};
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const auto run = x.scalar_type() == ScalarType::Half       ? launch<cutlass::half_t>
                   : x.scalar_type() == ScalarType::BFloat16 ? launch<cutlass::bfloat16_t>
                                                             : launch<float>;
  check(run(args, *family, x, static_cast<cudaStream_t>(stream)));
  return y;
}

}  // namespace
}  // namespace resnet_fused

STABLE_TORCH_LIBRARY_FRAGMENT(resnet_fused_cuda, m) {
  m.def(
      "conv_bn_act(Tensor x, Tensor weight, Tensor? bias, Tensor? bn_weight, Tensor? bn_bias, Tensor? mean, "
      "Tensor? var, float eps, int[] stride, int[] padding, int[] dilation, Tensor? residual, bool relu, int tile_m, "
      "int tile_n, int splits) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused_cuda, CUDA, m) { m.impl("conv_bn_act", TORCH_BOX(&resnet_fused::conv_bn_act)); }
