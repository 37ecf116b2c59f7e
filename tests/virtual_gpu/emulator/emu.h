// Shared declarations of the emulator: decoded instructions, warps, CTAs.
#pragma once
#include "ptx.h"
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

typedef uint8_t u8; typedef uint16_t u16; typedef uint32_t u32; typedef uint64_t u64;
typedef int8_t s8; typedef int16_t s16; typedef int32_t s32; typedef int64_t s64;

struct Fault : std::runtime_error { using std::runtime_error::runtime_error; };
[[noreturn]] __attribute__((format(printf, 1, 2))) void fault(const char* format, ...);

struct Ctx; struct Ins; struct Warp; struct Cta; struct Func; struct Module; struct Launch;
typedef void (*Fn)(Ctx&, const Ins&, u32 mask);

struct Opd { int slot; u8 w; };  // where a register's 32 lanes lie in a warp's register file, and its bytes a lane

struct Ins {
  Fn fn = nullptr;
  int pred = -1;
  bool neg = false;
  bool coll = false;      // every live lane (or those of `member`) takes part
  int member = -1;        // slot of the member mask
  bool pair_p = false;
  int d = -1, a = -1, b = -1, c = -1, e = -1, p = -1;  // slots
  u8 wd = 0, wa = 0, wb = 0, wc = 0;
  int k[8] = {};          // small integers that a handler wants
  s64 imm = 0;            // address offset
  int vo = 0, vn = 0;     // operand list in Func::pool
  int target = -1;
  int line = 0;
};

struct Param { std::string name; u32 offset, size, align; };

struct Func {
  std::string name;
  std::vector<Param> params;
  u32 param_bytes = 0;
  std::vector<u64> param_buffer;        // the parameters at launch: a fixed host address
  std::vector<Ins> code;
  std::vector<Opd> pool;
  std::vector<u8> image;                // a warp's register file as it starts
  std::vector<std::pair<int, int>> specials;  // (slot, which)
  std::vector<std::string> unsupported;
  u32 max_threads = 0, local_bytes = 0, static_smem = 0;
  bool reqntid = false;
  u32 req[3] = {0, 0, 0};
  bool async_proxy = false;
  int sm = 0;
};

struct Global { std::string name; std::vector<u64> storage; size_t bytes; u8* at; };

struct Module {
  std::string text, error, unsupported; bool arch_specific = false;
  std::vector<const char*> lines;       // starts
  std::map<std::string, std::unique_ptr<Func>> funcs;
  std::vector<std::unique_ptr<Global>> globals;
  u32 static_smem = 0, smem_align = 16;
  int sm = 0;
  std::string line(int n) const;
};

struct TensorMap {                      // our own layout of the 128 bytes of a CUtensorMap
  u32 magic;
  u8 im2col, dtype, rank, swizzle;
  u64 reserved;                         // callers clear bit 21 of the second word: a workaround for real drivers
  u64 address;
  u32 dims[5];                          // less 1
  u64 strides[4];
  u16 box[5];
  u8 estride[5];
  u8 interleave;
  s16 lower[3], upper[3];
  u16 channels, pixels;
  u8 oobfill, pad[3];
};
static_assert(sizeof(TensorMap) <= 128);

struct CpAsync { u32 mask; u32 dst[32]; u64 src[32]; u8 size; u8 src_size[32]; u32 group[32]; int line; };

struct WgOp { const Ins* ins; u64 desc_a, desc_b; bool scale_d, done; u32 group; bool closed = false; };  // closed: waited for by a warp of the group

struct Bulk {                           // TMA, in flight
  bool store = false, read_done = false, tensor = true, released = false, written = false;
  TensorMap map; u64 map_address = 0;
  s32 coord[5] = {}; u32 offset[3] = {};
  u32 smem = 0, bytes = 0, mbar = 0;
  u64 global = 0;
  int warp = 0, lane = 0; u32 group = 0; int line = 0;
  std::vector<u8> data;
  std::vector<u32> clock;
};

struct MBar { u32 address; s32 expected, pending; s64 tx; u32 phase; bool valid; std::vector<u32> clock; };

enum State { RUN, BAR, SLEEP, DONE };

struct Warp {
  Cta* cta; int index; u8* R;
  u32 pc = 0, mask = 0, live = 0, parked = 0;
  u32 lpc[32];
  bool div = false; u32 other = ~0u;
  State state = RUN;
  int bar = -1, bar_ins = -1; bool bar_pred = false;
  bool yielded = false;
  std::vector<CpAsync> cp; u32 cpg[32] = {};
  std::vector<WgOp> wg; u32 wgg = 0; bool wg_open = false;
  u32 bulkg[32] = {};
  std::vector<std::pair<u32, u32>> dirty; std::vector<u64> dirty_seq; u64 sync_seq = 0;
  std::vector<u8> local;
  std::vector<u32> vc;                  // vector clock, one entry a warp
  std::vector<u32> rvc;                 // what a fence published
};

struct Barrier { u32 arrived = 0, expected = 0; std::vector<int> waiting; bool red_and = true, red_or = false; u32 red_count = 0; std::vector<u32> clock; };

struct Cta {
  Launch* launch; u32 id[3]; u64 linear;
  std::vector<u8> smem, shadow;         // shadow: bit 0 written, bit 1 written by the generic proxy and not fenced, then asynchronous writes in flight
  u32 smem_base, smem_bytes;
  std::vector<Warp> warps;
  Barrier bars[16];
  std::vector<MBar> mbars;
  std::vector<Bulk> bulks;
  std::vector<u8> regs;
  int live_warps = 0;
  u64 seq = 0;
  // race detection on 4-byte granules
  std::vector<u32> wclock;              // warp << 24 | clock of the last write, 0 none
  std::vector<u32> rclock;              // [granule][warp] clock of its last read
  u32 slots = 0;                        // clocks kept: warps, then the asynchronous copies' own
};

struct Launch {
  Module* module; Func* func;
  u32 grid[3], block[3]; u32 smem_bytes; u64 rng; int style;
  u64 executed = 0, progress = 0;
};

struct Ctx { u8* R; Warp* w; Cta* cta; Launch* L; u32 npc; u32 mask; };

inline u32 rnd(Launch& L) { L.rng ^= L.rng << 13; L.rng ^= L.rng >> 7; L.rng ^= L.rng << 17; return u32((L.rng * 0x2545F4914F6CDD1DULL) >> 32); }

struct Options { s64 uninit = 1, resident = 2, shuffle = 0, limit = 4000000000LL, style = -1, race = 1, quantum = 512, tma_tf32_round = 1, stall = 200000000, approx = 0, first = 0, smem_limit = 0; };
extern Options options;
extern u64 counters[8];
extern int launch_device;
enum { C_WARP, C_THREAD, C_LOAD, C_STORE, C_MMA, C_TMA, C_CTA, C_BAR };

constexpr u64 kSharedWindow = 0xF000000000000000ULL, kLocalWindow = 0xE000000000000000ULL;
constexpr u32 kSmemBase = 1024;

u8* global_at(u64 address, u64 bytes, bool write);
u8* shared_at(Ctx& c, u32 address, u32 bytes, bool write, int lane);

// memory.cpp
void h_ld(Ctx&, const Ins&, u32); void h_st(Ctx&, const Ins&, u32); void h_cpasync(Ctx&, const Ins&, u32);
void h_cp_commit(Ctx&, const Ins&, u32); void h_cp_wait(Ctx&, const Ins&, u32); void h_atom(Ctx&, const Ins&, u32);
void h_ldmatrix(Ctx&, const Ins&, u32); void h_stmatrix(Ctx&, const Ins&, u32);
void h_bulk_load(Ctx&, const Ins&, u32); void h_bulk_store(Ctx&, const Ins&, u32); void h_bulk_commit(Ctx&, const Ins&, u32); void h_bulk_wait(Ctx&, const Ins&, u32);
void h_mbar(Ctx&, const Ins&, u32); void h_fence_proxy(Ctx&, const Ins&, u32); void h_fence(Ctx&, const Ins&, u32);
bool async_step(Cta& cta, bool force); void finish_cta(Cta& cta);
void complete_cp(Warp& w, CpAsync& op, u32 lanes);
void phase_check(Cta& cta, MBar& b);
// tensor.cpp
void h_mma(Ctx&, const Ins&, u32); void h_wgmma(Ctx&, const Ins&, u32); void h_wg_commit(Ctx&, const Ins&, u32); void h_wg_wait(Ctx&, const Ins&, u32); void h_wg_fence(Ctx&, const Ins&, u32);
bool wg_step(Warp& w);
// alu.cpp
bool decode_alu(Func& f, Ins& I, const std::vector<std::string>& t, const struct Operands& ops);
// sched
void wake(Cta& cta);

enum { SP_GEN, SP_GLOBAL, SP_SHARED, SP_LOCAL, SP_PARAM, SP_CONST };

template <class T> inline T* P(Ctx& c, int slot) { return reinterpret_cast<T*>(c.R + slot); }
template <class T> inline T* PR(u8* R, int slot) { return reinterpret_cast<T*>(R + slot); }
inline int ctz(u32 x) { return __builtin_ctz(x); }
#define LANES(m) for (u32 q_ = (m); q_; q_ &= q_ - 1) if (int i = ctz(q_); true)

inline u64 reg_get(u8* R, int slot, u8 w, int i) {
  switch (w) { case 8: return PR<u64>(R, slot)[i]; case 4: return PR<u32>(R, slot)[i]; case 2: return PR<u16>(R, slot)[i]; default: return PR<u32>(R, slot)[0] >> i & 1; }
}
inline void reg_set(u8* R, int slot, u8 w, int i, u64 v) {
  switch (w) { case 8: PR<u64>(R, slot)[i] = v; break; case 4: PR<u32>(R, slot)[i] = u32(v); break; case 2: PR<u16>(R, slot)[i] = u16(v); break;
    default: { u32& x = PR<u32>(R, slot)[0]; x = (x & ~(1u << i)) | u32(v & 1) << i; } }
}

inline float h2f(u16 h) { _Float16 x; memcpy(&x, &h, 2); return float(x); }
inline u16 f2h(float f) { _Float16 x = _Float16(f); u16 h; memcpy(&h, &x, 2); return h; }
inline float b2f(u16 b) { u32 x = u32(b) << 16; float f; memcpy(&f, &x, 4); return f; }
inline u16 f2b(float f) { u32 x; memcpy(&x, &f, 4); if ((x & 0x7fffffff) > 0x7f800000) return 0x7fff; return u16((x + 0x7fff + (x >> 16 & 1)) >> 16); }
inline float bits_f(u32 x) { float f; memcpy(&f, &x, 4); return f; }
inline u32 f_bits(float f) { u32 x; memcpy(&x, &f, 4); return x; }

// Operands as parsed
struct Operand {
  enum Kind { REG, IMM, FIMM, DIMM, SYM, ADDR, VEC, NONE, SINK } kind = NONE;
  std::string name;      // SYM
  int slot = -1; u8 w = 0;  // REG
  bool neg = false;      // !p
  int slot2 = -1;        // of r|p
  u64 value = 0;         // immediates
  s64 offset = 0;        // ADDR
  std::vector<Operand> list;  // VEC, or an address's coordinates
};
struct Operands {
  std::vector<Operand> v; Func* f; struct Parser* parser;
  const Operand& operator[](size_t i) const { if (i >= v.size()) throw Fault("too few operands"); return v[i]; }
  size_t size() const { return v.size(); }
};
int source(const Operands& o, size_t i, u8 width);            // slot of a source of that width
int source(const Operands& o, const Operand& x, u8 width);
int dest(const Operands& o, size_t i, u8 width);
Opd any(const Operands& o, const Operand& x, u8 width_if_imm);
