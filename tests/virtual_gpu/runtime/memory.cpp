#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <map>

#include "../emulator/ptx.h"
#include "device.h"

namespace virtual_gpu {
namespace {

constexpr size_t kPage = 4096;
constexpr size_t kAlignment = 16;
constexpr size_t kFilled =
    size_t(256) << 20;  // a larger allocation stays zero, and takes memory only where it is touched

struct Block {
  char* mapping;
  size_t mapped, bytes;
  int device;
  std::weak_ptr<Graph> capture;  // during which it was allocated
};
std::map<uintptr_t, Block>& blocks() {
  static auto* m = new std::map<uintptr_t, Block>;
  return *m;
}
std::vector<void*>& deferred() {
  static auto* v = new std::vector<void*>;
  return *v;
}

std::map<uintptr_t, Block>::iterator containing(const void* p) {
  auto it = blocks().upper_bound(reinterpret_cast<uintptr_t>(p));
  if (it == blocks().begin()) return blocks().end();
  --it;
  const bool inside = reinterpret_cast<uintptr_t>(p) < it->first + std::max<size_t>(it->second.bytes, 1);
  return inside ? it : blocks().end();
}

void unmap(std::map<uintptr_t, Block>::iterator it) {
  ptx_forbid(reinterpret_cast<void*>(it->first));
  munmap(it->second.mapping, it->second.mapped);
  blocks().erase(it);
}

}  // namespace

void* allocate(size_t bytes) {
  Lock lock(mutex());
  const size_t body = (std::max<size_t>(bytes, 1) + kPage - 1) / kPage * kPage;
  const size_t mapped = body + 2 * kPage;
  void* mapping = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) return nullptr;
  char* first = static_cast<char*>(mapping);
  mprotect(first, kPage, PROT_NONE);
  mprotect(first + kPage + body, kPage, PROT_NONE);
  if (body < kFilled) memset(first + kPage, 0xFF, body);  // NaN in every floating-point type
  char* p = first + kPage + (settings().edge_first ? 0 : (body - bytes) / kAlignment * kAlignment);
  blocks()[reinterpret_cast<uintptr_t>(p)] = {first, mapped, bytes, current_device(), capture_under_way()};
  ptx_allow(p, bytes, 1, current_device());
  return p;
}

void release(void* pointer) {
  Lock lock(mutex());
  auto it = blocks().find(reinterpret_cast<uintptr_t>(pointer));
  if (it == blocks().end()) return;
  if (auto graph = it->second.capture.lock()) {  // a replay uses it
    graph->freed.push_back(pointer);
  } else if (work_is_pending()) {
    deferred().push_back(pointer);
  } else {
    unmap(it);
  }
}

void release_deferred() {
  std::vector<void*> pointers;
  pointers.swap(deferred());
  for (void* p : pointers) {
    auto it = blocks().find(reinterpret_cast<uintptr_t>(p));
    if (it != blocks().end()) unmap(it);
  }
}

int device_of(const void* p) {
  Lock lock(mutex());
  auto it = containing(p);
  return it == blocks().end() ? -1 : it->second.device;
}

bool set_read_only(void* pointer, bool read_only) {
  Lock lock(mutex());
  auto it = containing(pointer);
  if (it == blocks().end()) return false;
  void* first = reinterpret_cast<void*>(it->first);
  ptx_forbid(first);
  ptx_allow(first, it->second.bytes, !read_only, it->second.device);
  return true;
}

}  // namespace virtual_gpu
