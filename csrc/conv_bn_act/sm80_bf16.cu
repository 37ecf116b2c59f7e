#include "sm80.cuh"

template resnet_fused::Failure resnet_fused::sm80::conv<cutlass::bfloat16_t>(const ConvArguments&, cudaStream_t);
