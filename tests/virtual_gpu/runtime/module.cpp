#include <algorithm>
#include <cstring>

#include "../emulator/ptx.h"
#include "device.h"

namespace virtual_gpu {
namespace {

#pragma pack(push, 1)
struct FatbinHeader {
  uint32_t magic;
  uint16_t version, header_bytes;
  uint64_t bytes;
};
struct FatbinEntry {
  uint16_t kind, unknown;  // kind 1: PTX, 2: SASS
  uint32_t header_bytes;
  uint64_t bytes;
};
#pragma pack(pop)
constexpr uint32_t kFatbinMagic = 0xBA55ED50;

std::string planted_from, planted_to;
long places = 0, launched = 0;
std::unordered_map<std::string, long> by_name;

void parse(Module& module) {
  if (module.parsed) return;
  module.parsed = true;
  const char* p = static_cast<const char*>(module.fatbin);
  const auto* header = reinterpret_cast<const FatbinHeader*>(p);
  if (header->magic != kFatbinMagic) return;
  const char* end = p + header->header_bytes + header->bytes;
  p += header->header_bytes;
  while (p < end) {
    const auto* entry = reinterpret_cast<const FatbinEntry*>(p);
    if (entry->header_bytes == 0) break;
    if (entry->kind == 1) {
      std::string text(p + entry->header_bytes, strnlen(p + entry->header_bytes, entry->bytes));
      if (text.find(".version") == std::string::npos)
        module.compressed = true;
      else
        module.images.push_back({std::move(text)});
    }
    p += entry->header_bytes + entry->bytes;
  }
}

// As the driver: sm_90a's code on 9.0 alone, else the latest target that the device has reached.
Image* choose(Module& module) {
  parse(module);
  Image* best = nullptr;
  int best_rank = -1;
  for (Image& image : module.images) {
    const size_t at = image.ptx.find(".target sm_");
    if (at == std::string::npos) continue;
    const int target = atoi(image.ptx.c_str() + at + 11);
    const bool exact = image.ptx[image.ptx.find_first_not_of("0123456789", at + 11)] == 'a';
    const int capability = settings().capability;
    if (exact ? target != capability : target > capability) continue;
    if (target * 2 + exact > best_rank) best = &image, best_rank = target * 2 + exact;
  }
  return best;
}

void load(Image& image) {
  if (image.loaded) return;
  std::string text = image.ptx;
  if (!planted_from.empty())
    for (size_t at = 0; (at = text.find(planted_from, at)) != std::string::npos; at += planted_to.size(), ++places)
      text.replace(at, planted_from.size(), planted_to);
  image.loaded = ptx_load(text.c_str());
}

cudaError_t resolve(Kernel& kernel, Image** image, ptx_kernel_info* info) {
  *image = choose(*kernel.module);
  if (!*image)
    return fail(cudaErrorNoKernelImageForDevice, "no PTX%s of %s for compute capability %d.%d",
                kernel.module->compressed ? " that is not compressed" : "", kernel.name.c_str(),
                settings().capability / 10, settings().capability % 10);
  load(**image);
  if (ptx_info((*image)->loaded, kernel.name.c_str(), info)) {
    const char* why = ptx_error((*image)->loaded);
    return fail(cudaErrorInvalidDeviceFunction, "%s: %s", kernel.name.c_str(), *why ? why : "not in the PTX");
  }
  return cudaSuccess;
}

cudaError_t check(const Kernel& kernel, const ptx_kernel_info& info, dim3 grid, dim3 block, size_t shared) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 2147483647u || grid.y > 65535 || grid.z > 65535)
    return fail(cudaErrorInvalidConfiguration, "%s: grid %u x %u x %u", kernel.name.c_str(), grid.x, grid.y, grid.z);
  const unsigned threads = block.x * block.y * block.z;
  if (threads == 0 || threads > 1024 || block.z > 64)
    return fail(cudaErrorInvalidConfiguration, "%s: a block of %u threads", kernel.name.c_str(), threads);
  if (info.max_threads && threads > info.max_threads)
    return fail(cudaErrorInvalidValue, "%s: a block of %u threads, .maxntid is %u", kernel.name.c_str(), threads,
                info.max_threads);
  const size_t without_asking = 48 * 1024 - std::min<size_t>(info.static_smem, 48 * 1024);
  const size_t allowed = kernel.max_dynamic_shared > 48 * 1024 ? size_t(kernel.max_dynamic_shared) : without_asking;
  if (shared > allowed || shared + info.static_smem > size_t(shared_memory_optin()))
    return fail(cudaErrorInvalidValue, "%s: %zu B of dynamic and %u B of static shared memory, %zu B allowed",
                kernel.name.c_str(), shared, info.static_smem, allowed);
  return cudaSuccess;
}

std::vector<char> pack(void* module, const Kernel& kernel, const ptx_kernel_info& info, void** arguments) {
  std::vector<uint32_t> offsets(1024), sizes(1024);
  const int count = ptx_param_layout(module, kernel.name.c_str(), offsets.data(), sizes.data(), 1024);
  std::vector<char> block(info.param_bytes);
  for (int i = 0; i < count; ++i) memcpy(block.data() + offsets[i], arguments[i], sizes[i]);
  return block;
}

}  // namespace

Module* load_ptx(const char* text, std::string* error) {
  Lock lock(mutex());
  auto* module = new Module;
  module->parsed = true;
  module->images.push_back({text});
  load(module->images[0]);
  *error = ptx_error(module->images[0].loaded);
  return module;
}

cudaError_t static_shared_memory(Kernel& kernel, unsigned* bytes) {
  Lock lock(mutex());
  Image* image;
  ptx_kernel_info info;
  if (const cudaError_t error = resolve(kernel, &image, &info)) return error;
  *bytes = info.static_smem;
  return cudaSuccess;
}

cudaError_t max_threads(Kernel& kernel, unsigned* threads) {
  Lock lock(mutex());
  Image* image;
  ptx_kernel_info info;
  if (const cudaError_t error = resolve(kernel, &image, &info)) return error;
  *threads = info.max_threads ? info.max_threads : 1024;
  return cudaSuccess;
}

cudaError_t allow_dynamic_shared(Kernel& kernel, int bytes) {
  unsigned fixed;
  if (const cudaError_t error = static_shared_memory(kernel, &fixed)) return error;
  if (bytes < 0 || bytes + int(fixed) > shared_memory_optin())
    return fail(cudaErrorInvalidValue, "%s: %d B of dynamic shared memory", kernel.name.c_str(), bytes);
  kernel.max_dynamic_shared = bytes;
  return cudaSuccess;
}

int active_blocks(size_t dynamic_shared) {
  return std::clamp<int>(shared_memory_per_multiprocessor() / int(dynamic_shared + 1024), 0, 32);
}

cudaError_t launch(Kernel& kernel, dim3 grid, dim3 block, size_t shared, cudaStream_t stream, void** arguments) {
  Lock lock(mutex());
  Image* image;
  ptx_kernel_info info;
  if (const cudaError_t error = resolve(kernel, &image, &info)) return error;
  if (const cudaError_t error = check(kernel, info, grid, block, shared)) return error;
  ++launched;
  ++by_name[kernel.name];
  trace("%.100s, grid %u x %u x %u, block %u, %zu B shared, stream %p", kernel.name.c_str(), grid.x, grid.y, grid.z,
        block.x * block.y * block.z, shared, static_cast<void*>(stream));
  void* module = image->loaded;
  auto parameters = pack(module, kernel, info, arguments);
  const uint64_t seed = settings().seed * 1000003 + uint64_t(launched);
  const int device = current_device();
  return submit(stream_of(stream), [=, name = kernel.name] {
    const uint32_t g[3] = {grid.x, grid.y, grid.z}, b[3] = {block.x, block.y, block.z};
    // a GEMM's blocks may wait for one another: a whole wave of them is resident, as on a device
    const bool waits = name.find("GemmUniversal") != std::string::npos;
    ptx_option("resident", waits ? settings().multiprocessors : 2);
    ptx_option("smem_limit", shared_memory_optin());
    if (ptx_launch(module, name.c_str(), device, g, b, uint32_t(shared), parameters.data(), parameters.size(), seed))
      return fail(cudaErrorIllegalAddress, "the emulator: %s", ptx_error(module));
    return cudaSuccess;
  });
}

void plant(const std::string& from, const std::string& to) {
  Lock lock(mutex());
  planted_from = from;
  planted_to = to;
}
long planted() { return places; }
long launches() { return launched; }
const std::unordered_map<std::string, long>& launches_by_name() { return by_name; }

}  // namespace virtual_gpu
