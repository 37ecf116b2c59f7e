// Implicit GEMM of sm_80: multistage cp.async and mma.sync, for every GPU that the kernels of sm_90a do not serve.
#pragma once

#include <limits>

#include "cutlass/conv/conv2d_problem_size.h"
#include "cutlass/conv/device/implicit_gemm_convolution.h"
#include "cutlass/conv/kernel/default_conv2d_fprop.h"
#include "cutlass/cutlass.h"
#include "launch.h"
#include "vectors.cuh"

namespace resnet_fused::sm80 {

inline constexpr ConvFamily kFamily = ConvFamily::kSm80;

// max((acc - center) * scale + shift + residual, floor) on kCount channels of one pixel; NaN passes.
template <typename Element, int kElements>
class ChannelOutputOp {
 public:
  using ElementOutput = Element;
  using ElementAccumulator = float;
  using ElementCompute = float;
  static constexpr int kCount = kElements;
  using FragmentOutput = cutlass::Array<Element, kCount>;
  using FragmentAccumulator = cutlass::Array<float, kCount>;

  struct Params {
    ConvVectors vectors;
    int channels;
    bool has_residual;
    float floor;
  };

  CUTLASS_HOST_DEVICE ChannelOutputOp(Params const& params) : params_(params) {}

  CUTLASS_HOST_DEVICE bool is_source_needed() const { return params_.has_residual; }

  CUTLASS_HOST_DEVICE void set_k_partition(int, int) {}

  CUTLASS_DEVICE void load(int first_channel) {
    CUTLASS_PRAGMA_UNROLL
    for (int j = 0; j < kCount; ++j) {
      const int k = first_channel + j;
      const bool in_range = k < params_.channels;
      center_[j] = in_range ? Center<Element>::at(params_.vectors, k) : 0.f;
      scale_[j] = in_range ? Scale<Element>::at(params_.vectors, k) : 0.f;
      shift_[j] = in_range ? Shift<Element>::at(params_.vectors, k) : 0.f;
    }
  }

  CUTLASS_DEVICE FragmentOutput operator()(FragmentAccumulator const& acc) const {
    return finish(acc, [](int) { return 0.f; });
  }

  CUTLASS_DEVICE FragmentOutput operator()(FragmentAccumulator const& acc, FragmentOutput const& residual) const {
    return finish(acc, [&](int j) { return static_cast<float>(residual[j]); });
  }

 private:
  template <class Residual>
  CUTLASS_DEVICE FragmentOutput finish(FragmentAccumulator const& acc, Residual residual) const {
    FragmentAccumulator y;
    CUTLASS_PRAGMA_UNROLL
    for (int j = 0; j < kCount; ++j) {
      const float z = (acc[j] - center_[j]) * scale_[j] + shift_[j] + residual(j);
      y[j] = z <= params_.floor ? params_.floor : z;
    }
    return cutlass::NumericArrayConverter<Element, float, kCount>{}(y);
  }

  Params params_;
  float center_[kCount];
  float scale_[kCount];
  float shift_[kCount];
};

// A thread keeps its channels through all its rows: their values are loaded once.
template <class Base>
struct ChannelEpilogue : Base {
  using Base::Base;
  using OutputOp = typename Base::OutputOp;
  using OutputTileIterator = typename Base::OutputTileIterator;
  static_assert(OutputTileIterator::ThreadMap::Iterations::kColumn == 1);

  CUTLASS_DEVICE void operator()(OutputOp const& output_op, OutputTileIterator destination,
                                 typename Base::AccumulatorTile const& accumulators, OutputTileIterator source) {
    OutputOp loaded(output_op);
    loaded.load(destination.thread_start_column());
    Base::operator()(loaded, destination, accumulators, source);
  }
};

template <class Element, int kTileM, int kTileN, int kWarpM, int kWarpN>
struct Conv {
  static constexpr int kAlignment = 16 / sizeof(Element);
  static constexpr int kTileK = 64 / sizeof(Element);
  static constexpr int kStages = 4;
  using Layout = cutlass::layout::TensorNHWC;
  using OutputOp = ChannelOutputOp<Element, kAlignment>;
  using Swizzle = cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<4>;
  using Default = typename cutlass::conv::kernel::DefaultConv2dFprop<
      Element, Layout, Element, Layout, Element, Layout, float, cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80,
      cutlass::gemm::GemmShape<kTileM, kTileN, kTileK>, cutlass::gemm::GemmShape<kWarpM, kWarpN, kTileK>,
      cutlass::gemm::GemmShape<16, 8, 32 / sizeof(Element)>, OutputOp, Swizzle, kStages, cutlass::arch::OpMultiplyAdd,
      cutlass::conv::IteratorAlgorithm::kOptimized, cutlass::conv::StrideSupport::kStrided, kAlignment,
      kAlignment>::Kernel;
  using Kernel =
      cutlass::conv::kernel::ImplicitGemmConvolution<typename Default::Mma, ChannelEpilogue<typename Default::Epilogue>,
                                                     Swizzle, cutlass::conv::Operator::kFprop>;
  using Device = cutlass::conv::device::ImplicitGemmConvolution<Kernel>;
  static constexpr int kThreads = 32 * Kernel::WarpCount::kCount;
  static_assert(sizeof(typename Kernel::SharedStorage) <= 99 * 1024);  // of sm_86 and sm_89, which have the least
  static_assert(sizeof(typename Kernel::SharedStorage) <= conv_usage(kFamily, sizeof(Element), kTileM, kTileN)->shared);
  static_assert(kThreads == conv_threads(kFamily));

  static Failure run(const ConvArguments& args, cudaStream_t stream) {
    const ConvProblem& p = args.problem;
    const auto i = [](int64_t size) { return static_cast<int>(size); };
    const cutlass::conv::Conv2dProblemSize problem(
        i(p.N), i(p.H), i(p.W), i(p.C), i(p.K), i(p.R), i(p.S), i(p.P()), i(p.Q()), i(p.pad_h), i(p.pad_w),
        i(p.stride_h), i(p.stride_w), i(p.dilation_h), i(p.dilation_w), cutlass::conv::Mode::kCrossCorrelation);
    const auto ref = [](const void* data, int64_t h, int64_t w, int64_t c) {
      return cutlass::TensorRef<Element, Layout>(static_cast<Element*>(const_cast<void*>(data)),
                                                 Layout(int(c), int(c * w), int(c * w * h)));
    };
    const float floor = args.relu ? 0.f : -std::numeric_limits<float>::infinity();
    const typename Kernel::Arguments arguments(
        problem, ref(args.x, p.H, p.W, p.C), ref(args.weight, p.R, p.S, p.C),
        ref(args.residual == nullptr ? args.y : args.residual, p.P(), p.Q(), p.K), ref(args.y, p.P(), p.Q(), p.K),
        {args.vectors, i(p.K), args.residual != nullptr, floor});
    if (Device::can_implement(arguments) != cutlass::Status::kSuccess) return "CUTLASS can't implement this problem";
    typename Kernel::Params params(arguments);
    return launch_kernel(reinterpret_cast<const void*>(&cutlass::Kernel<Kernel>),
                         Swizzle().get_grid_shape(params.grid_tiled_shape), kThreads,
                         sizeof(typename Kernel::SharedStorage), &params, stream);
  }
};

template <class Element>
Failure conv(const ConvArguments& args, cudaStream_t stream) {
  const ConvPlan& plan = args.plan;
  if constexpr (conv_usage(kFamily, sizeof(Element), 128, 128) != nullptr) {
    if (plan.tile_m == 128 && plan.tile_n == 128) return Conv<Element, 128, 128, 64, 64>::run(args, stream);
  }
  if (plan.tile_m == 128 && plan.tile_n == 64) return Conv<Element, 128, 64, 64, 32>::run(args, stream);
  if (plan.tile_m == 64 && plan.tile_n == 64) return Conv<Element, 64, 64, 32, 32>::run(args, stream);
  return "there is no such tile";
}

}  // namespace resnet_fused::sm80
