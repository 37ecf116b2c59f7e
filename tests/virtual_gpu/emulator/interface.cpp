// The C interface: ptx.h.
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "global_memory.h"
#include "parser.h"
#include "ptx.h"
#include "scheduler.h"

namespace emulator {

Options options;
Counters counters;

void fault(const char* format, ...) {
  char text[4096];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  throw Fault(text);
}

std::string Module::line(int number) const {
  constexpr size_t kLongest = 220;
  if (number < 1 || size_t(number) > lines.size()) return "";
  const char* begin = lines[number - 1];
  const std::string line = trimmed(std::string(begin, strcspn(begin, "\n")));
  return line.size() > kLongest ? line.substr(0, kLongest) + "..." : line;
}

namespace {

const std::pair<const char*, i64 Options::*> kOptions[] = {
    {"uninit", &Options::uninit},
    {"race", &Options::race},
    {"resident", &Options::resident},
    {"shuffle", &Options::shuffle},
    {"first", &Options::first},
    {"style", &Options::style},
    {"quantum", &Options::quantum},
    {"limit", &Options::limit},
    {"stall", &Options::stall},
    {"approx", &Options::approx},
    {"tma_tf32_round", &Options::tma_tf32_round},
    {"smem_limit", &Options::smem_limit},
};

Module& as_module(void* module) { return *static_cast<Module*>(module); }
Kernel* find_kernel(void* module, const char* name) {
  auto& kernels = as_module(module).kernels;
  const auto it = kernels.find(name);
  return it == kernels.end() ? nullptr : it->second.get();
}

void check_grid_and_block(const Kernel& kernel, const Launch& launch) {
  const u32 *grid = launch.grid, *block = launch.block;
  const u32 threads = launch.threads();
  if (threads == 0 || threads > 1024) fault("%u threads in a CTA", threads);
  if (kernel.max_threads && threads > kernel.max_threads)
    fault("%u threads, the kernel's .maxntid allows %u", threads, kernel.max_threads);
  if (kernel.exact_block && !std::equal(block, block + 3, kernel.block))
    fault("block (%u, %u, %u), the kernel requires (%u, %u, %u)", block[0], block[1], block[2], kernel.block[0],
          kernel.block[1], kernel.block[2]);
  if (!grid[0] || !grid[1] || !grid[2] || grid[0] > 0x7fffffff || grid[1] > 65535 || grid[2] > 65535)
    fault("grid (%u, %u, %u)", grid[0], grid[1], grid[2]);
}

u32 shared_limit(int target) {
  if (options.smem_limit) return u32(options.smem_limit);
  return (target >= 90 ? 227 : 163) * 1024;
}

void launch_kernel(Launch& launch, u32 dynamic_smem, const void* params, size_t params_size, u64 seed) {
  Kernel& kernel = *launch.kernel;
  if (!kernel.unsupported.empty())
    throw Fault("instructions that the emulator does not know: " + kernel.unsupported[0] + " (and " +
                std::to_string(kernel.unsupported.size() - 1) + " more)");
  check_grid_and_block(kernel, launch);
  if (params_size < kernel.param_bytes || params_size > kernel.param_bytes + 128)
    fault("%zu bytes of parameters, the kernel has %u", params_size, kernel.param_bytes);
  memcpy(kernel.param_buffer.data(), params, kernel.param_bytes);
  launch.smem_bytes = kernel.static_smem;
  if (dynamic_smem) launch.smem_bytes = u32(align_up(kernel.static_smem, 128)) + dynamic_smem;
  const u32 limit = shared_limit(launch.module->target);
  if (launch.smem_bytes > limit) fault("%u bytes of shared memory, the device allows %u", launch.smem_bytes, limit);
  launch.random_state = seed * 0x9E3779B97F4A7C15ull + 0x1234567;
  launch.random_state ^= launch.random_state >> 29;
  if (!launch.random_state) launch.random_state = 1;
  for (int i = 0; i < 8; ++i) launch.random();
  static const Style styles[] = {kLazy, kRandom, kEager};
  launch.style = options.style >= 0 ? Style(options.style) : styles[seed % 3];
  set_launch_device(launch.device);
  run(launch);
}

}  // namespace
}  // namespace emulator

using namespace emulator;

void* ptx_load(const char* text) {
  Module* module = new Module;
  module->text = text;
  const char* at = module->text.c_str();
  module->lines.push_back(at);
  for (; *at; ++at)
    if (*at == '\n') module->lines.push_back(at + 1);
  try {
    Parser(*module).parse();
  } catch (const std::exception& error) {
    module->error = error.what();
  }
  for (auto& variable : module->globals) ptx_allow(variable->storage.data(), variable->bytes, 1, -1);
  for (auto& [name, kernel] : module->kernels)  // generic pointers to parameters
    ptx_allow(kernel->param_buffer.data(), std::max(kernel->param_bytes, 1u), 0, -1);
  return module;
}

const char* ptx_error(void* module) { return as_module(module).error.c_str(); }

void ptx_free(void* module) {
  for (auto& variable : as_module(module).globals) ptx_forbid(variable->storage.data());
  for (auto& [name, kernel] : as_module(module).kernels) ptx_forbid(kernel->param_buffer.data());
  delete &as_module(module);
}

int ptx_launch(void* module, const char* kernel, int device, const uint32_t grid[3], const uint32_t block[3],
               uint32_t dynamic_smem, const void* params, size_t params_size, uint64_t seed) {
  Module& m = as_module(module);
  m.error.clear();
  try {
    Launch launch{};
    launch.module = &m;
    launch.kernel = find_kernel(module, kernel);
    if (!launch.kernel) fault("no kernel %s", kernel);
    launch.device = device;
    std::copy(grid, grid + 3, launch.grid);
    std::copy(block, block + 3, launch.block);
    launch_kernel(launch, dynamic_smem, params, params_size, seed);
    return 0;
  } catch (const std::exception& error) {
    m.error = error.what();
    return 1;
  }
}

void ptx_counters(uint64_t out[8]) {
  static_assert(sizeof(Counters) == 8 * sizeof(uint64_t));
  memcpy(out, &counters, sizeof counters);
}

int ptx_option(const char* name, int64_t value) {
  for (const auto& [known, member] : kOptions) {
    if (strcmp(known, name)) continue;
    options.*member = value;
    return 0;
  }
  return 1;
}

size_t ptx_kernels(void* module, char* out, size_t n) {
  std::string names;
  for (auto& [name, kernel] : as_module(module).kernels) names += name + "\n";
  if (n) out[names.copy(out, n - 1)] = 0;
  return names.size();
}

const char* ptx_unsupported(void* module, const char* kernel) {
  std::string& lines = as_module(module).unsupported;
  lines.clear();
  if (const Kernel* k = find_kernel(module, kernel))
    for (const std::string& instruction : k->unsupported) lines += instruction + "\n";
  return lines.c_str();
}

int64_t ptx_global(void* module, const char* name, size_t* bytes) {
  for (auto& variable : as_module(module).globals) {
    if (variable->name != name) continue;
    if (bytes) *bytes = variable->bytes;
    return reinterpret_cast<int64_t>(variable->storage.data());
  }
  return 0;
}

int ptx_param_layout(void* module, const char* kernel, uint32_t* offsets, uint32_t* sizes, uint32_t max) {
  const Kernel* k = find_kernel(module, kernel);
  if (!k) return -1;
  for (size_t i = 0; i < std::min<size_t>(max, k->params.size()); ++i) {
    offsets[i] = k->params[i].offset;
    sizes[i] = k->params[i].size;
  }
  return int(k->params.size());
}

int ptx_info(void* module, const char* kernel, ptx_kernel_info* out) {
  const Kernel* k = find_kernel(module, kernel);
  if (!k) return 1;
  const Module& m = as_module(module);
  *out = {k->max_threads ? k->max_threads : 1024, k->static_smem, k->param_bytes, u32(m.target), m.arch_specific};
  return 0;
}
