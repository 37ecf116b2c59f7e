#include <algorithm>
#include <map>
#include <random>

#include "device.h"

namespace virtual_gpu {
namespace {

constexpr size_t kLongest = 64;  // pending launches of a stream

std::vector<Stream*>& streams() {
  static auto* all = new std::vector<Stream*>;
  return *all;
}
uint64_t pending = 0;  // in all streams

bool runs_at_once() {  // drawn, as a device is fast or slow
  static std::minstd_rand random(unsigned(settings().seed) * 7919 + 1);
  return settings().blocking || random() % 2;
}

}  // namespace

Graph::~Graph() {
  for (void* p : freed) release(p);
}

Stream* new_stream() {
  Lock lock(mutex());
  streams().push_back(new Stream{.device = current_device()});
  return streams().back();
}

Stream& stream_of(cudaStream_t handle) {
  static auto* defaults = new std::map<int, Stream*>;
  if (handle != nullptr && handle != cudaStreamLegacy && handle != cudaStreamPerThread)
    return *reinterpret_cast<Stream*>(handle);
  Lock lock(mutex());
  Stream*& stream = (*defaults)[current_device()];
  if (!stream) stream = new_stream();
  return *stream;
}

cudaError_t submit(Stream& stream, Work work) {
  Lock lock(mutex());
  if (stream.device != current_device())
    return fail(cudaErrorInvalidResourceHandle, "a stream of device %d is used on device %d", stream.device,
                current_device());
  if (stream.capture) {
    stream.capture->nodes.push_back({std::move(work)});
    return cudaSuccess;
  }
  stream.pending.push_back(std::move(work));
  ++stream.submitted;
  ++pending;
  return stream.pending.size() > kLongest || runs_at_once() ? drain(stream) : cudaSuccess;
}

cudaError_t drain_until(Stream& stream, uint64_t position) {
  Lock lock(mutex());
  cudaError_t first = cudaSuccess;
  while (stream.done < position && !stream.pending.empty()) {
    Work work = std::move(stream.pending.front());
    stream.pending.pop_front();
    ++stream.done;
    const cudaError_t error = work();
    --pending;
    if (first == cudaSuccess) first = error;
  }
  if (pending == 0) release_deferred();
  return first;
}

cudaError_t drain(Stream& stream) { return drain_until(stream, stream.submitted); }

cudaError_t drain_all() {
  Lock lock(mutex());
  cudaError_t first = cudaSuccess;
  for (Stream* stream : streams()) {
    const cudaError_t error = drain(*stream);
    if (first == cudaSuccess) first = error;
  }
  return first;
}

bool work_is_pending() { return pending > 0; }

cudaError_t synchronize(Stream& stream) {
  Lock lock(mutex());
  if (!stream.capture) return drain(stream);
  stream.capture->invalid = true;
  return fail(cudaErrorStreamCaptureUnsupported, "a synchronisation inside a capture");
}

std::shared_ptr<Graph> capture_under_way() {
  for (Stream* stream : streams())
    if (stream->capture) return stream->capture;
  return nullptr;
}

std::shared_ptr<Graph> end_capture(Stream& stream) {
  const std::shared_ptr<Graph> graph = stream.capture;
  if (graph) graph->ended = true;
  for (Stream* s : streams())
    if (s->capture == graph) s->capture = nullptr;
  return graph;
}

cudaError_t replay(const Graph& graph, Stream& stream) {
  cudaError_t error = drain(stream);
  for (const Node& node : graph.nodes) {
    if (error != cudaSuccess) break;
    if (node.python) {
      error = node.work();
    } else {
      Lock lock(mutex());
      error = node.work();
    }
  }
  return error;
}

}  // namespace virtual_gpu
