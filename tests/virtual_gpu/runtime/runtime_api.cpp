// The CUDA runtime's functions that PyTorch and the extension call. Those that are not here fail in the real libcudart.
#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>

#include "device.h"

using namespace virtual_gpu;

namespace {

std::unordered_map<const void*, Kernel>& kernels() {
  static auto* m = new std::unordered_map<const void*, Kernel>;
  return *m;
}
Kernel* kernel_of(const void* host) {
  Lock lock(mutex());
  auto it = kernels().find(host);
  if (it != kernels().end()) return &it->second;
  fail(cudaErrorInvalidDeviceFunction, "an unregistered kernel");
  return nullptr;
}
thread_local struct {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
} configuration;

struct ExecutableGraph {
  std::shared_ptr<Graph> graph;
};
cudaError_t copy(void* to, const void* from, size_t bytes, cudaStream_t handle) {
  Lock lock(mutex());
  Stream& stream = stream_of(handle);
  if (stream.capture) {
    stream.capture->nodes.push_back({[=] { return memmove(to, from, bytes), cudaSuccess; }});
    return cudaSuccess;
  }
  const cudaError_t error = drain(stream);
  memmove(to, from, bytes);
  return error;
}

}  // namespace

// ---- registration and launches ----
API void** __cudaRegisterFatBinary(void* wrapper) {
  struct Wrapper {
    int magic, version;
    const void* data;
  };
  auto* module = new Module;
  module->fatbin = static_cast<Wrapper*>(wrapper)->data;
  return reinterpret_cast<void**>(module);
}
API void __cudaRegisterFatBinaryEnd(void**) {}
API void __cudaUnregisterFatBinary(void**) {}
API void __cudaRegisterFunction(void** handle, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*,
                                dim3*, int*) {
  Lock lock(mutex());
  kernels()[host] = {reinterpret_cast<Module*>(handle), name};
}
API void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
API void __cudaRegisterManagedVar(void**, void**, char*, const char*, int, size_t, int, int) {}
API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  configuration = {grid, block, shared, stream};
  return 0;
}
API cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = configuration.grid;
  *block = configuration.block;
  *shared = configuration.shared;
  *static_cast<cudaStream_t*>(stream) = configuration.stream;
  return cudaSuccess;
}
API cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}
API cudaError_t cudaLaunchKernel(const void* host, dim3 grid, dim3 block, void** arguments, size_t shared,
                                 cudaStream_t stream) {
  Kernel* kernel = kernel_of(host);
  return kernel ? launch(*kernel, grid, block, shared, stream, arguments) : cudaErrorInvalidDeviceFunction;
}
API cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                                   cudaStream_t stream) {
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, arguments, shared, stream);
}
API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* host, void** arguments) {
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const auto& cluster = config->attrs[i].val.clusterDim;
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension && cluster.x * cluster.y * cluster.z != 1)
      return fail(cudaErrorInvalidClusterSize, "clusters of %u x %u x %u are not emulated", cluster.x, cluster.y,
                  cluster.z);
  }
  return cudaLaunchKernel(host, config->gridDim, config->blockDim, arguments, config->dynamicSmemBytes, config->stream);
}
API cudaError_t cudaFuncSetAttribute(const void* host, cudaFuncAttribute attribute, int value) {
  Kernel* kernel = kernel_of(host);
  if (!kernel) return cudaErrorInvalidDeviceFunction;
  return attribute == cudaFuncAttributeMaxDynamicSharedMemorySize ? allow_dynamic_shared(*kernel, value) : cudaSuccess;
}
API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* host) {
  memset(attributes, 0, sizeof *attributes);
  Kernel* kernel = kernel_of(host);
  if (!kernel) return cudaErrorInvalidDeviceFunction;
  unsigned fixed, threads;
  if (const cudaError_t error = static_shared_memory(*kernel, &fixed)) return error;
  if (const cudaError_t error = max_threads(*kernel, &threads)) return error;
  attributes->maxThreadsPerBlock = int(threads);
  attributes->ptxVersion = attributes->binaryVersion = settings().capability;
  attributes->sharedSizeBytes = fixed;
  attributes->maxDynamicSharedSizeBytes = kernel->max_dynamic_shared;
  return cudaSuccess;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t shared) {
  *blocks = active_blocks(shared);
  return cudaSuccess;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t shared,
                                                                       unsigned) {
  *blocks = active_blocks(shared);
  return cudaSuccess;
}
API cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*, const cudaLaunchConfig_t*) {
  *clusters = settings().multiprocessors;
  return cudaSuccess;
}
API cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned version,
                                                 unsigned long long flags, cudaDriverEntryPointQueryResult* status) {
  const bool found = cuGetProcAddress(symbol, function, int(version), flags, nullptr) == CUDA_SUCCESS;
  if (status) *status = found ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return found ? cudaSuccess : cudaErrorUnknown;
}

// ---- devices and errors ----
API cudaError_t cudaGetDeviceCount(int* count) {
  *count = settings().devices;
  return cudaSuccess;
}
API cudaError_t cudaGetDevice(int* device) {
  *device = current_device();
  return cudaSuccess;
}
API cudaError_t cudaSetDevice(int device) { return set_current_device(device); }
API cudaError_t cudaDeviceSynchronize() {
  Lock lock(mutex());
  return capture_under_way() ? fail(cudaErrorStreamCaptureUnsupported, "a synchronisation inside a capture")
                             : drain_all();
}
API cudaError_t cudaDriverGetVersion(int* version) { return static_cast<cudaError_t>(cuDriverGetVersion(version)); }
API cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
API cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = 0;
  return cudaSuccess;
}
API cudaError_t cudaDeviceGetStreamPriorityRange(int* low, int* high) {
  *low = 0;
  *high = -5;
  return cudaSuccess;
}
API cudaError_t cudaDeviceGetPCIBusId(char* id, int, int device) {
  strcpy(id, device ? "0000:01:00.0" : "0000:00:00.0");
  return cudaSuccess;
}
API cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = device_attribute(static_cast<CUdevice_attribute>(attribute));  // the numbers are the same
  return cudaSuccess;
}
API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "Virtual GPU");
  p->totalGlobalMem = size_t(8) << 30;
  p->sharedMemPerBlock = device_attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK);
  p->sharedMemPerBlockOptin = shared_memory_optin();
  p->sharedMemPerMultiprocessor = shared_memory_per_multiprocessor();
  p->reservedSharedMemPerBlock = device_attribute(CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK);
  p->regsPerBlock = p->regsPerMultiprocessor = device_attribute(CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK);
  p->warpSize = 32;
  p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->major = settings().capability / 10;
  p->minor = settings().capability % 10;
  p->multiProcessorCount = settings().multiprocessors;
  p->maxThreadsPerMultiProcessor = device_attribute(CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR);
  p->maxBlocksPerMultiProcessor = device_attribute(CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR);
  p->l2CacheSize = device_attribute(CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE);
  p->unifiedAddressing = p->streamPrioritiesSupported = 1;
  p->clusterLaunch = settings().capability >= 90;
  return cudaSuccess;
}
API cudaError_t cudaGetLastError() { return take_last_error(); }
API cudaError_t cudaPeekAtLastError() { return peek_last_error(); }
API const char* cudaGetErrorString(cudaError_t error) {
  static thread_local std::string text;
  text = "virtual GPU, error " + std::to_string(int(error)) + ": " + last_message();
  return text.c_str();
}
API const char* cudaGetErrorName(cudaError_t error) {
  static thread_local std::string text;
  text = "cudaError " + std::to_string(int(error));
  return text.c_str();
}

// ---- memory ----
API cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  *pointer = bytes ? allocate(bytes) : nullptr;
  return bytes && !*pointer ? fail(cudaErrorMemoryAllocation, "%zu B of memory", bytes) : cudaSuccess;
}
API cudaError_t cudaFree(void* pointer) {
  release(pointer);
  return cudaSuccess;
}
API cudaError_t cudaMallocAsync(void** pointer, size_t bytes, cudaStream_t) { return cudaMalloc(pointer, bytes); }
API cudaError_t cudaFreeAsync(void* pointer, cudaStream_t) { return cudaFree(pointer); }
API cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned) {
  *pointer = aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
  return cudaSuccess;
}
API cudaError_t cudaFreeHost(void* pointer) {
  free(pointer);
  return cudaSuccess;
}
API cudaError_t cudaHostRegister(void*, size_t, unsigned) { return cudaSuccess; }
API cudaError_t cudaHostUnregister(void*) { return cudaSuccess; }
API cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total) {
  *free_bytes = size_t(7) << 30;
  *total = size_t(8) << 30;
  return cudaSuccess;
}
API cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  return copy(to, from, bytes, nullptr);
}
API cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  return copy(to, from, bytes, stream);
}
API cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes, cudaStream_t stream) {
  return copy(to, from, bytes, stream);
}
API cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  return submit(stream_of(stream), [=] { return memset(to, value, bytes), cudaSuccess; });
}
API cudaError_t cudaMemset(void* to, int value, size_t bytes) { return cudaMemsetAsync(to, value, bytes, nullptr); }
API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  memset(attributes, 0, sizeof *attributes);
  const int device = device_of(pointer);
  attributes->type = device < 0 ? cudaMemoryTypeUnregistered : cudaMemoryTypeDevice;
  attributes->device = std::max(device, 0);
  attributes->devicePointer = const_cast<void*>(pointer);
  return cudaSuccess;
}

// ---- streams and events ----
API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  *stream = reinterpret_cast<cudaStream_t>(new_stream());
  return cudaSuccess;
}
API cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}
API cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
API cudaError_t cudaStreamDestroy(cudaStream_t stream) { return drain(stream_of(stream)); }
API cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return synchronize(stream_of(stream)); }
API cudaError_t cudaStreamQuery(cudaStream_t stream) { return synchronize(stream_of(stream)); }
API cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) {
  *priority = 0;
  return cudaSuccess;
}
API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = reinterpret_cast<cudaEvent_t>(new Event);
  return cudaSuccess;
}
API cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
API cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete reinterpret_cast<Event*>(event);
  return cudaSuccess;
}
API cudaError_t cudaEventRecord(cudaEvent_t handle, cudaStream_t stream_handle) {
  Lock lock(mutex());
  auto* event = reinterpret_cast<Event*>(handle);
  Stream& stream = stream_of(stream_handle);
  *event = {&stream, stream.submitted, std::chrono::steady_clock::now(), stream.capture};
  return cudaSuccess;
}
API cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  return cudaEventRecord(event, stream);
}
API cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  const auto* event = reinterpret_cast<Event*>(handle);
  return event->stream ? drain_until(*event->stream, event->position) : cudaSuccess;
}
API cudaError_t cudaEventQuery(cudaEvent_t event) { return cudaEventSynchronize(event); }
// The host's time, so that loops that wait for enough of it end: it says nothing about a GPU.
API cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t from, cudaEvent_t to) {
  const auto *first = reinterpret_cast<Event*>(from), *last = reinterpret_cast<Event*>(to);
  *milliseconds = std::chrono::duration<float, std::milli>(last->time - first->time).count();
  return cudaSuccess;
}
API cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event_handle, unsigned) {
  Lock lock(mutex());
  Stream& stream = stream_of(handle);
  const Event event = *reinterpret_cast<Event*>(event_handle);
  if (event.capture && !event.capture->invalid && !event.capture->ended) {
    stream.capture = event.capture;
    return cudaSuccess;
  }
  if (!event.stream || event.stream == &stream) return cudaSuccess;
  const int device = current_device();
  set_current_device(stream.device);  // an event may be waited for from another device
  const cudaError_t error = submit(stream, [=] { return drain_until(*event.stream, event.position); });
  set_current_device(device);
  return error;
}

// ---- graphs: the launches of a capture, in the order in which they came ----
API cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode) {
  Lock lock(mutex());
  static unsigned long long captures = 0;
  Stream& stream = stream_of(handle);
  const cudaError_t error = drain(stream);
  stream.capture = std::make_shared<Graph>();
  stream.capture->id = ++captures;
  return error;
}
API cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
  Lock lock(mutex());
  *graph = nullptr;
  std::shared_ptr<Graph> captured = end_capture(stream_of(handle));
  if (!captured) return fail(cudaErrorIllegalState, "no capture is under way on this stream");
  if (captured->invalid) return fail(cudaErrorStreamCaptureInvalidated, "the capture was invalidated");
  *graph = reinterpret_cast<cudaGraph_t>(new ExecutableGraph{captured});
  return cudaSuccess;
}
API cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
  Lock lock(mutex());
  *status = stream_of(handle).capture ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, cudaStreamCaptureStatus* status, unsigned long long* id,
                                         cudaGraph_t*, const cudaGraphNode_t**, const cudaGraphEdgeData**, size_t*) {
  Lock lock(mutex());
  const auto capture = stream_of(handle).capture;
  if (id) *id = capture ? capture->id : 0;
  return cudaStreamIsCapturing(handle, status);
}
API cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
API cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* count) {
  *count = reinterpret_cast<ExecutableGraph*>(graph)->graph->nodes.size();
  return cudaSuccess;
}
API cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  *executable = reinterpret_cast<cudaGraphExec_t>(new ExecutableGraph(*reinterpret_cast<ExecutableGraph*>(graph)));
  return cudaSuccess;
}
API cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete reinterpret_cast<ExecutableGraph*>(graph);
  return cudaSuccess;
}
API cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  delete reinterpret_cast<ExecutableGraph*>(executable);
  return cudaSuccess;
}
API cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  return replay(*reinterpret_cast<ExecutableGraph*>(executable)->graph, stream_of(stream));
}
