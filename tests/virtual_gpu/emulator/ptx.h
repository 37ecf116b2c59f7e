// The emulator's C interface: PTX text in, kernels executed on host memory. Not thread-safe: callers hold one lock.
#pragma once
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

// Parses a PTX file; never null. ptx_error says why it could not be read, "" if it could.
void* ptx_load(const char* text);
// The last error of a module, with the kernel, the thread block, the warp and the PTX line; "" if there was none.
const char* ptx_error(void* module);
// Frees a module and its global variables.
void ptx_free(void* module);

// Runs a kernel to its end; 0: it succeeded. params: the parameters at the offsets of ptx_param_layout. The seed draws
// the order of warps and when asynchronous copies land.
int ptx_launch(void* module, const char* kernel, int device, const uint32_t grid[3], const uint32_t block[3],
               uint32_t dynamic_smem, const void* params, size_t params_size, uint64_t seed);

// Registers an allocation of global memory: kernels may touch nothing else. device -1: of every device.
void ptx_allow(const void* address, size_t bytes, int writable, int device);
// Removes the allocations that begin at an address.
void ptx_forbid(const void* address);

// Since the start: warp instructions, thread instructions, global bytes loaded, global bytes stored, mma and wgmma,
// bulk copies, thread blocks, barriers completed.
void ptx_counters(uint64_t out[8]);
// Sets an option of all later launches (see Options in emulator.h); nonzero: no option has this name.
int ptx_option(const char* name, int64_t value);

// The names of a module's kernels, one a line, cut to n bytes; returns the length of the whole.
size_t ptx_kernels(void* module, char* out, size_t n);
// The instructions of a kernel that the emulator does not know, one a line with the PTX line; "": it can run.
const char* ptx_unsupported(void* module, const char* kernel);
// The host address of a .global or .const variable and its size; 0: the module has no such variable.
int64_t ptx_global(void* module, const char* name, size_t* bytes);
// The first max parameters' offsets and sizes in bytes; returns their number, -1: no such kernel.
int ptx_param_layout(void* module, const char* kernel, uint32_t* offsets, uint32_t* sizes, uint32_t max);

struct ptx_kernel_info {
  uint32_t max_threads;  // of a thread block, by .maxntid or .reqntid; 1024 without either
  uint32_t static_smem;  // bytes
  uint32_t param_bytes;
  uint32_t target;         // 80, 90
  uint32_t arch_specific;  // 1 for sm_90a: it runs on this compute capability alone
};
// What the runtime needs to know before a launch; nonzero: no such kernel.
int ptx_info(void* module, const char* kernel, struct ptx_kernel_info* out);

// cuTensorMapEncodeTiled and cuTensorMapEncodeIm2col with their documented checks, except that the address is device
// memory; 0 or 1 (CUDA_ERROR_INVALID_VALUE). The enumerations are the driver's. map: 128 bytes, aligned to 64.
int ptx_encode_tiled(void* map, int data_type, uint32_t rank, const void* address, const uint64_t* dims,
                     const uint64_t* strides, const uint32_t* box, const uint32_t* element_strides, int interleave,
                     int swizzle, int l2_promotion, int oob_fill);
int ptx_encode_im2col(void* map, int data_type, uint32_t rank, const void* address, const uint64_t* dims,
                      const uint64_t* strides, const int* lower_corner, const int* upper_corner, uint32_t channels,
                      uint32_t pixels, const uint32_t* element_strides, int interleave, int swizzle, int l2_promotion,
                      int oob_fill);
// Why the calling thread's last ptx_encode_* refused, naming the driver's argument.
const char* ptx_encode_error(void);

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
