// Loads, stores, matrices to and from shared memory, asynchronous copies, mbarriers, tensor maps, race detection.
#include "emu.h"
using std::string; using std::vector;

// --- global memory: the allocations
struct Range { u64 lo, hi; bool writable; int device; };
int launch_device = 0;
static vector<Range> ranges;
static Range last_range{1, 0, false, -1};
u8* global_at(u64 a, u64 n, bool write) {
  if (!(a >= last_range.lo && a + n <= last_range.hi)) {
    auto it = std::upper_bound(ranges.begin(), ranges.end(), a, [](u64 x, const Range& r) { return x < r.lo; });
    bool found = false;
    while (it != ranges.begin()) { --it; if (a >= it->lo && a + n <= it->hi) { last_range = *it; found = true; break; } if (it->lo + (1ULL << 40) < a) break; }
    if (!found) {
      string near = "no allocations";
      s64 best = INT64_MAX;
      for (auto& r : ranges) { s64 d = a < r.lo ? s64(r.lo - a) : a >= r.hi ? s64(a - r.hi + 1) : 0; if (d < best) { best = d; char t[160]; snprintf(t, sizeof t, "nearest allocation is %#lx of %lu bytes, the access begins at its byte %ld", r.lo, r.hi - r.lo, s64(a - r.lo)); near = t; } }
      fault("global %s of %lu bytes at %#lx is outside the allocations (%s)", write ? "write" : "read", n, a, near.c_str());
    }
  }
  if (last_range.device >= 0 && last_range.device != launch_device) fault("global %s of %lu bytes at %#lx: the memory belongs to device %d, the kernel runs on device %d", write ? "write" : "read", n, a, last_range.device, launch_device);
  if (write && !last_range.writable) fault("global write of %lu bytes at %#lx into a read-only allocation", n, a);
  return reinterpret_cast<u8*>(a);
}
extern "C" void ptx_allow(const void* p, size_t bytes, int writable, int device) {
  u64 lo = u64(p);
  for (auto& r : ranges) if (r.lo == lo && r.hi == lo + bytes && r.device == device) { r.writable |= writable; last_range = {1, 0, false, -1}; return; }
  Range r{lo, lo + bytes, writable != 0, device};
  ranges.insert(std::upper_bound(ranges.begin(), ranges.end(), r, [](const Range& a, const Range& b) { return a.lo < b.lo; }), r);
  last_range = {1, 0, false, -1};
}
extern "C" void ptx_forbid(const void* p) { ranges.erase(std::remove_if(ranges.begin(), ranges.end(), [p](const Range& r) { return r.lo == u64(p); }), ranges.end()); last_range = {1, 0, false, -1}; }

// --- shared memory
static const char* who(const Cta& t, u32 slot) { static char s[64]; if (slot < t.warps.size()) snprintf(s, sizeof s, "warp %u", slot); else snprintf(s, sizeof s, "the TMA through the mbarrier at %u", t.mbars[slot - t.warps.size()].address); return s; }
static inline void race_read(Cta& t, Warp& w, u32 a, u32 n) {
  u32 nw = u32(t.warps.size());
  for (u32 g = (a - kSmemBase) >> 2, e = (a - kSmemBase + n + 3) >> 2; g < e; ++g) {
    u32 x = t.wclock[g], s = x >> 24;
    if (x && s != u32(w.index) && (x & 0xffffff) > w.vc[s]) fault("race: shared memory at %u was written by %s and is read by warp %d without synchronisation between", g * 4 + kSmemBase, who(t, s), w.index);
    u32& r = t.rclock[size_t(g) * nw + w.index]; if (r < 0xffffff) r = w.vc[w.index];
  }
}
static inline void race_write(Cta& t, Warp& w, u32 a, u32 n, bool record) {
  u32 nw = u32(t.warps.size());
  for (u32 g = (a - kSmemBase) >> 2, e = (a - kSmemBase + n + 3) >> 2; g < e; ++g) {
    u32 x = t.wclock[g], s = x >> 24;
    if (x && s != u32(w.index) && (x & 0xffffff) > w.vc[s]) fault("race: shared memory at %u was written by %s and is written by warp %d without synchronisation between", g * 4 + kSmemBase, who(t, s), w.index);
    u32* r = &t.rclock[size_t(g) * nw];
    for (u32 k = 0; k < nw; ++k) if (r[k] > w.vc[k] && k != u32(w.index)) fault("race: shared memory at %u was read by warp %u%s and is overwritten by warp %d without synchronisation between", g * 4 + kSmemBase, k, r[k] >= 0xffffff ? " (by wgmma that was not waited for)" : "", w.index);
    if (r[w.index] >= 0xffffff) fault("race: shared memory at %u is overwritten while this warp's own wgmma reads it", g * 4 + kSmemBase);
    if (record) { t.wclock[g] = u32(w.index) << 24 | w.vc[w.index]; memset(r, 0, 4 * nw); }
  }
}
static void pending_store_check(Cta& t, u32 a, u32 n) {
  for (auto& b : t.bulks) if (b.store && !b.released && a < b.smem + b.bytes && b.smem < a + n) fault("shared memory at %u is overwritten while a bulk store (line %d) may still read it", a, b.line);
}
static inline u8* smem_range(Cta& t, u32 a, u32 n, const char* what) {
  if (a < kSmemBase || a + n > kSmemBase + t.smem_bytes || a + n < a) fault("shared %s of %u bytes at %u is outside the CTA's %u bytes at %u", what, n, a, t.smem_bytes, kSmemBase);
  return t.smem.data() + a;
}
static inline void check_read(Cta& t, u32 a, u32 n) {
  const u8* s = t.shadow.data() + a;
  for (u32 i = 0; i < n; ++i) {
    if (s[i] >= 4) fault("shared memory at %u is read while an asynchronous copy into it is in flight", a + i);
    if (!(s[i] & 1) && options.uninit) fault("shared memory at %u is read, and was never written", a + i);
  }
}
static inline void mark_written(Cta& t, Warp* w, u32 a, u32 n) {
  u8* s = t.shadow.data() + a;
  u8 bits = 1;
  if (w && t.launch->func->async_proxy) {
    bits = 3;
    if (!w->dirty.empty() && w->dirty.back().second == a && w->dirty_seq.back() == t.seq) w->dirty.back().second = a + n;
    else { w->dirty.push_back({a, a + n}); w->dirty_seq.push_back(t.seq); }
  }
  for (u32 i = 0; i < n; ++i) s[i] = (s[i] & ~3) | bits;
}
static inline const u8* sread(Ctx& c, u32 a, u32 n) {
  Cta& t = *c.cta;
  u8* p = smem_range(t, a, n, "read");
  check_read(t, a, n);
  if (options.race && n >= 4) race_read(t, *c.w, a, n);
  return p;
}
static inline void swrite(Ctx& c, u32 a, const void* data, u32 n) {
  Cta& t = *c.cta;
  u8* p = smem_range(t, a, n, "write");
  const u8* s = t.shadow.data() + a;
  for (u32 i = 0; i < n; ++i) if (s[i] >= 4) fault("shared memory at %u is written while an asynchronous copy into it is in flight", a + i);
  if (!t.bulks.empty()) pending_store_check(t, a, n);
  // the same value again, as replicated layouts write it, is no race
  bool same = (s[0] & 1) && memcmp(p, data, n) == 0;
  if (options.race && n >= 4 && !same) race_write(t, *c.w, a, n, true);
  mark_written(t, c.w, a, n);
  memcpy(p, data, n);
}
static const u8* async_read(Cta& t, Warp& w, u32 a, u32 n, const char* what) {  // by the asynchronous proxy
  u8* p = smem_range(t, a, n, "read");
  check_read(t, a, n);
  const u8* s = t.shadow.data() + a;
  for (u32 i = 0; i < n; ++i) if (s[i] & 2) fault("%s reads shared memory at %u that st.shared or cp.async wrote, without fence.proxy.async between", what, a + i);
  (void)w;
  return p;
}
const u8* wgmma_read(Cta& t, Warp& w, u32 a, u32 n) { return async_read(t, w, a, n, "wgmma"); }
void wgmma_mark(Cta& t, Warp& w, u32 a, u32 n, bool pending) {
  if (!options.race) return;
  u32 nw = u32(t.warps.size());
  for (u32 g = (a - kSmemBase) >> 2, e = (a - kSmemBase + n) >> 2; g < e; ++g) {
    u32 x = t.wclock[g], s = x >> 24;
    if (pending && x && s != u32(w.index) && (x & 0xffffff) > w.vc[s]) fault("race: shared memory at %u was written by %s and is read by wgmma of warp %d without synchronisation between", g * 4 + kSmemBase, who(t, s), w.index);
    t.rclock[size_t(g) * nw + w.index] = pending ? 0xffffff : 0;  // see h_wg_wait
  }
}

static inline u64 addr_of(Ctx& c, const Ins& I, int i) { return I.wa == 8 ? P<u64>(c, I.a)[i] + u64(I.imm) : u64(u32(P<u32>(c, I.a)[i] + u32(I.imm))); }
static inline u32 shared_addr(u64 a) {
  if (a >= kSharedWindow) a -= kSharedWindow;
  if (a > 0xffffffffu) fault("%#lx is not a shared address", a);
  return u32(a);
}
static u8* resolve(Ctx& c, int space, u64 a, u32 n, bool write, int lane, u32* stored = nullptr) {
  if (a % n && (n & (n - 1)) == 0) fault("%s of %u bytes at %#lx is not aligned", write ? "write" : "read", n, a);
  if (space == SP_GEN) { if (a >= kSharedWindow) { space = SP_SHARED; a -= kSharedWindow; } else if (a >= kLocalWindow) { space = SP_LOCAL; a -= kLocalWindow; } else space = SP_GLOBAL; }
  switch (space) {
    case SP_SHARED: { u32 s = shared_addr(a); if (write) { *stored = s; return nullptr; } return const_cast<u8*>(sread(c, s, n)); }
    case SP_LOCAL: { u32 size = c.L->func->local_bytes; if (a + n > size) fault("local access at %lu", a); auto& l = c.w->local; if (l.empty()) l.assign(size_t(size) * 32, 0xff); return l.data() + size_t(size) * lane + a; }
    case SP_PARAM: { Func& f = *c.L->func; u64 lo = (u64(f.param_buffer.data()) + 127) / 128 * 128; if (a < lo || a + n > lo + f.param_bytes) fault("parameter access at byte %ld of %u", s64(a - lo), f.param_bytes); return reinterpret_cast<u8*>(a); }
    default: return global_at(a, n, write);
  }
}
void h_ld(Ctx& c, const Ins& I, u32 m) {
  const Opd* o = &c.L->func->pool[I.vo];
  int space = I.k[0]; u32 n = I.k[1], vn = I.vn; bool sgn = I.k[2];
  if (n == 4 && !I.k[3]) {
    LANES(m) { const u32* p = (const u32*)resolve(c, space, addr_of(c, I, i), 4 * vn, false, i); for (u32 j = 0; j < vn; ++j) PR<u32>(c.R, o[j].slot)[i] = p[j]; }
  } else {
    LANES(m) {
      const u8* p = resolve(c, space, addr_of(c, I, i), n * vn, false, i);
      for (u32 j = 0; j < vn; ++j) {
        u64 v = 0; memcpy(&v, p + j * n, n);
        if (sgn) v = n == 1 ? u64(s64(s8(v))) : n == 2 ? u64(s64(s16(v))) : n == 4 ? u64(s64(s32(v))) : v;
        reg_set(c.R, o[j].slot, o[j].w, i, v);
      }
    }
  }
  if (space == SP_GLOBAL || space == SP_GEN) counters[C_LOAD] += u64(n) * vn * __builtin_popcount(m);
  if (I.k[4]) c.w->yielded = true;
}
void h_st(Ctx& c, const Ins& I, u32 m) {
  const Opd* o = &c.L->func->pool[I.vo];
  int space = I.k[0]; u32 n = I.k[1], vn = I.vn;
  LANES(m) {
    u8 value[64]; u32 at = 0;
    for (u32 j = 0; j < vn; ++j) { u64 v = reg_get(c.R, o[j].slot, o[j].w, i); memcpy(value + j * n, &v, n); }
    u8* p = resolve(c, space, addr_of(c, I, i), n * vn, true, i, &at);
    if (p) memcpy(p, value, n * vn); else swrite(c, at, value, n * vn);
  }
  if (space == SP_GLOBAL || space == SP_GEN) counters[C_STORE] += u64(n) * vn * __builtin_popcount(m);
}
// k: space, bytes, operation, type (0 unsigned 1 signed 2 f32 3 f64 4 f16x2 5 bf16x2 6 f16 7 bf16), returns
void h_atom(Ctx& c, const Ins& I, u32 m) {
  int space = I.k[0], op = I.k[2], ty = I.k[3]; u32 n = I.k[1]; s64 race = options.race; options.race = 0;
  c.w->yielded = true;
  LANES(m) {
    u8* p = resolve(c, space, addr_of(c, I, i), n, false, i);
    if (!options.uninit) {}
    if (space == SP_GLOBAL || (space == SP_GEN && u64(p) == addr_of(c, I, i))) global_at(u64(p), n, true);
    u64 old = 0; memcpy(&old, p, n);
    u64 b = reg_get(c.R, I.b, I.wb, i), v = old;
    auto sg = [&](u64 x) { return n == 4 ? s64(s32(x)) : s64(x); };
    switch (op) {
      case 0: v = ty == 2 ? f_bits(bits_f(u32(old)) + bits_f(u32(b))) : old + b;
        if (ty == 3) { double x, y; memcpy(&x, &old, 8); memcpy(&y, &b, 8); x += y; memcpy(&v, &x, 8); }
        if (ty > 3) fault("atomic add of this type");
        break;
      case 1: v = ty == 1 ? (sg(old) < sg(b) ? old : b) : std::min(old, b); break;
      case 2: v = ty == 1 ? (sg(old) > sg(b) ? old : b) : std::max(old, b); break;
      case 3: v = b; break;
      case 4: v = old == b ? reg_get(c.R, I.c, I.wc, i) : old; break;
      case 5: v = old & b; break; case 6: v = old | b; break; case 7: v = old ^ b; break;
      case 8: v = old >= b ? 0 : old + 1; break; case 9: v = old == 0 || old > b ? b : old - 1; break;
    }
    memcpy(p, &v, n);
    if (I.k[4]) reg_set(c.R, I.d, I.wd, i, old);
    counters[C_LOAD] += n; counters[C_STORE] += n;
  }
  options.race = race;
}
void h_fence(Ctx&, const Ins&, u32) {}
void h_fence_proxy(Ctx& c, const Ins&, u32) {
  Cta& t = *c.cta;
  for (auto& w : t.warps) {
    size_t keep = 0;
    for (size_t j = 0; j < w.dirty.size(); ++j) {
      if (&w == c.w || w.dirty_seq[j] < c.w->sync_seq) { for (u32 a = w.dirty[j].first; a < w.dirty[j].second; ++a) t.shadow[a] &= ~2; }
      else { w.dirty[keep] = w.dirty[j]; w.dirty_seq[keep++] = w.dirty_seq[j]; }
    }
    w.dirty.resize(keep); w.dirty_seq.resize(keep);
  }
}

// --- matrices
void h_ldmatrix(Ctx& c, const Ins& I, u32 m) {
  int n = I.k[0]; bool trans = I.k[1];
  const Opd* o = &c.L->func->pool[I.vo];
  (void)m;
  u16 rows[4][8][8];
  for (int j = 0; j < n; ++j)
    for (int r = 0; r < 8; ++r) {
      u32 a = shared_addr(addr_of(c, I, j * 8 + r));
      if (a % 16) fault("ldmatrix row at %u is not aligned to 16 bytes", a);
      memcpy(rows[j][r], sread(c, a, 16), 16);
    }
  for (int j = 0; j < n; ++j) {
    u32* d = PR<u32>(c.R, o[j].slot);
    for (int i = 0; i < 32; ++i) {
      int g = i / 4, t = i % 4 * 2;
      d[i] = trans ? rows[j][t][g] | u32(rows[j][t + 1][g]) << 16 : rows[j][g][t] | u32(rows[j][g][t + 1]) << 16;
    }
  }
}
void h_stmatrix(Ctx& c, const Ins& I, u32 m) {
  int n = I.k[0]; bool trans = I.k[1];
  const Opd* o = &c.L->func->pool[I.vo];
  (void)m;
  for (int j = 0; j < n; ++j) {
    u16 rows[8][8];
    const u32* s = PR<u32>(c.R, o[j].slot);
    for (int i = 0; i < 32; ++i) {
      int g = i / 4, t = i % 4 * 2;
      if (trans) { rows[t][g] = u16(s[i]); rows[t + 1][g] = u16(s[i] >> 16); } else { rows[g][t] = u16(s[i]); rows[g][t + 1] = u16(s[i] >> 16); }
    }
    for (int r = 0; r < 8; ++r) {
      u32 a = shared_addr(addr_of(c, I, j * 8 + r));
      if (a % 16) fault("stmatrix row at %u is not aligned to 16 bytes", a);
      swrite(c, a, rows[r], 16);
    }
  }
}

// --- cp.async. k: size; b: source size's slot or -1; p: ignore-src predicate
void complete_cp(Warp& w, CpAsync& op, u32 lanes) {  // the data arrives; the race is over only with the wait
  Cta& t = *w.cta;
  LANES(lanes) {
    u8* d = t.smem.data() + op.dst[i];
    if (op.src_size[i]) memcpy(d, reinterpret_cast<const u8*>(op.src[i]), op.src_size[i]);
    memset(d + op.src_size[i], 0, op.size - op.src_size[i]);
  }
}
void h_cpasync(Ctx& c, const Ins& I, u32 m) {
  CpAsync op; op.mask = m; op.size = u8(I.k[0]); op.line = I.line;
  Cta& t = *c.cta;
  LANES(m) {
    u32 d = shared_addr(addr_of(c, I, i)); u64 s = P<u64>(c, I.c)[i] + u64(s64(I.k[1]));
    u32 n = I.b >= 0 ? P<u32>(c, I.b)[i] : op.size;
    if (I.p >= 0 && (P<u32>(c, I.p)[0] >> i & 1)) n = 0;
    if (n > op.size) fault("cp.async: source size %u is larger than %u", n, op.size);
    if (d % op.size) fault("cp.async: shared address %u is not aligned to %u", d, op.size);
    if (s % op.size) fault("cp.async: global address %#lx is not aligned to %u (source size %u)", s, op.size, n);
    if (n) global_at(s, n, false);
    smem_range(t, d, op.size, "cp.async write");
    if (options.race) race_write(t, *c.w, d, op.size, false);
    if (!t.bulks.empty()) pending_store_check(t, d, op.size);
    for (u32 k = 0; k < op.size; ++k) { u8& sh = t.shadow[d + k]; if (sh >= 4) fault("cp.async into shared memory at %u, into which another asynchronous copy is in flight", d + k); sh += 4; }
    op.dst[i] = d; op.src[i] = s; op.src_size[i] = u8(n); op.group[i] = c.w->cpg[i];
    counters[C_LOAD] += n;
  }
  bool now = c.L->style == 0 || (c.L->style == 1 && rnd(*c.L) % 4 == 0);
  if (now) { complete_cp(*c.w, op, m); op.mask |= 0; op.line = -op.line; }
  c.w->cp.push_back(op);
}
void h_cp_commit(Ctx& c, const Ins&, u32 m) { LANES(m) c.w->cpg[i]++; }
void h_cp_wait(Ctx& c, const Ins& I, u32 m) {
  Warp& w = *c.w; Cta& t = *c.cta; bool all = I.k[0] < 0;
  size_t keep = 0;
  for (size_t j = 0; j < w.cp.size(); ++j) {
    CpAsync& op = w.cp[j]; u32 done = 0;
    LANES(op.mask & m) if (all || s64(op.group[i]) < s64(w.cpg[i]) - I.k[0]) done |= 1u << i;
    if (done) {
      if (op.line > 0) complete_cp(w, op, done);
      LANES(done) {
        for (u32 k = 0; k < op.size; ++k) t.shadow[op.dst[i] + k] -= 4;
        if (options.race) race_write(t, w, op.dst[i], op.size, true);
        mark_written(t, &w, op.dst[i], op.size);
      }
      op.mask &= ~done;
    }
    if (op.mask) { if (keep != j) w.cp[keep] = w.cp[j]; ++keep; }
  }
  w.cp.resize(keep);
}

// --- mbarriers
static MBar& mbar_at(Cta& t, u32 a) {
  for (auto& b : t.mbars) if (b.address == a && b.valid) return b;
  fault("no mbarrier was initialised at shared address %u", a);
}
void phase_check(Cta& t, MBar& b) {
  if (b.pending == 0 && b.tx == 0) {
    b.phase++; b.pending = b.expected; t.launch->progress = t.launch->executed; wake(t);
    size_t n = b.clock.size() / 2; std::copy(b.clock.begin(), b.clock.begin() + n, b.clock.begin() + n);  // the second half: as the last phase completed
  }
}
// k: operation (0 init 1 inval 2 arrive 3 arrive.expect_tx 4 expect_tx 5 complete_tx 6 wait), parity; b: count or tx or parity
void h_mbar(Ctx& c, const Ins& I, u32 m) {
  Cta& t = *c.cta; Warp& w = *c.w;
  LANES(m) {
    u32 a = shared_addr(addr_of(c, I, i));
    if (a % 8) fault("mbarrier at %u is not aligned to 8 bytes", a);
    smem_range(t, a, 8, "mbarrier");
    u64 b = I.b >= 0 ? reg_get(c.R, I.b, I.wb, i) : 1;
    if (I.k[0] == 0) {
      for (auto& x : t.mbars) if (x.address == a && x.valid) fault("mbarrier.init of the mbarrier at %u, which is live", a);
      if (t.warps.size() + t.mbars.size() >= 250) fault("too many mbarriers");
      if (b == 0 || b >= 1 << 20) fault("mbarrier.init with count %lu", b);
      MBar* slot = nullptr;
      for (auto& x : t.mbars) if (x.address == a) slot = &x;
      if (!slot) { t.mbars.push_back({}); slot = &t.mbars.back(); slot->address = a; slot->clock.assign(512, 0); }
      slot->expected = slot->pending = s32(b); slot->tx = 0; slot->phase = 0; slot->valid = true;
      if (options.race) race_write(t, w, a, 8, true);
      for (u32 k = 0; k < 8; ++k) { if (t.shadow[a + k] >= 4) fault("mbarrier.init at %u under an asynchronous copy", a); t.shadow[a + k] = 1; }
      continue;
    }
    MBar& bar = mbar_at(t, a);
    switch (I.k[0]) {
      case 1: bar.valid = false;
        for (auto& x : t.bulks) if (!x.store && x.mbar == a) fault("mbarrier.inval at %u while a bulk copy will complete on it (line %d)", a, x.line);
        if (bar.tx) fault("mbarrier.inval at %u with %ld bytes expected", a, bar.tx);
        t.shadow[a] = 0; if (options.race) race_write(t, w, a, 8, true); break;
      case 2: case 3: {
        if (I.k[0] == 3) bar.tx += s64(b);
        s32 n = I.k[0] == 2 ? s32(b) : 1;
        if (I.k[4]) reg_set(c.R, I.d, I.wd, i, bar.phase);
        for (size_t k = 0; k < w.vc.size(); ++k) bar.clock[k] = std::max(bar.clock[k], w.vc[k]);
        if (bar.pending < n) fault("mbarrier at %u: more arrivals than its count of %d in one phase", a, bar.expected);
        bar.pending -= n;
        phase_check(t, bar);
        break;
      }
      case 4: bar.tx += s64(b); break;
      case 5: bar.tx -= s64(b); phase_check(t, bar); break;
      case 6: {
        bool done = I.k[1] ? (bar.phase & 1) != (b & 1) : bar.phase != u32(b);
        u32& p = P<u32>(c, I.d)[0];
        p = (p & ~(1u << i)) | u32(done) << i;
        if (done) { for (size_t k = 0; k < w.vc.size(); ++k) w.vc[k] = std::max(w.vc[k], bar.clock[256 + k]); w.sync_seq = t.seq; }
        else w.state = SLEEP, w.yielded = true;
        break;
      }
    }
  }
  if (I.k[0] == 2 || I.k[0] == 3) { w.vc[w.index]++; t.seq++; }
}

// --- bulk copies and tensor maps
static int type_bytes(int dtype) { static const int n[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4}; return dtype >= 0 && dtype < 13 ? n[dtype] : 0; }
static u32 swizzled(u32 a, int mode) { static const u32 mask[] = {0, 1, 3, 7}; return a ^ ((a >> 7 & mask[mode]) << 4); }
static u32 box_bytes(const TensorMap& m) {
  u32 n = type_bytes(m.dtype);
  if (m.im2col) return n * m.channels * m.pixels;
  for (int i = 0; i < m.rank; ++i) n *= m.box[i];
  return n;
}
// calls f(shared offset, global address or 0 where out of bounds, bytes) for runs along the innermost dimension
template <class F> static void walk(const TensorMap& m, const s32* coord, const u32* offset, F f) {
  int e = type_bytes(m.dtype);
  auto row = [&](u32 smem, s64 c0, u32 n, u64 base, bool inside) {
    s64 lo = std::max<s64>(0, -c0), hi = std::min<s64>(n, s64(m.dims[0]) + 1 - c0);
    if (!inside || hi <= lo) { f(smem, 0, n * e); return; }
    if (lo) f(smem, 0, u32(lo * e));
    f(u32(smem + lo * e), base + u64((c0 + lo) * e), u32((hi - lo) * e));
    if (hi < n) f(u32(smem + hi * e), 0, u32((n - hi) * e));
  };
  if (!m.im2col) {
    u32 rows = 1; for (int i = 1; i < m.rank; ++i) rows *= m.box[i];
    for (u32 r = 0; r < rows; ++r) {
      u32 q = r; bool inside = true; u64 base = m.address;
      for (int i = 1; i < m.rank; ++i) { s64 x = s64(coord[i]) + q % m.box[i]; q /= m.box[i]; if (x < 0 || x > s64(m.dims[i])) inside = false; base += u64(x) * m.strides[i - 1]; }
      row(r * m.box[0] * e, coord[0], m.box[0], base, inside);
    }
  } else {
    int sd = m.rank - 2;
    s64 x[3]; for (int i = 0; i < sd; ++i) x[i] = coord[1 + i];
    s64 n = coord[m.rank - 1];
    for (u32 p = 0; p < m.pixels; ++p) {
      bool inside = n >= 0 && n <= s64(m.dims[m.rank - 1]); u64 base = m.address + u64(n) * m.strides[m.rank - 2];
      for (int i = 0; i < sd; ++i) { s64 v = x[i] + (offset ? s64(offset[i]) : 0); if (v < 0 || v > s64(m.dims[1 + i])) inside = false; base += u64(v) * m.strides[i]; }
      row(p * m.channels * e, coord[0], m.channels, base, inside);
      int i = 0;
      for (; i < sd; ++i) { x[i] += m.estride[1 + i]; if (x[i] <= s64(m.dims[1 + i]) + m.upper[i]) break; x[i] = m.lower[i]; }
      if (i == sd) n++;
    }
  }
}
static void check_smem_box(const TensorMap& m, u32 smem) {
  if (smem % 128) fault("TMA: shared address %u is not aligned to 128 bytes", smem);
  u32 inner = (m.im2col ? m.channels : m.box[0]) * type_bytes(m.dtype);
  static const u32 span[] = {0, 32, 64, 128};
  if (m.swizzle && inner != span[m.swizzle]) fault("TMA: an inner box of %u bytes under a swizzle of %u is not supported by the emulator", inner, span[m.swizzle]);
}
static void round_tf32(u8* d, u32 n) {  // to the nearest, ties to even; NaN and infinity stay
  for (u32 k = 0; k < n; k += 4) { u32 x; memcpy(&x, d + k, 4); if ((x >> 23 & 0xff) != 0xff) x = (x + 0xfff + (x >> 13 & 1)) & ~0x1fffu; memcpy(d + k, &x, 4); }
}
static void run_load(Cta& t, Bulk& b) {
  bool tf32 = b.tensor && b.map.dtype >= 11 && options.tma_tf32_round;  // "TMA converts f32 input to tf32"
  if (b.tensor) {
    u8 tmp[16]; (void)tmp;
    walk(b.map, b.coord, b.map.im2col ? b.offset : nullptr, [&](u32 off, u64 src, u32 n) {
      const u8* s = src ? global_at(src, n, false) : nullptr;
      if (s) counters[C_LOAD] += n;
      for (u32 k = 0; k < n;) { u32 a = b.smem + off + k, step = std::min(n - k, 16 - (a & 15)); u8* d = t.smem.data() + swizzled(a, b.map.swizzle); if (s) memcpy(d, s + k, step); else memset(d, 0, step); if (tf32) round_tf32(d, step); k += step; }
    });
  } else { memcpy(t.smem.data() + b.smem, global_at(b.global, b.bytes, false), b.bytes); counters[C_LOAD] += b.bytes; }
  MBar& bar = mbar_at(t, b.mbar);
  u32 slot = u32(t.warps.size() + (&bar - t.mbars.data())), clock = ++bar.clock[slot];
  for (size_t k = 0; k < b.clock.size(); ++k) if (k != slot) bar.clock[k] = std::max(bar.clock[k], b.clock[k]);
  if (options.race) for (u32 g = (b.smem - kSmemBase) >> 2, e = (b.smem - kSmemBase + b.bytes) >> 2; g < e; ++g) { t.wclock[g] = slot << 24 | clock; memset(&t.rclock[size_t(g) * t.warps.size()], 0, 4 * t.warps.size()); }
  for (u32 k = 0; k < b.bytes; ++k) { u8& s = t.shadow[b.smem + k]; s -= 4; s = (s & ~3) | 1; }
  bar.tx -= b.bytes;
  phase_check(t, bar);
}
static void store_read(Cta& t, Bulk& b) {
  Warp& w = t.warps[b.warp];
  b.data.resize(b.bytes);
  async_read(t, w, b.smem, b.bytes, "a bulk store");
  if (options.race) for (u32 g = (b.smem - kSmemBase) >> 2, e = (b.smem - kSmemBase + b.bytes) >> 2; g < e; ++g) t.rclock[size_t(g) * t.warps.size() + b.warp] = w.vc[b.warp];
  for (u32 k = 0; k < b.bytes; k += 16) memcpy(&b.data[k], t.smem.data() + (b.tensor ? swizzled(b.smem + k, b.map.swizzle) : b.smem + k), 16);
  b.read_done = true;
}
static void store_write(Cta& t, Bulk& b) {
  (void)t;
  b.written = true;
  if (b.tensor) walk(b.map, b.coord, nullptr, [&](u32 off, u64 dst, u32 n) { if (dst) { memcpy(global_at(dst, n, true), &b.data[off], n); counters[C_STORE] += n; } });
  else { memcpy(global_at(b.global, b.bytes, true), b.data.data(), b.bytes); counters[C_STORE] += b.bytes; }
}
// d..: k[0] tensor, k[1] rank, k[2] im2col; a: shared address; pool: coordinates then offsets; b: mbarrier slot; c: map or global slot; e: size
void h_bulk_load(Ctx& c, const Ins& I, u32 m) {
  Cta& t = *c.cta; Warp& w = *c.w;
  const Opd* o = &c.L->func->pool[I.vo];
  LANES(m) {
    Bulk b; b.warp = w.index; b.lane = i; b.line = I.line; b.tensor = I.k[0];
    b.smem = shared_addr(addr_of(c, I, i));
    { u64 x = reg_get(c.R, I.b, I.wb, i) + u64(s64(I.k[4])); b.mbar = shared_addr(I.wb == 4 ? u32(x) : x); }
    u64 g = P<u64>(c, I.c)[i] + u64(s64(I.k[5]));
    if (b.tensor) {
      if (g % 64) fault("the tensor map at %#lx is not aligned to 64 bytes", g);
      memcpy(&b.map, reinterpret_cast<void*>(g), sizeof b.map);
      if (b.map.magic != 0x544d4150) fault("the 128 bytes at %#lx are no tensor map that this emulator encoded", g);
      if (b.map.rank != I.k[1] || b.map.im2col != I.k[2]) fault("the tensor map has rank %d%s, the instruction %d%s", b.map.rank, b.map.im2col ? " im2col" : "", I.k[1], I.k[2] ? " im2col" : "");
      for (int j = 0; j < b.map.rank; ++j) b.coord[j] = s32(reg_get(c.R, o[j].slot, o[j].w, i));
      if (I.k[2]) for (int j = 0; j < b.map.rank - 2; ++j) b.offset[j] = u32(reg_get(c.R, o[b.map.rank + j].slot, o[b.map.rank + j].w, i)) & 0xffff;
      b.bytes = box_bytes(b.map);
      check_smem_box(b.map, b.smem);
    } else { b.global = g; b.bytes = u32(reg_get(c.R, I.e, 4, i)); if (b.bytes % 16 || g % 16 || b.smem % 16) fault("cp.async.bulk: not aligned to 16 bytes"); global_at(g, b.bytes, false); }
    mbar_at(t, b.mbar);
    smem_range(t, b.smem, b.bytes, "bulk write");
    pending_store_check(t, b.smem, b.bytes);
    if (options.race) race_write(t, w, b.smem, b.bytes, false);
    for (u32 k = 0; k < b.bytes; ++k) { u8& s = t.shadow[b.smem + k]; if (s >= 4) fault("bulk copy into shared memory at %u, into which another asynchronous copy is in flight", b.smem + k); s += 4; }
    b.clock = w.vc;
    counters[C_TMA]++;
    if (c.L->style == 0) run_load(t, b); else t.bulks.push_back(std::move(b));
  }
}
void h_bulk_store(Ctx& c, const Ins& I, u32 m) {
  Cta& t = *c.cta; Warp& w = *c.w;
  const Opd* o = &c.L->func->pool[I.vo];
  LANES(m) {
    Bulk b; b.store = true; b.warp = w.index; b.lane = i; b.line = I.line; b.tensor = I.k[0]; b.group = w.bulkg[i];
    b.smem = shared_addr(addr_of(c, I, i));
    u64 g = P<u64>(c, I.c)[i] + u64(s64(I.k[5]));
    if (b.tensor) {
      if (g % 64) fault("the tensor map at %#lx is not aligned to 64 bytes", g);
      memcpy(&b.map, reinterpret_cast<void*>(g), sizeof b.map);
      if (b.map.magic != 0x544d4150) fault("the 128 bytes at %#lx are no tensor map that this emulator encoded", g);
      if (b.map.rank != I.k[1] || b.map.im2col != I.k[2]) fault("the tensor map's rank or mode is not the instruction's");
      for (int j = 0; j < b.map.rank; ++j) b.coord[j] = s32(reg_get(c.R, o[j].slot, o[j].w, i));
      b.bytes = box_bytes(b.map);
      check_smem_box(b.map, b.smem);
    } else { b.global = g; b.bytes = u32(reg_get(c.R, I.e, 4, i)); if (b.bytes % 16 || g % 16 || b.smem % 16) fault("cp.async.bulk: not aligned to 16 bytes"); global_at(g, b.bytes, true); }
    async_read(t, w, b.smem, b.bytes, "a bulk store");
    if (options.race) { u32 nw = u32(t.warps.size()); (void)nw; race_read(t, w, b.smem, b.bytes); }
    counters[C_TMA]++;
    if (c.L->style == 0) { store_read(t, b); store_write(t, b); }
    t.bulks.push_back(std::move(b));
  }
}
void h_bulk_commit(Ctx& c, const Ins&, u32 m) { LANES(m) c.w->bulkg[i]++; }
void h_bulk_wait(Ctx& c, const Ins& I, u32 m) {
  Cta& t = *c.cta; Warp& w = *c.w;
  for (size_t j = 0; j < t.bulks.size();) {
    Bulk& b = t.bulks[j];
    if (b.store && b.warp == w.index && (m >> b.lane & 1) && s64(b.group) < s64(w.bulkg[b.lane]) - I.k[0]) {
      if (!b.read_done) store_read(t, b);
      if (options.race && !b.released) for (u32 g = (b.smem - kSmemBase) >> 2, e = (b.smem - kSmemBase + b.bytes) >> 2; g < e; ++g) { u32& r = t.rclock[size_t(g) * t.warps.size() + b.warp]; if (r < 0xffffff) r = w.vc[b.warp]; }
      b.released = true;
      if ((!I.k[1] || rnd(*c.L) % 2) && !b.written) store_write(t, b);
      if (b.written) { t.bulks.erase(t.bulks.begin() + j); continue; }
    }
    ++j;
  }
}
// One random thing that is in flight takes effect; false where nothing is
bool async_step(Cta& t, bool force) {
  (void)force;
  if (!t.bulks.empty()) {
    size_t j = rnd(*t.launch) % t.bulks.size();
    Bulk& b = t.bulks[j];
    if (!b.store) { Bulk x = std::move(b); t.bulks.erase(t.bulks.begin() + j); run_load(t, x); }
    else if (!b.read_done) store_read(t, b);
    else if (!b.written) { store_write(t, b); if (b.released) t.bulks.erase(t.bulks.begin() + j); }
    else { for (auto& x : t.bulks) if (!x.store) { Bulk y = std::move(x); t.bulks.erase(t.bulks.begin() + (&x - t.bulks.data())); run_load(t, y); return true; } return false; }
    return true;
  }
  return false;
}
void finish_cta(Cta& t) {
  for (auto& b : t.bulks) {
    if (!b.store) fault("the CTA ends while a bulk load (line %d) into its shared memory is in flight", b.line);
    if (!b.released) fault("the CTA ends while a bulk store (line %d) may still read its shared memory: no cp.async.bulk.wait_group.read", b.line);
    if (!b.written) store_write(t, b);
  }
  t.bulks.clear();
  for (auto& b : t.mbars) if (b.valid && b.tx) fault("the CTA ends with %ld bytes expected at the mbarrier at %u: a wrong expect_tx", b.tx, b.address);
}

// --- tensor maps
static thread_local string encode_message;
extern "C" const char* ptx_encode_error() { return encode_message.c_str(); }
#define NEED(x, ...) if (!(x)) { char t_[200]; snprintf(t_, sizeof t_, __VA_ARGS__); encode_message = t_; return 1; }
static int encode_common(TensorMap& m, int dtype, u32 rank, const void* address, const u64* dims, const u64* strides, const u32* es, int interleave, int swizzle, int oob) {
  memset(&m, 0, sizeof m); encode_message.clear();
  NEED(type_bytes(dtype), "unknown data type %d", dtype)
  NEED(rank >= 1 && rank <= 5, "rank %u", rank)
  NEED(interleave == 0, "interleave is not supported by the emulator")
  NEED(u64(address) % 16 == 0, "globalAddress %p is not a multiple of 16", address)
  NEED(swizzle >= 0 && swizzle <= 3, "swizzle %d", swizzle)
  for (u32 i = 0; i < rank; ++i) NEED(dims[i] >= 1 && dims[i] <= 1ULL << 32, "globalDim[%u] = %lu", i, dims[i])
  for (u32 i = 0; i + 1 < rank; ++i) NEED(strides[i] % 16 == 0 && strides[i] < 1ULL << 40, "globalStrides[%u] = %lu is not a multiple of 16 below 2^40", i, strides[i])
  for (u32 i = 0; i < rank; ++i) NEED(es[i] >= 1 && es[i] <= 8, "elementStrides[%u] = %u", i, es[i])
  m.magic = 0x544d4150; m.dtype = u8(dtype); m.rank = u8(rank); m.swizzle = u8(swizzle); m.address = u64(address); m.oobfill = u8(oob);
  for (u32 i = 0; i < rank; ++i) { m.dims[i] = u32(dims[i] - 1); m.estride[i] = u8(es[i]); if (i) m.strides[i - 1] = strides[i - 1]; }
  return 0;
}
extern "C" int ptx_encode_tiled(void* map, int dtype, u32 rank, const void* address, const u64* dims, const u64* strides, const u32* box, const u32* es, int interleave, int swizzle, int l2, int oob) {
  TensorMap m; (void)l2;
  if (int r = encode_common(m, dtype, rank, address, dims, strides, es, interleave, swizzle, oob)) return r;
  NEED(u64(map) % 64 == 0, "the tensor map is not aligned to 64 bytes")
  for (u32 i = 0; i < rank; ++i) { NEED(box[i] >= 1 && box[i] <= 256, "boxDim[%u] = %u is not in 1..256", i, box[i]) NEED(es[i] == 1, "elementStrides other than 1 in tile mode are not supported by the emulator") m.box[i] = u16(box[i]); }
  u32 inner = box[0] * type_bytes(dtype);
  static const u32 span[] = {0, 32, 64, 128};
  NEED(inner % 16 == 0, "the inner box of %u bytes is not a multiple of 16", inner)
  NEED(!swizzle || inner <= span[swizzle], "the inner box of %u bytes is wider than the swizzle of %u", inner, span[swizzle])
  memset(map, 0, 128); memcpy(map, &m, sizeof m);
  return 0;
}
extern "C" int ptx_encode_im2col(void* map, int dtype, u32 rank, const void* address, const u64* dims, const u64* strides, const int* lower, const int* upper, u32 channels, u32 pixels, const u32* es, int interleave, int swizzle, int l2, int oob) {
  TensorMap m; (void)l2;
  if (int r = encode_common(m, dtype, rank, address, dims, strides, es, interleave, swizzle, oob)) return r;
  NEED(u64(map) % 64 == 0, "the tensor map is not aligned to 64 bytes")
  NEED(rank >= 3, "im2col needs rank 3 to 5")
  static const int limit[] = {32768, 128, 16};
  for (u32 i = 0; i + 2 < rank; ++i) {
    int n = limit[rank - 3];
    NEED(lower[i] >= -n && lower[i] < n && upper[i] >= -n && upper[i] < n, "pixel box corner [%u] = %d, %d is not in [-%d, %d)", i, lower[i], upper[i], n, n)
    NEED(s64(dims[1 + i]) + upper[i] - lower[i] >= 1, "the bounding box along dimension %u is empty: %ld + %d - %d", i + 1, s64(dims[1 + i]), upper[i], lower[i])
    m.lower[i] = s16(lower[i]); m.upper[i] = s16(upper[i]);
  }
  NEED(channels >= 1 && channels <= 256, "channelsPerPixel = %u", channels)
  NEED(pixels >= 1 && pixels <= 1024, "pixelsPerColumn = %u", pixels)
  u32 inner = channels * type_bytes(dtype);
  static const u32 span[] = {0, 32, 64, 128};
  NEED(inner % 16 == 0, "channelsPerPixel takes %u bytes, not a multiple of 16", inner)
  NEED(!swizzle || inner <= span[swizzle], "channelsPerPixel takes %u bytes, more than the swizzle of %u", inner, span[swizzle])
  NEED(es[0] == 1, "elementStrides[0] is not 1")
  m.im2col = 1; m.channels = u16(channels); m.pixels = u16(pixels);
  memset(map, 0, 128); memcpy(map, &m, sizeof m);
  return 0;
}
