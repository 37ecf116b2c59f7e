// Implicit GEMM of sm_90a: TMA brings im2col tiles, one warp group loads and one multiplies with wgmma.
// Compiled with NDEBUG: without it ptxas serialises wgmma.
#pragma once

#include "sm90a_epilogue.cuh"
// The epilogue's headers have to stand first.
#include "cutlass/conv/collective/collective_builder.hpp"
#include "cutlass/conv/convnd_problem_shape.hpp"
#include "cutlass/conv/convolution.h"
#include "cutlass/conv/dispatch_policy.hpp"
#include "cutlass/conv/kernel/conv_universal.hpp"

namespace resnet_fused::sm90a {

template <class Element, int kTileM, int kTileN, int kStages>
struct Conv {
  static constexpr int kAlignment = 16 / sizeof(Element);
  static constexpr int kTileK = kConvStepBytes / sizeof(Element);
  using TileShape = Shape<Int<kTileM>, Int<kTileN>, Shape<Int<kTileK>>>;
  using EpilogueTileShape = Shape<Int<kTileM>, Int<kTileN>, Int<kTileK>>;
  using Cluster = Shape<_1, _1, _1>;
  using Layout = cutlass::layout::TensorNHWC;
  using Fusion = Epilogue<EpilogueTileShape, Element>;
  using CollectiveEpilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, EpilogueTileShape, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, Element, Layout, kAlignment, Element, Layout,
      kAlignment, cutlass::epilogue::TmaWarpSpecialized, typename Fusion::Tree>::CollectiveOp;
  using CollectiveMainloop = typename cutlass::conv::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, cutlass::conv::Operator::kFprop, Element, Layout, kAlignment,
      Element, Layout, kAlignment, float, TileShape, Cluster, cutlass::conv::collective::StageCount<kStages>,
      cutlass::conv::KernelImplicitTmaWarpSpecializedSm90>::CollectiveOp;
  using Problem = cutlass::conv::ConvProblemShape<cutlass::conv::Operator::kFprop, 2>;
  using Kernel = cutlass::conv::kernel::ConvUniversal<Problem, CollectiveMainloop, CollectiveEpilogue>;
  using StrideC = typename Kernel::StrideC;
  static_assert(Kernel::SharedStorageSize <= cutlass::gemm::collective::detail::sm90_smem_capacity_bytes);
  static_assert(Kernel::SharedStorageSize <= conv_usage(kFamily, sizeof(Element), kTileM, kTileN)->shared);
  static_assert(Kernel::MaxThreadsPerBlock == conv_threads(kFamily));

  static typename Kernel::Arguments arguments(const ConvArguments& args) {
    const ConvProblem& p = args.problem;
    const auto i = [](int64_t size) { return static_cast<int>(size); };
    const Problem problem(cutlass::conv::Mode::kCrossCorrelation, {i(p.N), i(p.H), i(p.W), i(p.C)},
                          {i(p.K), i(p.R), i(p.S), i(p.C)}, {i(p.pad_h), i(p.pad_w)}, {i(p.pad_h), i(p.pad_w)},
                          {i(p.stride_h), i(p.stride_w)}, {i(p.dilation_h), i(p.dilation_w)}, 1);
    const StrideC stride{{p.K, p.K * p.Q(), p.K * p.Q() * p.P()}, {}, {}};
    auto* y = static_cast<Element*>(args.y);
    const auto* residual = args.residual == nullptr ? y : static_cast<const Element*>(args.residual);
    return {problem,
            {static_cast<const Element*>(args.x), static_cast<const Element*>(args.weight)},
            {Fusion::arguments(args), residual, stride, y, stride}};
  }
};

template <class Element, int kTileM, int kTileN, int kStages>
Failure run(const ConvArguments& args, cudaStream_t stream) {
  using Tile = Conv<Element, kTileM, kTileN, kStages>;
  return launch<typename Tile::Kernel>(Tile::arguments(args), nullptr, stream);
}

template <class Element>
Failure conv(const ConvArguments& args, cudaStream_t stream) {
  const ConvPlan& plan = args.plan;
  if (plan.tile_m == 128 && plan.tile_n == 128) return run<Element, 128, 128, 6>(args, stream);
  if (plan.tile_m == 128 && plan.tile_n == 64) return run<Element, 128, 64, 3>(args, stream);
  if (plan.tile_m == 64 && plan.tile_n == 64) return run<Element, 64, 64, 3>(args, stream);
  return "there is no such tile";
}

}  // namespace resnet_fused::sm90a
