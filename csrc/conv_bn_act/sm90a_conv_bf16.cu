#include "sm90a_conv.cuh"

template resnet_fused::Failure resnet_fused::sm90a::conv<cutlass::bfloat16_t>(const ConvArguments&, cudaStream_t);
