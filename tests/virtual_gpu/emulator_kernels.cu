// Kernels of known result, and the same with a planted bug each: test_emulator.py.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#define KERNEL extern "C" __global__ void

__device__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

KERNEL reduce(const float* x, float* y, int n) {  // one block of 256
  __shared__ float part[8];
  float sum = 0;
  for (int i = threadIdx.x; i < n; i += blockDim.x) sum += x[i];
  for (int offset = 16; offset; offset /= 2) sum += __shfl_down_sync(~0u, sum, offset);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  sum = threadIdx.x < 8 ? part[threadIdx.x] : 0;
  for (int offset = 4; offset; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  if (threadIdx.x == 0) *y = sum;
}

template <bool SYNC>
__device__ void transpose_body(const int* x, int* y, int n) {  // blocks of (32, 8)
  __shared__ int tile[32][33];
  const int column = blockIdx.x * 32, row = blockIdx.y * 32, lane = threadIdx.x;
  for (int r = threadIdx.y; r < 32; r += 8)
    if (row + r < n && column + lane < n) tile[r][lane] = x[(row + r) * n + column + lane];
  if (SYNC) __syncthreads();
  for (int r = threadIdx.y; r < 32; r += 8)
    if (column + r < n && row + lane < n) y[(column + r) * n + row + lane] = tile[lane][r];
}
KERNEL transpose(const int* x, int* y, int n) { transpose_body<true>(x, y, n); }
KERNEL transpose_unsynchronised(const int* x, int* y, int n) { transpose_body<false>(x, y, n); }

// y = the sum over tiles of x, through three stages of cp.async. PENDING: 1 is right for two stages ahead.
template <int PENDING, bool SYNC>
__device__ void pipeline_body(const float* x, float* y, int tiles) {
  __shared__ __align__(16) float stages[3][512];
  auto load = [&](int k) {
    if (k < tiles)
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(&stages[k % 3][threadIdx.x * 4])),
                   "l"(x + k * 512 + threadIdx.x * 4));
    asm volatile("cp.async.commit_group;");
  };
  load(0);
  load(1);
  float sum = 0;
  for (int k = 0; k < tiles; ++k) {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING));
    __syncthreads();
    for (int j = 0; j < 4; ++j) sum += stages[k % 3][(threadIdx.x + j * 128 + 37) % 512];
    if (SYNC) __syncthreads();
    load(k + 2);
  }
  asm volatile("cp.async.wait_all;");
  y[threadIdx.x] = sum;
}
KERNEL pipeline(const float* x, float* y, int tiles) { pipeline_body<1, true>(x, y, tiles); }
KERNEL pipeline_late_wait(const float* x, float* y, int tiles) { pipeline_body<2, true>(x, y, tiles); }

// A warp reads what another overwrites: all has been written before, and nothing but the order is wrong.
KERNEL reads_while_overwritten(float* y) {
  __shared__ volatile float values[64];
  values[threadIdx.x] = 0;
  __syncthreads();
  if (threadIdx.x < 32) {
    values[threadIdx.x] = threadIdx.x + 1;
  } else {
    y[threadIdx.x] = values[threadIdx.x - 32];
  }
}
KERNEL overwritten_twice(float* y) {
  __shared__ volatile float values[32];
  values[threadIdx.x % 32] = threadIdx.x;
  __syncthreads();
  y[threadIdx.x] = values[threadIdx.x % 32];
}

KERNEL uninitialised(float* y) {
  __shared__ volatile float values[64];
  if (threadIdx.x < 32) values[threadIdx.x] = 1;
  __syncthreads();
  y[threadIdx.x] = values[threadIdx.x + 1];
}
KERNEL fill(float* y, int offset) { y[threadIdx.x + offset] = 1; }
KERNEL misaligned(float* y) { *reinterpret_cast<float4*>(y + 1) = make_float4(1, 2, 3, 4); }
KERNEL dynamic_shared(float* y) {
  extern __shared__ float values[];
  values[threadIdx.x] = 1;
  y[threadIdx.x] = values[threadIdx.x];
}
KERNEL half_barrier(float* y) {
  if (threadIdx.x < 64) asm volatile("bar.sync 1, 128;");
  y[threadIdx.x] = 1;
}
KERNEL divergent_shuffle(int* y) {
  int v = threadIdx.x;
  if (threadIdx.x < 16) {
    v = __shfl_xor_sync(~0u, v, 1);
  } else {
    v = __shfl_xor_sync(~0u, v, 2);
  }
  y[threadIdx.x] = v;
}
KERNEL divergent_loop(int* y) {
  const int n = threadIdx.x % 7;
  int sum = 0;
  for (int i = 0; i < n && sum <= 9; ++i) sum += i;
  y[threadIdx.x] = sum + __popc(__ballot_sync(~0u, sum > 3));
}
KERNEL atomic_sum(int* y) {  // y: global sum, then each block's through shared memory
  __shared__ int sum;
  if (threadIdx.x == 0) sum = 0;
  __syncthreads();
  atomicAdd(&sum, int(threadIdx.x));
  atomicAdd(y, 1);
  __syncthreads();
  if (threadIdx.x == 0) y[1 + blockIdx.x] = sum;
}

KERNEL numbers(const float* x, uint32_t* y, int n) {
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    const float v = x[i];
    uint32_t* results = y + i * 8;
    results[0] = __half_as_ushort(__float2half_rn(v));
    results[1] = __bfloat16_as_ushort(__float2bfloat16_rn(v));
    results[2] = __float_as_uint(fmaf(v, v, 1.f));
    results[3] = uint32_t(__float2int_rn(v));
    results[4] = uint32_t(__float2int_rz(v));
    results[5] = __float_as_uint(fmaxf(v, 0.f));
    results[6] = __float_as_uint(__fsqrt_rn(fabsf(v)));
    results[7] = __float_as_uint(__fdiv_rn(1.f, v));
  }
}

// C (16 x 8) = A (16 x 16) B^T for 16-bit types; both through ldmatrix.
#define MMA_16(NAME, TYPE)                                                                   \
  KERNEL mma_##NAME(const uint16_t* a, const uint16_t* b, float* c) {                        \
    __shared__ __align__(16) uint16_t A[16 * 16], B[8 * 16];                                 \
    const int lane = threadIdx.x;                                                            \
    for (int i = lane; i < 256; i += 32) A[i] = a[i];                                        \
    for (int i = lane; i < 128; i += 32) B[i] = b[i];                                        \
    __syncwarp();                                                                            \
    uint32_t ra[4], rb[2];                                                                   \
    float d[4] = {0, 0, 0, 0};                                                               \
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"             \
                 : "=r"(ra[0]), "=r"(ra[1]), "=r"(ra[2]), "=r"(ra[3])                        \
                 : "r"(shared_address(&A[lane % 16 * 16 + lane / 16 * 8])));                 \
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"                   \
                 : "=r"(rb[0]), "=r"(rb[1])                                                  \
                 : "r"(shared_address(&B[lane % 8 * 16 + lane / 8 % 2 * 8])));               \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                      \
                 ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                            \
                 : "r"(ra[0]), "r"(ra[1]), "r"(ra[2]), "r"(ra[3]), "r"(rb[0]), "r"(rb[1]));  \
    for (int i = 0; i < 4; ++i) c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i]; \
  }
MMA_16(f16, "f16")
MMA_16(bf16, "bf16")

// C (16 x 8) = A (16 x 8) B^T; the fragments come from global memory.
KERNEL mma_tf32(const uint32_t* a, const uint32_t* b, float* c) {
  const int lane = threadIdx.x, row = lane / 4, k = lane % 4;
  float d[4] = {0, 0, 0, 0};
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[row * 8 + k]), "r"(a[(row + 8) * 8 + k]), "r"(a[row * 8 + k + 4]), "r"(a[(row + 8) * 8 + k + 4]),
        "r"(b[row * 8 + k]), "r"(b[row * 8 + k + 4]));
  for (int i = 0; i < 4; ++i) c[(row + i / 2 * 8) * 8 + k * 2 + i % 2] = d[i];
}

#if __CUDA_ARCH__ >= 900
// 1 KiB by a bulk copy and an mbarrier that expects EXPECT bytes.
template <int EXPECT, bool WAIT>
__device__ void bulk_load_body(const float* x, float* y) {
  __shared__ __align__(128) float values[256];
  __shared__ __align__(8) uint64_t barrier;
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&barrier)));
    asm volatile("fence.mbarrier_init.release.cluster;");
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(EXPECT));
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], 1024, [%2];" ::"r"(
                     shared_address(values)),
                 "l"(x), "r"(shared_address(&barrier)));
  }
  if (WAIT)
    asm volatile("{ .reg .pred p; w: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], 0; @!p bra w; }" ::"r"(
        shared_address(&barrier)));
  y[threadIdx.x] = values[255 - threadIdx.x];
}
KERNEL bulk_load(const float* x, float* y) { bulk_load_body<1024, true>(x, y); }
KERNEL bulk_load_expects_more(const float* x, float* y) { bulk_load_body<2048, true>(x, y); }
KERNEL bulk_load_expects_less(const float* x, float* y) { bulk_load_body<512, true>(x, y); }
KERNEL bulk_load_unwaited(const float* x, float* y) { bulk_load_body<1024, false>(x, y); }

template <bool FENCE, bool WAIT>
__device__ void bulk_store_body(float* y) {
  __shared__ __align__(128) float values[256];
  values[threadIdx.x] = threadIdx.x;
  if (FENCE) asm volatile("fence.proxy.async.shared::cta;");
  __syncthreads();
  if (threadIdx.x == 0) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], 1024;" ::"l"(y), "r"(shared_address(values)));
    asm volatile("cp.async.bulk.commit_group;");
    if (WAIT) asm volatile("cp.async.bulk.wait_group.read 0;");
  }
  __syncthreads();
  values[threadIdx.x] = -1;
}
KERNEL bulk_store(float* y) { bulk_store_body<true, true>(y); }
KERNEL bulk_store_unfenced(float* y) { bulk_store_body<false, true>(y); }
KERNEL bulk_store_unwaited(float* y) { bulk_store_body<true, false>(y); }

// D (64 x 16) = 2 A (64 x 32 bytes) B^T (16 x 32 bytes): the same wgmma without, then with its accumulator.
// SWIZZLE: rows of 32 bytes whose halves are swapped every other 128 bytes; else core matrices of 8 x 16 bytes.
template <bool SWIZZLE>
__device__ uint32_t chunk_offset(int row, int half) {
  if (!SWIZZLE) return row / 8 * 256 + half * 128 + row % 8 * 16;
  const uint32_t offset = row * 32 + half * 16;
  return offset ^ (offset >> 7 & 1) << 4;
}
template <bool SWIZZLE>
__device__ uint64_t descriptor(const void* matrix) {
  const uint64_t swizzle_32 = 3, leading = 128 / 16, stride = 256 / 16;
  return shared_address(matrix) / 16 | leading << 16 | stride << 32 | (SWIZZLE ? swizzle_32 << 62 : 0);
}
#define WGMMA(SHAPE_AND_TYPES, TRANSPOSE, SCALE_D)                                                              \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %10, 0; wgmma.mma_async.sync.aligned." SHAPE_AND_TYPES           \
               " {%0,%1,%2,%3,%4,%5,%6,%7}, %8, %9, p, 1, 1" TRANSPOSE "; }"                                    \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]) \
               : "l"(descriptor<SWIZZLE>(A)), "l"(descriptor<SWIZZLE>(B)), "r"(SCALE_D))
#define WGMMA_KERNEL(NAME, SHAPE_AND_TYPES, TRANSPOSE, SWIZZLED, FENCE)                                        \
  KERNEL wgmma_##NAME(const uint4* a, const uint4* b, float* c) {                                              \
    constexpr bool SWIZZLE = SWIZZLED;                                                                         \
    __shared__ __align__(1024) char A[64 * 32];                                                                \
    __shared__ __align__(1024) char B[16 * 32];                                                                \
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;                                    \
    *reinterpret_cast<uint4*>(A + chunk_offset<SWIZZLE>(thread / 2, thread % 2)) = a[thread];                  \
    if (thread < 32) *reinterpret_cast<uint4*>(B + chunk_offset<SWIZZLE>(thread / 2, thread % 2)) = b[thread]; \
    if (FENCE) asm volatile("fence.proxy.async.shared::cta;");                                                 \
    __syncthreads();                                                                                           \
    float d[8];                                                                                                \
    for (float& x : d) x = NAN;                                                                                \
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");                                                    \
    WGMMA(SHAPE_AND_TYPES, TRANSPOSE, 0);                                                                      \
    WGMMA(SHAPE_AND_TYPES, TRANSPOSE, 1);                                                                      \
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");                                             \
    asm volatile("wgmma.wait_group.sync.aligned 0;"                                                            \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),         \
                   "+f"(d[7])::"memory");                                                                      \
    for (int i = 0; i < 8; ++i)                                                                                \
      c[(warp * 16 + lane / 4 + i / 2 % 2 * 8) * 16 + i / 4 * 8 + lane % 4 * 2 + i % 2] = d[i];                \
  }
WGMMA_KERNEL(f16, "m64n16k16.f32.f16.f16", ", 0, 0", false, true)
WGMMA_KERNEL(bf16, "m64n16k16.f32.bf16.bf16", ", 0, 0", false, true)
WGMMA_KERNEL(tf32, "m64n16k8.f32.tf32.tf32", "", false, true)
WGMMA_KERNEL(f16_swizzled, "m64n16k16.f32.f16.f16", ", 0, 0", true, true)
WGMMA_KERNEL(bf16_swizzled, "m64n16k16.f32.bf16.bf16", ", 0, 0", true, true)
WGMMA_KERNEL(tf32_swizzled, "m64n16k8.f32.tf32.tf32", "", true, true)
WGMMA_KERNEL(unfenced, "m64n16k16.f32.f16.f16", ", 0, 0", false, false)
#endif
