#include "global_memory.h"

#include <algorithm>

#include "ptx.h"

namespace emulator {
namespace {

struct Allocation {
  u64 begin, end;
  bool writable;
  int device;  // -1: every device
  bool holds(u64 address, u64 bytes) const { return address >= begin && address + bytes <= end; }
};

std::vector<Allocation> allocations;  // by their beginning
const Allocation kNone{1, 0, false, -1};
Allocation last_used = kNone;
int launch_device = 0;

bool begins_behind(u64 address, const Allocation& a) { return address < a.begin; }

// Allocations may overlap: a tensor's memory and a view of it.
const Allocation* find(u64 address, u64 bytes) {
  constexpr u64 kLargest = 1ull << 40;
  auto it = std::upper_bound(allocations.begin(), allocations.end(), address, begins_behind);
  const Allocation* other_device = nullptr;
  while (it != allocations.begin()) {
    --it;
    if (it->holds(address, bytes)) {
      if (it->device < 0 || it->device == launch_device) return &*it;
      other_device = &*it;
    }
    if (it->begin + kLargest < address) break;
  }
  return other_device;
}

std::string nearest(u64 address) {
  const Allocation* best = nullptr;
  u64 least = ~0ull;
  for (const Allocation& a : allocations) {
    const u64 distance = address < a.begin ? a.begin - address : address >= a.end ? address - a.end + 1 : 0;
    if (distance < least) least = distance, best = &a;
  }
  if (!best) return "there are none";
  char text[160];
  snprintf(text, sizeof text, "the nearest, %#lx, has %lu bytes; the access begins at its byte %ld", best->begin,
           best->end - best->begin, i64(address - best->begin));
  return text;
}

}  // namespace

void set_launch_device(int device) {
  launch_device = device;
  last_used = kNone;
}

u8* global_memory(u64 address, u64 bytes, bool write) {
  const char* access = write ? "write" : "read";
  if (!last_used.holds(address, bytes)) {
    const Allocation* a = find(address, bytes);
    if (!a)
      fault("global %s of %lu bytes at %#lx is outside the allocations (%s)", access, bytes, address,
            nearest(address).c_str());
    if (a->device >= 0 && a->device != launch_device)
      fault("global %s of %lu bytes at %#lx: the memory belongs to device %d, the kernel runs on device %d", access,
            bytes, address, a->device, launch_device);
    last_used = *a;
  }
  if (write && !last_used.writable)
    fault("global write of %lu bytes at %#lx into a read-only allocation", bytes, address);
  return reinterpret_cast<u8*>(address);
}

}  // namespace emulator

using namespace emulator;

void ptx_allow(const void* address, size_t bytes, int writable, int device) {
  const u64 begin = reinterpret_cast<u64>(address);
  last_used = kNone;
  for (Allocation& a : allocations) {
    if (a.begin == begin && a.end == begin + bytes && a.device == device) {
      a.writable |= writable != 0;
      return;
    }
  }
  allocations.insert(std::upper_bound(allocations.begin(), allocations.end(), begin, begins_behind),
                     {begin, begin + bytes, writable != 0, device});
}

void ptx_forbid(const void* address) {
  const u64 begin = reinterpret_cast<u64>(address);
  std::erase_if(allocations, [&](const Allocation& a) { return a.begin == begin; });
  last_used = kNone;
}
