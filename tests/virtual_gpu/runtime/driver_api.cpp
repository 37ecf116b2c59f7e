// The CUDA driver's functions that Triton, PyTorch and CUTLASS call; cuGetProcAddress finds them and no others.
#include <dlfcn.h>

#include <cstring>

#include "../emulator/ptx.h"
#include "device.h"

#undef cuGetProcAddress
#undef cuCtxGetDevice

using namespace virtual_gpu;

namespace {

constexpr int kDriverVersion = 13000;

CUcontext context_of(int device) { return reinterpret_cast<CUcontext>(static_cast<uintptr_t>(device) + 1); }
CUresult result(cudaError_t error) { return static_cast<CUresult>(error); }  // the numbers used here are the same

CUresult refuse(const char* reason) {
  fail(cudaErrorInvalidValue, "the tensor map: %s", reason);
  return CUDA_ERROR_INVALID_VALUE;
}

}  // namespace

API CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
API CUresult cuDriverGetVersion(int* version) {
  *version = kDriverVersion;
  return CUDA_SUCCESS;
}
API CUresult cuDeviceGetCount(int* count) {
  *count = settings().devices;
  return CUDA_SUCCESS;
}
API CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  *device = ordinal;
  return ordinal < settings().devices ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}
API CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
  *value = device_attribute(attribute);
  return CUDA_SUCCESS;
}
API CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
  *flags = 0;
  *active = 1;
  return CUDA_SUCCESS;
}
API CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  *context = context_of(device);
  return CUDA_SUCCESS;
}
API CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = context_of(current_device());
  return CUDA_SUCCESS;
}
API CUresult cuCtxSetCurrent(CUcontext context) {
  return context ? result(set_current_device(int(reinterpret_cast<uintptr_t>(context)) - 1)) : CUDA_SUCCESS;
}
API CUresult cuCtxGetDevice(CUdevice* device) {
  *device = current_device();
  return CUDA_SUCCESS;
}
API CUresult cuCtxGetLimit(size_t* value, CUlimit) {
  *value = 0;
  return CUDA_SUCCESS;
}
API CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_SUCCESS; }
API CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = cudaGetErrorString(static_cast<cudaError_t>(error));
  return CUDA_SUCCESS;
}
API CUresult cuPointerGetAttribute(void* data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  const int device = device_of(reinterpret_cast<void*>(pointer));
  if (device < 0) return result(fail(cudaErrorInvalidValue, "%#llx is no device memory", pointer));
  switch (attribute) {
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER:
      *static_cast<CUdeviceptr*>(data) = pointer;
      return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL:
      *static_cast<int*>(data) = device;
      return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_CONTEXT:
      *static_cast<CUcontext*>(data) = context_of(device);
      return CUDA_SUCCESS;
    default:
      return CUDA_ERROR_NOT_SUPPORTED;
  }
}

API CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  if (strncmp(static_cast<const char*>(image), "//", 2) && !strstr(static_cast<const char*>(image), ".version"))
    return result(fail(cudaErrorInvalidKernelImage, "the image is no PTX; VIRTUAL_GPU's ptxas was not used"));
  std::string error;
  *module = reinterpret_cast<CUmodule>(load_ptx(static_cast<const char*>(image), &error));
  return error.empty() ? CUDA_SUCCESS : result(fail(cudaErrorInvalidPtx, "%s", error.c_str()));
}
API CUresult cuModuleLoadDataEx(CUmodule* module, const void* image, unsigned, CUjit_option*, void**) {
  return cuModuleLoadData(module, image);
}
API CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }
API CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  auto* kernel = new Kernel{reinterpret_cast<Module*>(module), name};
  *function = reinterpret_cast<CUfunction>(kernel);
  unsigned bytes;
  return result(static_shared_memory(*kernel, &bytes));
}
API CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  auto& kernel = *reinterpret_cast<Kernel*>(function);
  unsigned found = 0;
  cudaError_t error = cudaSuccess;
  if (attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK) error = max_threads(kernel, &found);
  if (attribute == CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES) error = static_shared_memory(kernel, &found);
  *value = int(found);  // registers and spills: 0, nothing assembled the PTX
  return result(error);
}
API CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  if (attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES)
    return result(allow_dynamic_shared(*reinterpret_cast<Kernel*>(function), value));
  return CUDA_ERROR_NOT_SUPPORTED;
}
API CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }
API CUresult cuLaunchKernel(CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                            unsigned bz, unsigned shared, CUstream stream, void** arguments, void**) {
  return result(launch(*reinterpret_cast<Kernel*>(function), {gx, gy, gz}, {bx, by, bz}, shared,
                       reinterpret_cast<cudaStream_t>(stream), arguments));
}
API CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction function, void** arguments, void** extra) {
  for (unsigned i = 0; i < c->numAttrs; ++i) {
    const auto& cluster = c->attrs[i].value.clusterDim;
    if (c->attrs[i].id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION && cluster.x * cluster.y * cluster.z != 1)
      return result(fail(cudaErrorInvalidClusterSize, "clusters are not emulated"));
  }
  return cuLaunchKernel(function, c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX, c->blockDimY, c->blockDimZ,
                        c->sharedMemBytes, c->hStream, arguments, extra);
}
API CUresult cuOccupancyMaxActiveClusters(int* clusters, CUfunction, const CUlaunchConfig*) {
  *clusters = settings().multiprocessors;
  return CUDA_SUCCESS;
}

API CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                    const cuuint64_t* dims, const cuuint64_t* strides, const cuuint32_t* box,
                                    const cuuint32_t* element_strides, CUtensorMapInterleave interleave,
                                    CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                    CUtensorMapFloatOOBfill fill) {
  if (device_of(address) < 0) return refuse("the address is no device memory");
  return ptx_encode_tiled(map, type, rank, address, dims, strides, box, element_strides, interleave, swizzle, promotion,
                          fill)
             ? refuse(ptx_encode_error())
             : CUDA_SUCCESS;
}
API CUresult cuTensorMapEncodeIm2col(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                     const cuuint64_t* dims, const cuuint64_t* strides, const int* lower,
                                     const int* upper, cuuint32_t channels, cuuint32_t pixels,
                                     const cuuint32_t* element_strides, CUtensorMapInterleave interleave,
                                     CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                     CUtensorMapFloatOOBfill fill) {
  if (device_of(address) < 0) return refuse("the address is no device memory");
  return ptx_encode_im2col(map, type, rank, address, dims, strides, lower, upper, channels, pixels, element_strides,
                           interleave, swizzle, promotion, fill)
             ? refuse(ptx_encode_error())
             : CUDA_SUCCESS;
}

API CUresult cuGetProcAddress_v2(const char* symbol, void** function, int, cuuint64_t,
                                 CUdriverProcAddressQueryResult* status) {
  Dl_info here;
  dladdr(reinterpret_cast<void*>(&cuInit), &here);
  void* self = dlopen(here.dli_fname, RTLD_NOW | RTLD_NOLOAD);
  *function = dlsym(self, symbol);
  if (status) *status = *function ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  if (!*function) trace("no driver function %s", symbol);
  return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
API CUresult cuGetProcAddress(const char* symbol, void** function, int version, cuuint64_t flags) {
  return cuGetProcAddress_v2(symbol, function, version, flags, nullptr);
}
