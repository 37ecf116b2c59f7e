// The epilogue of sm_90a's kernels: a visitor tree that reads the live BN vectors; and how the kernels are launched.
#pragma once

#include <limits>

// clang-format off: these two before CuTe
#include "cutlass/cutlass.h"
#include "cutlass/kernel_hardware_info.h"
// clang-format on

#include "cute/tensor.hpp"
#include "cutlass/device_kernel.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/epilogue/fusion/operations.hpp"
#include "cutlass/epilogue/fusion/sm90_visitor_tma_warpspecialized.hpp"
#include "launch.h"
#include "vectors.cuh"

namespace resnet_fused::sm90a {

inline constexpr ConvFamily kFamily = ConvFamily::kSm90a;

namespace fusion = cutlass::epilogue::fusion;
using cute::_1;
using cute::Int;
using cute::Shape;

// A row broadcast whose values, one a channel, are computed once a block into shared memory.
template <class TileShape, class Value>
struct ChannelRow : fusion::Sm90RowBroadcast<0, TileShape, float> {
  using Base = fusion::Sm90RowBroadcast<0, TileShape, float>;
  using SharedStorage = typename Base::SharedStorage;
  using Arguments = ConvVectors;
  using Params = Arguments;

  template <class ProblemShape>
  static constexpr Params to_underlying_arguments(ProblemShape const&, Arguments const& args, void*) {
    return args;
  }

  template <class ProblemShape>
  static bool can_implement(ProblemShape const&, Arguments const&) {
    return true;
  }

  template <class ProblemShape>
  static size_t get_workspace_size(ProblemShape const&, Arguments const&) {
    return 0;
  }

  template <class ProblemShape>
  static cutlass::Status initialize_workspace(ProblemShape const&, Arguments const&, void*, cudaStream_t,
                                              cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }

  CUTLASS_HOST_DEVICE ChannelRow() {}
  CUTLASS_HOST_DEVICE ChannelRow(Params const& params, SharedStorage const& shared_storage)
      : Base(typename Base::Params{}, shared_storage), vectors(&params) {}

  const ConvVectors* vectors = nullptr;

  template <class Callbacks>
  struct ConsumerStoreCallbacks : Callbacks {
    CUTLASS_DEVICE ConsumerStoreCallbacks(Callbacks const& callbacks, const ConvVectors* vectors, int first_channel)
        : Callbacks(callbacks), vectors(vectors), first_channel(first_channel) {}

    const ConvVectors* vectors;
    int first_channel;

    CUTLASS_DEVICE void begin() {
      auto values = cute::filter_zeros(this->tGS_sRow);
      auto coords = cute::filter_zeros(this->tGS_cRow, this->tGS_gRow.stride());
      for (int i = 0; i < cute::size(values); ++i) {
        const int n = cute::get<1>(coords(i));
        if (n >= cute::size<1>(TileShape{})) continue;
        values(i) = cute::elem_less(coords(i), this->residue_cRow) ? Value::at(*vectors, first_channel + n) : 0.f;
      }
    }
  };

  template <bool ReferenceSrc, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(fusion::ConsumerStoreArgs<Args...> const& args) {
    auto callbacks = Base::template get_consumer_store_callbacks<ReferenceSrc>(args);
    const int first_channel = cute::get<1>(args.tile_coord_mnkl) * cute::size<1>(TileShape{});
    return ConsumerStoreCallbacks<decltype(callbacks)>(callbacks, vectors, first_channel);
  }
};

// max(beta * residual + ((acc - center) * scale + shift), floor); NaN passes. beta = 0 leaves the residual unread.
template <class TileShape, class Element>
struct Epilogue {
  static constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;
  template <template <class> class Op, class Out = float>
  using Compute = fusion::Sm90Compute<Op, Out, float, kRound>;
  using Scalar = fusion::Sm90ScalarBroadcast<float>;
  using Centered =
      fusion::Sm90EVT<Compute<cutlass::minus>, fusion::Sm90AccFetch, ChannelRow<TileShape, Center<Element>>>;
  using Normalized = fusion::Sm90EVT<Compute<cutlass::homogeneous_multiply_add>, Centered,
                                     ChannelRow<TileShape, Scale<Element>>, ChannelRow<TileShape, Shift<Element>>>;
  using Joined =
      fusion::Sm90EVT<Compute<cutlass::homogeneous_multiply_add>, Scalar, fusion::Sm90SrcFetch<Element>, Normalized>;
  using Tree = fusion::Sm90EVT<Compute<cutlass::maximum_with_nan_propagation, Element>, Joined, Scalar>;

  static typename Tree::Arguments arguments(const ConvArguments& args) {
    typename Scalar::Arguments beta{};
    typename Scalar::Arguments floor{};
    beta.scalars[0] = args.residual == nullptr ? 0.f : 1.f;
    floor.scalars[0] = args.relu ? 0.f : -std::numeric_limits<float>::infinity();
    const ConvVectors& v = args.vectors;
    return {{beta, {}, {{{}, v, {}}, v, v, {}}, {}}, floor, {}};
  }
};

template <class Kernel>
Failure launch(typename Kernel::Arguments const& arguments, void* workspace, cudaStream_t stream) {
  if (!Kernel::can_implement(arguments)) return "CUTLASS can't implement this problem";
  if (Kernel::initialize_workspace(arguments, workspace, stream) != cutlass::Status::kSuccess) {
    return "CUTLASS can't prepare the workspace";
  }
  typename Kernel::Params params = Kernel::to_underlying_arguments(arguments, workspace);
  return launch_kernel(reinterpret_cast<const void*>(&cutlass::device_kernel<Kernel>), Kernel::get_grid_shape(params),
                       Kernel::get_block_shape(), Kernel::SharedStorageSize, &params, stream);
}

}  // namespace resnet_fused::sm90a
