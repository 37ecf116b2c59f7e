// What the tests ask of the virtual GPU itself, through ctypes.
#include <sstream>

#include "device.h"

using namespace virtual_gpu;

API const char* vgpu_message() {
  static thread_local std::string text;
  text = last_message();
  return text.c_str();
}
API void vgpu_forget_errors() {
  drain_all();
  take_last_error();
}
API void vgpu_seed(uint64_t seed) { settings().seed = seed; }
API long vgpu_launches() { return launches(); }
API const char* vgpu_launches_by_name() {  // "kernel count" lines
  static thread_local std::string text;
  std::ostringstream lines;
  for (const auto& [name, count] : launches_by_name()) lines << name << ' ' << count << '\n';
  text = lines.str();
  return text.c_str();
}
API int vgpu_read_only(void* pointer, int read_only) { return set_read_only(pointer, read_only); }
API void vgpu_plant(const char* from, const char* to) { plant(from, to); }
API long vgpu_planted() { return planted(); }
// For operators that run on the host, in a stream's order: 0 where everything before is done, 1 inside a capture, -1
// where what was done failed.
API int vgpu_host_turn(cudaStream_t handle) {
  Lock lock(mutex());
  Stream& stream = stream_of(handle);
  if (stream.capture) return 1;
  return drain(stream) == cudaSuccess ? 0 : -1;
}
API void vgpu_record(cudaStream_t handle, int (*replay)()) {
  Lock lock(mutex());
  stream_of(handle).capture->nodes.push_back({[=] { return static_cast<cudaError_t>(replay()); }, true});
}
