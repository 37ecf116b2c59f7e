// The virtual device behind the CUDA runtime's and the driver's calls: settings, errors, memory, streams, kernels.
#pragma once
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <chrono>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))

namespace virtual_gpu {

// Guards everything below; never held while Python runs.
using Lock = std::lock_guard<std::recursive_mutex>;
std::recursive_mutex& mutex();

// ---- device.cpp ----
struct Settings {
  int capability;       // VIRTUAL_GPU_CAPABILITY: 80, 86, 89, 90, 100, 120
  int multiprocessors;  // VIRTUAL_GPU_MULTIPROCESSORS
  int devices;          // VIRTUAL_GPU_DEVICES
  uint64_t seed;        // VIRTUAL_GPU_SEED: the schedule of warps, asynchronous copies and streams
  bool trace;           // VIRTUAL_GPU_TRACE: every launch and refusal on stderr
  bool blocking;        // CUDA_LAUNCH_BLOCKING: no launch outlives its call
  bool edge_first;      // VIRTUAL_GPU_EDGE=begin: allocations begin behind a page that faults, instead of ending at one
};
Settings& settings();
int shared_memory_optin();  // bytes that a block may have
int shared_memory_per_multiprocessor();
int device_attribute(CUdevice_attribute attribute);  // 0 for one that nothing here depends on

int current_device();
cudaError_t set_current_device(int device);

// Keeps the message for cudaGetErrorString and the error for cudaGetLastError.
cudaError_t fail(cudaError_t error, const char* format, ...) __attribute__((format(printf, 2, 3)));
cudaError_t take_last_error();
cudaError_t peek_last_error();
std::string last_message();
void trace(const char* format, ...) __attribute__((format(printf, 1, 2)));

// ---- memory.cpp: every allocation ends at (or begins behind) a page that faults, holds NaN, and is known to the byte
// ----
void* allocate(size_t bytes);
void release(void* pointer);   // once all work that was submitted before has run
void release_deferred();       // called where no work is pending
int device_of(const void* p);  // -1: no device memory
bool set_read_only(void* pointer, bool read_only);

// ---- stream.cpp: work runs in the order of its stream, at any later moment up to a synchronisation ----
using Work = std::function<cudaError_t()>;
struct Node {
  Work work;
  bool python = false;  // runs without the lock
};
struct Graph {
  std::vector<Node> nodes;
  std::vector<void*> freed;  // memory of the capture that its owner has given back
  unsigned long long id = 0;
  bool invalid = false, ended = false;
  ~Graph();
};
struct Stream {
  int device = 0;
  std::deque<Work> pending;
  uint64_t submitted = 0, done = 0;
  std::shared_ptr<Graph> capture;  // launches are recorded there
};
struct Event {
  Stream* stream = nullptr;
  uint64_t position = 0;
  std::chrono::steady_clock::time_point time;
  std::shared_ptr<Graph> capture;
};
Stream& stream_of(cudaStream_t handle);  // null: the default stream of the current device
Stream* new_stream();
cudaError_t submit(Stream& stream, Work work);
cudaError_t drain(Stream& stream);
cudaError_t drain_until(Stream& stream, uint64_t position);
cudaError_t drain_all();
bool work_is_pending();
cudaError_t synchronize(Stream& stream);  // an error while a capture is under way
std::shared_ptr<Graph> capture_under_way();
std::shared_ptr<Graph> end_capture(Stream& stream);  // for every stream that had joined it
cudaError_t replay(const Graph& graph, Stream& stream);

// ---- module.cpp ----
struct Image {  // PTX for one target
  std::string ptx;
  void* loaded = nullptr;
};
struct Module {
  const void* fatbin = nullptr;
  bool parsed = false, compressed = false;
  std::vector<Image> images;
};
struct Kernel {
  Module* module = nullptr;
  std::string name;
  int max_dynamic_shared = 48 * 1024;
};
Module* load_ptx(const char* text, std::string* error);
cudaError_t static_shared_memory(Kernel& kernel, unsigned* bytes);
cudaError_t max_threads(Kernel& kernel, unsigned* threads);
cudaError_t allow_dynamic_shared(Kernel& kernel, int bytes);
int active_blocks(size_t dynamic_shared);
cudaError_t launch(Kernel& kernel, dim3 grid, dim3 block, size_t shared, cudaStream_t stream, void** arguments);
void plant(const std::string& from, const std::string& to);  // a defect, in the PTX of every module loaded from now on
long planted();                                              // places changed
long launches();
const std::unordered_map<std::string, long>& launches_by_name();

}  // namespace virtual_gpu
