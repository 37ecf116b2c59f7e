#include "sm90_conv.cuh"

template resnet_fused::Failure resnet_fused::sm90::conv<float>(const ConvArguments&, cudaStream_t);
