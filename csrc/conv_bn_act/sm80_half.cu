#include "sm80.cuh"

template resnet_fused::Failure resnet_fused::sm80::conv<cutlass::half_t>(const ConvArguments&, cudaStream_t);
