// 1x1 convolutions of stride 1 as a GEMM of sm_90a whose reduction is split; apart from the implicit GEMM, whose
// kernels CUTLASS's GEMM headers make ambiguous.
#pragma once

#include "sm90a_epilogue.cuh"
// The epilogue's headers have to stand first.
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/kernel/gemm_universal.hpp"

namespace resnet_fused::sm90a {

// Split by the stream-K scheduler; partial sums meet in float32, in a fixed order.
template <class Element>
struct SplitGemm {
  static constexpr int kAlignment = 16 / sizeof(Element);
  using TileShape = Shape<Int<kSplitTile.m>, Int<kSplitTile.n>, Int<kConvStepBytes / sizeof(Element)>>;
  using Cluster = Shape<_1, _1, _1>;
  using Row = cutlass::layout::RowMajor;
  using Fusion = Epilogue<TileShape, Element>;
  using CollectiveEpilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, TileShape, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, Element, Row, kAlignment, Element, Row, kAlignment,
      cutlass::epilogue::TmaWarpSpecializedCooperative, typename Fusion::Tree>::CollectiveOp;
  using CollectiveMainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, Row, kAlignment, Element,
      cutlass::layout::ColumnMajor, kAlignment, float, TileShape, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<int(sizeof(typename CollectiveEpilogue::SharedStorage))>,
      cutlass::gemm::KernelTmaWarpSpecializedCooperative>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, CollectiveMainloop, CollectiveEpilogue,
                                                      cutlass::gemm::StreamKScheduler>;

  static typename Kernel::Arguments arguments(const ConvArguments& args) {
    const ConvProblem& p = args.problem;
    const int m = static_cast<int>(p.M());
    const int n = static_cast<int>(p.K);
    const int k = static_cast<int>(p.C);
    const typename Kernel::StrideC stride{p.K, {}, {}};
    auto* y = static_cast<Element*>(args.y);
    const auto* residual = args.residual == nullptr ? y : static_cast<const Element*>(args.residual);
    typename Kernel::TileScheduler::Arguments scheduler{};
    scheduler.splits = args.plan.splits;
    return {
        cutlass::gemm::GemmUniversalMode::kGemm,
        {m, n, k, 1},
        {static_cast<const Element*>(args.x), {p.C, {}, {}}, static_cast<const Element*>(args.weight), {p.C, {}, {}}},
        {Fusion::arguments(args), residual, stride, y, stride},
        {args.device, args.multiprocessors},
        scheduler};
  }
};

template <class Element>
size_t split_workspace(const ConvArguments& args) {
  return SplitGemm<Element>::Kernel::get_workspace_size(SplitGemm<Element>::arguments(args));
}

template <class Element>
Failure split_gemm(const ConvArguments& args, void* workspace, cudaStream_t stream) {
  return launch<typename SplitGemm<Element>::Kernel>(SplitGemm<Element>::arguments(args), workspace, stream);
}

}  // namespace resnet_fused::sm90a
