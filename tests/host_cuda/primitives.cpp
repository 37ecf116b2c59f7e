// Small kernels that show what cuda_on_host.h does, right and wrong.
#include "cuda_on_host.h"

namespace {

constexpr int kThreads = 64;

struct Params {
  int what;
  float* out;  // [2 * kThreads]
};

enum What { kReverse, kExchange, kUninitialised, kDivergentBarrier, kTwoBarriers, kPartialWarp, kBeyondShared, kWild };

__global__ void kernel(const Params p) {
  __shared__ float shared[kThreads];
  const int i = threadIdx.x;
  float* const out = p.out + blockIdx.x * kThreads;
  if (p.what == kReverse) {
    shared[i] = i;
    __syncthreads();
    out[i] = shared[kThreads - 1 - i] + kThreads * blockIdx.x;
  } else if (p.what == kExchange) {
    const unsigned all = 0xffffffffu;
    float v = __shfl_xor_sync(all, float(i), 1) + __shfl_sync(all, 100.f * i, 5) + __shfl_down_sync(all, 10000 * i, 16);
    __syncwarp();
    out[i] = v + (__ballot_sync(all, i % 3 == 0) >> (i % 32) & 1) * 0.5f;
  } else if (p.what == kUninitialised) {
    out[i] = shared[i];
    shared[i] = 1;
  } else if (p.what == kDivergentBarrier) {
    if (i < 40) __syncthreads();
    out[i] = __shfl_sync(0xffffffffu, 1.f, 0);
  } else if (p.what == kTwoBarriers) {
    if (i < 32) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  } else if (p.what == kPartialWarp) {
    if (i % 32 < 8) out[i] = __shfl_sync(0xffu, 1.f, 0);
  } else if (p.what == kBeyondShared) {
    shared[i + p.what - kBeyondShared + 1] = 0;
  } else {
    out[i + kThreads] = 0;
  }
}

}  // namespace

extern "C" __attribute__((visibility("default"))) const char* run(int what, unsigned seed, float* out) {
  return host_cuda::run_on_host(kernel, 2, kThreads, Params{what, out}, seed);
}
