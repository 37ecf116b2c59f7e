#include "sm80.cuh"

template resnet_fused::Failure resnet_fused::sm80::conv<float>(const ConvArguments&, cudaStream_t);
