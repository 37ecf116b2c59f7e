#include "device.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace virtual_gpu {
namespace {

int number(const char* name, int otherwise) {
  const char* value = getenv(name);
  return value ? atoi(value) : otherwise;
}
thread_local int device = 0;
thread_local cudaError_t last_error = cudaSuccess;
std::string message;  // of the last failure

}  // namespace

std::recursive_mutex& mutex() {
  static auto* m = new std::recursive_mutex;  // threads may outlive static destructors
  return *m;
}

Settings& settings() {
  static Settings s = [] {
    const char* edge = getenv("VIRTUAL_GPU_EDGE");
    const int capability = number("VIRTUAL_GPU_CAPABILITY", 90);
    return Settings{
        .capability = capability,
        .multiprocessors = number("VIRTUAL_GPU_MULTIPROCESSORS", capability == 80 ? 108 : 132),
        .devices = number("VIRTUAL_GPU_DEVICES", 2),
        .seed = uint64_t(number("VIRTUAL_GPU_SEED", 0)),
        .trace = number("VIRTUAL_GPU_TRACE", 0) != 0,
        .blocking = number("CUDA_LAUNCH_BLOCKING", 0) != 0,
        .edge_first = edge && !strcmp(edge, "begin"),
    };
  }();
  return s;
}

int shared_memory_per_multiprocessor() {
  switch (settings().capability) {
    case 80:
    case 87:
      return 164 * 1024;
    case 90:
    case 100:
    case 103:
      return 228 * 1024;
    default:
      return 100 * 1024;
  }
}
int shared_memory_optin() { return shared_memory_per_multiprocessor() - 1024; }

int device_attribute(CUdevice_attribute attribute) {
  const int capability = settings().capability;
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
      return capability / 10;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
      return capability % 10;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
      return settings().multiprocessors;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR:
      return capability == 80 || capability == 90 || capability == 100 ? 2048 : 1536;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK:
      return 48 * 1024;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
      return shared_memory_optin();
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
      return shared_memory_per_multiprocessor();
    case CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK:
      return 1024;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR:
      return 65536;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X:
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y:
      return 1024;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z:
      return 64;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR:
      return 32;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X:
      return 2147483647;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y:
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z:
      return 65535;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
      return 32;
    case CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE:
      return 50 << 20;
    case CU_DEVICE_ATTRIBUTE_CLOCK_RATE:
    case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE:
      return 1000000;
    case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH:
      return 5120;
    case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING:
    case CU_DEVICE_ATTRIBUTE_STREAM_PRIORITIES_SUPPORTED:
      return 1;
    case CU_DEVICE_ATTRIBUTE_CLUSTER_LAUNCH:
      return capability >= 90;
    default:
      return 0;
  }
}

int current_device() { return device; }
cudaError_t set_current_device(int d) {
  if (d < 0 || d >= settings().devices) return fail(cudaErrorInvalidDevice, "device %d of %d", d, settings().devices);
  device = d;
  return cudaSuccess;
}

cudaError_t fail(cudaError_t error, const char* format, ...) {
  char text[4096];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  Lock lock(mutex());
  message = text;
  trace("%s", text);
  return last_error = error;
}
cudaError_t take_last_error() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
cudaError_t peek_last_error() { return last_error; }
std::string last_message() {
  Lock lock(mutex());
  return message;
}
void trace(const char* format, ...) {
  if (!settings().trace) return;
  va_list arguments;
  va_start(arguments, format);
  fputs("virtual GPU: ", stderr);
  vfprintf(stderr, format, arguments);
  fputc('\n', stderr);
  va_end(arguments);
}

}  // namespace virtual_gpu
