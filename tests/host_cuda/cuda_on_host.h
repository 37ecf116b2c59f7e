// Runs CUDA kernels on the CPU. Every thread of a block is a fiber; the order of blocks and threads is drawn anew from
// a seed wherever threads wait for each other, and shared memory holds NaN when a block starts. A launch ends with a
// message where a thread leaves its memory, where a shared array is indexed beyond its end (with -fsanitize=bounds) and
// where threads wait in vain. fp16 and bf16 are the toolkit's, in their host form. One library is one set of kernels:
// compile with -fno-gnu-unique, and include this before the kernels.
#pragma once

#include <link.h>
#include <setjmp.h>
#include <signal.h>
#include <ucontext.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __forceinline__
#undef __launch_bounds__
#define __global__
#define __device__
#define __host__
#define __shared__ static thread_local  // one block runs at a time, on one thread: its shared memory is our TLS segment
#define __forceinline__ inline
#define __launch_bounds__(...)

#include <cuda_bf16.h>
#include <cuda_fp16.h>

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace host_cuda {

constexpr int kWarpSize = 32;
constexpr size_t kStackBytes = 64 * 1024;

enum class State { kReady, kAtBarrier, kInWarp, kDone };

struct Fiber {
  std::unique_ptr<char[]> stack;
  jmp_buf resume;
  State state;
  int line;  // of the barrier that it waits at
};

struct Warp {
  unsigned arrived;
  int phase;
  uint64_t values[2][kWarpSize];  // by the phase's parity: a lane may be one exchange ahead
};

struct Machine {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::function<void()> kernel;
  std::mt19937 random;
  jmp_buf scheduler;
  int current = -1;  // the running fiber
  char fault[256];   // empty: none
};
inline Machine machine;
inline thread_local char first_of_tls;

// From a fiber to the scheduler; comes back when it is resumed.
[[gnu::noinline]] inline void leave(State state) {
  Fiber& fiber = machine.fibers[machine.current];
  fiber.state = state;
  if (_setjmp(fiber.resume) == 0) _longjmp(machine.scheduler, 1);
}

[[noreturn]] inline void fail(const char* what) {
  snprintf(machine.fault, sizeof machine.fault, "block %u, thread %u: %s", blockIdx.x, threadIdx.x, what);
  _longjmp(machine.scheduler, 1);
}

inline void fiber_main() {
  for (;;) {
    leave(State::kDone);
    machine.kernel();
  }
}

[[gnu::noinline]] inline void start(Fiber& fiber) {
  ucontext_t context;
  getcontext(&context);
  fiber.stack.reset(new char[kStackBytes]);
  context.uc_stack.ss_sp = fiber.stack.get();
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, fiber_main, 0);
  if (_setjmp(machine.scheduler) == 0) setcontext(&context);
}

[[gnu::noinline]] inline void resume(int thread) {
  machine.current = thread;
  threadIdx.x = thread;
  if (_setjmp(machine.scheduler) == 0) _longjmp(machine.fibers[thread].resume, 1);
  machine.current = -1;
}

inline void on_signal(int signal, siginfo_t* info, void*) {
  if (machine.current < 0) {  // not a kernel's
    ::signal(signal, SIG_DFL);
    return;
  }
  char what[64] = "an index is beyond the end of its array";
  if (signal == SIGSEGV || signal == SIGBUS) snprintf(what, sizeof what, "no access to address %p", info->si_addr);
  fail(what);
}

// While it lives, what a kernel does wrong ends the launch and not the process.
class Signals {
 public:
  Signals() {
    struct sigaction action = {};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    for (int i = 0; i < 4; ++i) sigaction(kSignals[i], &action, &before_[i]);
  }
  ~Signals() {
    for (int i = 0; i < 4; ++i) sigaction(kSignals[i], &before_[i], nullptr);
  }

 private:
  static constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP};
  struct sigaction before_[4];
};

struct SharedMemory {
  void* data = nullptr;
  size_t bytes = 0;
};

// This library's TLS segment.
inline int find_shared_memory(dl_phdr_info* library, size_t, void* found) {
  const uintptr_t here = reinterpret_cast<uintptr_t>(&machine);
  bool ours = false;
  for (int i = 0; i < library->dlpi_phnum; ++i) {
    const ElfW(Phdr) & header = library->dlpi_phdr[i];
    const uintptr_t begin = library->dlpi_addr + header.p_vaddr;
    ours |= header.p_type == PT_LOAD && here >= begin && here < begin + header.p_memsz;
  }
  for (int i = 0; ours && i < library->dlpi_phnum; ++i) {
    const ElfW(Phdr) & header = library->dlpi_phdr[i];
    if (header.p_type == PT_TLS) *static_cast<SharedMemory*>(found) = {library->dlpi_tls_data, header.p_memsz};
  }
  return ours;
}

// False where threads wait for others that never come, or at different barriers; true after opening a barrier.
inline bool open_barrier(int* live) {
  int line = 0;
  *live = 0;
  for (const Fiber& fiber : machine.fibers) {
    if (fiber.state == State::kDone) continue;
    ++*live;
    if (fiber.state != State::kAtBarrier || (line != 0 && fiber.line != line)) return false;
    line = fiber.line;
  }
  for (Fiber& fiber : machine.fibers) {
    if (fiber.state == State::kAtBarrier) fiber.state = State::kReady;
  }
  return true;
}

inline void run_block() {
  std::vector<int> order(machine.fibers.size());
  std::iota(order.begin(), order.end(), 0);
  for (Fiber& fiber : machine.fibers) fiber.state = State::kReady;
  std::fill(machine.warps.begin(), machine.warps.end(), Warp{});
  for (int live = 1; live > 0;) {
    bool progress = false;
    std::shuffle(order.begin(), order.end(), machine.random);
    for (const int thread : order) {
      if (machine.fibers[thread].state != State::kReady) continue;
      progress = true;
      resume(thread);
      if (machine.fault[0] != 0) return;
    }
    if (!progress && !open_barrier(&live)) {
      snprintf(machine.fault, sizeof machine.fault, "block %u: not every thread reaches the same barrier or exchange",
               blockIdx.x);
      return;
    }
  }
}

// Runs blocks first_block to blocks - 1. What went wrong, until the next launch, or null.
template <typename Params>
const char* run_on_host(void (*kernel)(Params), int64_t blocks, int threads, const Params& params, unsigned seed,
                        int64_t first_block = 0) {
  const Signals signals;
  if (machine.fault[0] != 0 || static_cast<int>(machine.fibers.size()) != threads) {
    machine.fault[0] = 0;
    machine.fibers.clear();
    machine.fibers.resize(threads);
    machine.warps.resize((threads + kWarpSize - 1) / kWarpSize);
    for (machine.current = 0; machine.current < threads; ++machine.current) start(machine.fibers[machine.current]);
    machine.current = -1;
  }
  machine.kernel = [&] { kernel(params); };
  machine.random.seed(seed);
  blockDim = dim3(threads);
  gridDim = dim3(static_cast<unsigned>(blocks));
  first_of_tls = 1;  // it is allocated at its first use
  SharedMemory shared;
  dl_iterate_phdr(find_shared_memory, &shared);
  std::vector<int64_t> order(blocks - first_block);
  std::iota(order.begin(), order.end(), first_block);
  std::shuffle(order.begin(), order.end(), machine.random);
  for (const int64_t block : order) {
    memset(shared.data, 0xff, shared.bytes);
    blockIdx.x = static_cast<unsigned>(block);
    run_block();
    if (machine.fault[0] != 0) return machine.fault;
  }
  return nullptr;
}

inline void barrier(int line) {
  machine.fibers[machine.current].line = line;
  leave(State::kAtBarrier);
}

// Every lane's value, when all lanes of the warp have come.
inline const uint64_t* exchange(unsigned mask, uint64_t value) {
  if (mask != 0xffffffffu) fail("only exchanges of whole warps are supported");
  const int first = machine.current / kWarpSize * kWarpSize;
  Warp& warp = machine.warps[first / kWarpSize];
  const uint64_t* values = warp.values[warp.phase & 1];
  warp.values[warp.phase & 1][machine.current - first] = value;
  warp.arrived |= 1u << (machine.current - first);
  if (warp.arrived != mask) {
    leave(State::kInWarp);
    return values;
  }
  warp.arrived = 0;
  ++warp.phase;
  for (int i = first; i < first + kWarpSize; ++i) {
    if (i != machine.current) machine.fibers[i].state = State::kReady;
  }
  return values;
}

inline int lane() { return machine.current % kWarpSize; }

template <typename T>
T shuffle(unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "a lane hands over up to 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = exchange(mask, bits)[source];
  memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace host_cuda

#define __syncthreads() host_cuda::barrier(__LINE__)

inline void __syncwarp(unsigned mask = 0xffffffffu) { host_cuda::exchange(mask, 0); }

template <typename T>
T __shfl_sync(unsigned mask, T value, int source) {
  return host_cuda::shuffle(mask, value, source % host_cuda::kWarpSize);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return host_cuda::shuffle(mask, value, host_cuda::lane() ^ bits);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, int delta) {
  const int source = host_cuda::lane() + delta;
  return host_cuda::shuffle(mask, value, source < host_cuda::kWarpSize ? source : host_cuda::lane());
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const uint64_t* values = host_cuda::exchange(mask, predicate != 0);
  unsigned ballot = 0;
  for (int i = 0; i < host_cuda::kWarpSize; ++i) ballot |= static_cast<unsigned>(values[i]) << i;
  return ballot;
}
