#include "sm90a_split.cuh"

template size_t resnet_fused::sm90a::split_workspace<cutlass::half_t>(const ConvArguments&);
template resnet_fused::Failure resnet_fused::sm90a::split_gemm<cutlass::half_t>(const ConvArguments&, void*,
                                                                                cudaStream_t);
