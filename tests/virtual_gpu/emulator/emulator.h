// The emulator's types: decoded kernels, and the warps and CTAs (thread blocks) that run them.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace emulator {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using i8 = int8_t;
using i16 = int16_t;
using i32 = int32_t;
using i64 = int64_t;

constexpr int kWarpSize = 32;

// What ends a launch or refuses an instruction: becomes the text of ptx_error.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};
[[noreturn]] __attribute__((format(printf, 1, 2))) void fault(const char* format, ...);

enum Style {
  kEager,
  kRandom,
  kLazy
};  // when asynchronous copies and wgmma take effect: at once, any time, at the wait

struct Options {
  i64 uninit = 1;          // reading shared memory that was never written is an error
  i64 race = 1;            // races in shared memory are errors
  i64 resident = 2;        // CTAs that run interleaved; more for kernels whose CTAs wait for one another
  i64 shuffle = 0;         // CTAs start in random order
  i64 first = 0;           // the first CTA that runs; negative: only so many of the last ones
  i64 style = -1;          // a Style; -1: by the seed
  i64 quantum = 512;       // instructions that a warp runs at most before another may
  i64 limit = 4000000000;  // warp instructions that a launch may take
  i64 stall = 200000000;   // ... without a barrier, an mbarrier's phase or a warp's end
  i64 approx = 0;          // not 0: .approx and div.full are off in their last place, by this salt
  i64 tma_tf32_round = 1;  // tensor maps of TFLOAT32 round what they load
  i64 smem_limit = 0;      // bytes of shared memory that a CTA may have; 0: by the kernel's target
};
extern Options options;

struct Counters {  // in ptx_counters' order
  u64 warp_instructions, thread_instructions, bytes_loaded, bytes_stored, mma, bulk_copies, ctas, barriers;
};
extern Counters counters;

// Addresses of generic pointers: shared and local memory lie in windows, everything else is global (host) memory.
constexpr u64 kSharedWindow = 0xF000000000000000, kLocalWindow = 0xE000000000000000;
constexpr u32 kSharedBase = 1024;  // the address of a CTA's first byte of shared memory

// A virtual register: 32 lanes of `width` bytes at byte `slot` of a warp's register file. A predicate (width 1) is one
// word with a bit a lane.
struct Register {
  int slot = -1;
  u8 width = 0;
  bool exists() const { return slot >= 0; }
};

enum class Space : u8 { kGeneric, kGlobal, kShared, kLocal, kParam };
enum class Type : u8 { kU8, kS8, kU16, kS16, kU32, kS32, kU64, kS64, kF16, kBF16, kF32, kF64, kTF32, kNone };
enum class Rounding : u8 { kNearest, kZero, kDown, kUp, kNearestAway };
enum class Combine : u8 { kNone, kAnd, kOr, kXor };  // of setp with a predicate, of bar.red (kNone: popc)
enum class AtomicOp : u8 { kAdd, kMin, kMax, kExchange, kCompareAndSwap, kAnd, kOr, kXor, kIncrement, kDecrement };
enum class MbarrierOp : u8 { kInit, kInvalidate, kArrive, kArriveExpect, kExpect, kComplete, kWait, kWaitParity };

// What an instruction's family keeps besides its registers: each handler reads its own.
struct MemoryAccess {
  Space space;
  u8 bytes;     // of an element
  bool sign;    // extends the sign
  bool words;   // elements and registers are of 32 bits
  bool yields;  // volatile, acquire, relaxed: another warp's turn comes after it
};
struct Atomic {
  Space space;
  u8 bytes;
  AtomicOp operation;
  Type type;
};
struct Conversion {
  Type to, from;
  Rounding rounding;
  bool to_integral;  // .rni, .rzi, .rmi, .rpi
  Rounding integral;
  bool saturate, ftz, relu;
};
struct Comparison {
  Combine combine;
  bool ftz;
};
struct FunnelShift {
  bool left, wrap;
};
struct CtaBarrier {
  bool arrive, reduces;
  Combine reduction;
};
struct MatrixMove {  // ldmatrix, stmatrix
  u8 count;
  bool transposed;
};
struct MatrixMultiply {
  Type type;
  u16 n, k;
  bool a_in_registers, a_transposed, b_transposed;  // wgmma
  float scale;                                      // 1 or -1, wgmma
  bool accumulates;                                 // wgmma whose scale-d is an immediate
};
struct BulkCopy {
  bool tensor, im2col;
  u8 rank;
};
struct GroupWait {
  i32 pending;      // groups that may stay in flight; -1: not even copies without a group
  bool reads_only;  // cp.async.bulk.wait_group.read
};

struct Context;
struct Instruction;
using Handler = void (*)(Context&, const Instruction&, u32 mask);

struct Instruction {
  Handler run = nullptr;
  Register guard;  // @p
  bool guard_negated = false;
  bool collective = false;  // all live lanes, or those of member_mask, execute it together
  Register member_mask;
  Register d, a, b, c, e;  // operands in the PTX manual's order
  Register p;              // a predicate beside them: d|p, setp's second result, wgmma's scale-d, cp.async's ignore-src
  bool a_negated = false, b_negated = false, c_negated = false;  // !p
  i64 offset = 0;                                                // added to the address a
  i32 b_offset = 0, c_offset = 0;                                // added to the addresses b and c
  int list = 0, list_size = 0;                                   // registers in Kernel::lists
  int target = -1;                                               // of a branch
  int line = 0;
  union {
    u8 table;  // lop3
    MemoryAccess memory{};
    Atomic atomic;
    Conversion conversion;
    Comparison comparison;
    FunnelShift funnel;
    CtaBarrier barrier;
    MbarrierOp mbarrier;
    MatrixMove matrix;
    MatrixMultiply mma;
    BulkCopy bulk;
    GroupWait wait;
    u8 copy_bytes;  // cp.async
  };
};

struct Param {
  std::string name;
  u32 offset, size;
};

// Storage whose start is aligned to 128 bytes; its address never changes.
class AlignedBytes {
 public:
  void allocate(size_t bytes) { storage_.assign(bytes / 8 + 18, 0); }
  u8* data() { return reinterpret_cast<u8*>((reinterpret_cast<u64>(storage_.data()) + 127) / 128 * 128); }

 private:
  std::vector<u64> storage_;
};

struct Kernel {
  std::string name;
  std::vector<Param> params;
  u32 param_bytes = 0;
  AlignedBytes param_buffer;  // where ld.param reads
  std::vector<Instruction> code;
  std::vector<Register> lists;
  std::vector<u8> initial_registers;               // a warp's register file as it starts: constants and garbage
  std::vector<std::pair<Register, int>> specials;  // %tid.x ..., by index into special_registers
  std::vector<std::string> unsupported;
  u32 max_threads = 0, local_bytes = 0, static_smem = 0;
  bool exact_block = false;  // .reqntid
  u32 block[3] = {0, 0, 0};
  bool async_proxy = false;  // wgmma or bulk copies read shared memory
};

struct GlobalVariable {
  std::string name;
  size_t bytes;
  AlignedBytes storage;
};

struct Module {
  std::string text, error, unsupported;  // unsupported: ptx_unsupported's last answer
  std::vector<const char*> lines;        // where each begins
  std::map<std::string, std::unique_ptr<Kernel>> kernels;
  std::vector<std::unique_ptr<GlobalVariable>> globals;
  int target = 0;
  bool arch_specific = false;  // sm_90a
  std::string line(int number) const;
};

struct TensorMap {  // our own layout of the 128 bytes of a CUtensorMap
  u32 magic;
  u8 im2col, data_type, rank, swizzle;
  u64 reserved;  // callers clear bit 21 of the second word: a workaround for real drivers
  u64 address;
  u32 last[5];  // the dimensions, less 1
  u64 strides[4];
  u16 box[5];
  u8 element_strides[5];
  i16 lower[3], upper[3];
  u16 channels, pixels;
};
static_assert(sizeof(TensorMap) <= 128);

struct AsyncCopy {  // a warp's cp.async, in flight
  u32 mask;
  u8 bytes;
  bool landed = false;
  int line;
  u32 to[32];
  u64 from[32];
  u8 source_bytes[32];
  u32 group[32];
};

struct Wgmma {  // in flight
  const Instruction* instruction;
  u64 a_descriptor, b_descriptor;
  bool accumulates;
  u32 group;
  bool done = false, closed = false;  // closed: a warp of its warpgroup has waited for it
};

struct BulkTransfer {  // a bulk copy (TMA), in flight
  bool store = false, tensor = true;
  bool read = false, released = false,
       written = false;  // of a store: shared memory was read, may be reused, and it landed
  TensorMap map;
  i32 coordinates[5] = {};
  u32 offsets[3] = {};
  u32 shared = 0, bytes = 0, mbarrier = 0;
  u64 global = 0;
  int warp = 0, lane = 0, line = 0;
  u32 group = 0;
  std::vector<u8> data;
  std::vector<u32> clock;  // of the issuing warp
};

// Vector clocks: one entry a warp, then one an mbarrier, which stands for the bulk copies that complete on it.
using Clock = std::vector<u32>;
constexpr u32 kClockEntries = 256;
void merge(Clock& into, const Clock& from);

struct Mbarrier {
  u32 address = 0, phase = 0;
  i32 expected = 0, pending = 0;  // arrivals
  i64 pending_bytes = 0;
  bool valid = false;
  Clock arrived, completed;  // of what arrived so far, and as the last phase completed
};

struct Barrier {  // bar.sync's
  u32 arrived = 0, expected = 0;
  std::vector<int> waiting;  // warps
  bool all = true, any = false;
  u32 count = 0;
  Clock clock;
};

enum class State { kRuns, kAtBarrier, kSleeps, kDone };

struct Unfenced {  // shared memory that st.shared or cp.async wrote: the asynchronous proxy doesn't see it before a
                   // fence
  u32 begin, end;
  u64 epoch;
};

struct Cta;

struct Warp {
  Cta* cta = nullptr;
  int index = 0;
  u8* registers = nullptr;
  u32 pc = 0, active = 0, live = 0;  // active: the lanes that run at pc
  u32 parked = 0;                    // lanes that wait for others at a collective instruction
  u32 lane_pc[32];                   // of the lanes that aren't active
  bool diverged = false;
  u32 other_pc = ~0u;  // the lowest of lanes that are neither active nor parked
  State state = State::kRuns;
  const Instruction* barrier = nullptr;  // where it waits
  bool yielded = false;
  std::vector<AsyncCopy> copies;
  u32 copy_group[32] = {};
  std::vector<Wgmma> wgmmas;
  u32 wgmma_group = 0;
  u32 bulk_group[32] = {};
  std::vector<Unfenced> unfenced;
  u64 synchronised = 0;  // the epoch before which other warps' writes are known
  std::vector<u8> local;
  Clock clock;
};

struct Launch {
  Module* module;
  Kernel* kernel;
  int device;
  u32 grid[3], block[3], smem_bytes;
  Style style;
  u64 random_state;
  u64 executed = 0, progress = 0;  // warp instructions, in all and when something last completed
  u32 random();
  u32 threads() const { return block[0] * block[1] * block[2]; }
};

struct Cta {
  Launch* launch;
  u32 id[3];
  u64 linear_id;
  u32 smem_bytes;
  std::vector<u8> smem, shadow;  // shadow: Shadow bits of each byte
  std::vector<Warp> warps;
  Barrier barriers[16];
  std::vector<Mbarrier> mbarriers;
  std::vector<BulkTransfer> transfers;
  AlignedBytes register_files;
  int live_warps = 0;
  u64 epoch = 1;                 // grows with each synchronisation
  std::vector<u32> write_clock;  // of each 4 bytes: clock entry << 24 | time of the last write; 0: none
  std::vector<u32> read_clock;   // of each 4 bytes and warp: time of its last read
  void made_progress() { launch->progress = launch->executed; }
  void wake();  // the warps that sleep look again
};

struct Context {  // of a warp while it runs
  u8* registers;
  Warp& warp;
  Cta& cta;
  Launch& launch;
  u32 next_pc;  // kRegroup: the lanes went separate ways
  u32 active;
  const Register* list(const Instruction& op) const { return launch.kernel->lists.data() + op.list; }
};
constexpr u32 kRegroup = ~0u;

}  // namespace emulator
