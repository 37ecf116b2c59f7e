// cp.async: copies of 4, 8 or 16 bytes a lane from global to shared memory.
#include "async_copy.h"

#include "decode.h"
#include "global_memory.h"
#include "lanes.h"
#include "shared_memory.h"

namespace emulator {
namespace {

void land(Warp& w, const AsyncCopy& copy, u32 mask) {  // the data arrives; it may be read after the wait
  for_lanes(mask, [&](int lane) {
    u8* to = w.cta->smem.data() + copy.to[lane];
    const u8 bytes = copy.source_bytes[lane];
    if (bytes) memcpy(to, reinterpret_cast<const u8*>(copy.from[lane]), bytes);
    memset(to + bytes, 0, copy.bytes - bytes);
  });
}

void issue(Context& c, const Instruction& op, u32 mask) {  // a: to, c: from, b: source bytes, p: ignore-src
  Warp& w = c.warp;
  Cta& cta = c.cta;
  AsyncCopy copy;
  copy.mask = mask;
  copy.bytes = op.copy_bytes;
  copy.line = op.line;
  const u32 ignored = op.p.exists() ? predicate(c, op.p) : 0;
  for_lanes(mask, [&](int lane) {
    const u32 to = shared_address(address_of(c, op, lane));
    const u64 from = lanes<u64>(c, op.c)[lane] + u64(i64(op.c_offset));
    const u32 given = op.b.exists() ? lanes<u32>(c, op.b)[lane] : copy.bytes;
    const u32 bytes = ignored >> lane & 1 ? 0 : given;
    if (bytes > copy.bytes) fault("cp.async: source size %u is larger than %u", bytes, copy.bytes);
    if (to % copy.bytes) fault("cp.async: shared address %u is not aligned to %u", to, copy.bytes);
    if (from % copy.bytes)
      fault("cp.async: global address %#lx is not aligned to %u (source size %u)", from, copy.bytes, bytes);
    if (bytes) global_memory(from, bytes, false);
    shared_bytes(cta, to, copy.bytes, "cp.async write");
    if (options.race) race_write(cta, w, to, copy.bytes, RaceWrite::kCheck);
    check_pending_stores(cta, to, copy.bytes);
    begin_copy_into(cta, to, copy.bytes, "cp.async");
    copy.to[lane] = to;
    copy.from[lane] = from;
    copy.source_bytes[lane] = u8(bytes);
    copy.group[lane] = w.copy_group[lane];
    counters.bytes_loaded += bytes;
  });
  copy.landed = c.launch.style == kEager || (c.launch.style == kRandom && c.launch.random() % 4 == 0);
  if (copy.landed) land(w, copy, mask);
  w.copies.push_back(copy);
}

void commit(Context& c, const Instruction&, u32 mask) {
  for_lanes(mask, [&](int lane) { c.warp.copy_group[lane]++; });
}

void wait(Context& c, const Instruction& op, u32 mask) {
  Warp& w = c.warp;
  Cta& cta = c.cta;
  const int pending = op.wait.pending;
  for (AsyncCopy& copy : w.copies) {
    u32 done = 0;
    for_lanes(copy.mask & mask, [&](int lane) {
      if (pending < 0 || i64(copy.group[lane]) < i64(w.copy_group[lane]) - pending) done |= 1u << lane;
    });
    if (!copy.landed) land(w, copy, done);
    for_lanes(done, [&](int lane) {
      end_copy_into(cta, copy.to[lane], copy.bytes);
      if (options.race) race_write(cta, w, copy.to[lane], copy.bytes, RaceWrite::kCheckAndRecord);
      mark_written(cta, &w, copy.to[lane], copy.bytes);
    });
    copy.mask &= ~done;
  }
  std::erase_if(w.copies, [](const AsyncCopy& copy) { return !copy.mask; });
}

}  // namespace

void land_some_copy(Warp& w) {
  if (w.copies.empty()) return;
  AsyncCopy& copy = w.copies[w.cta->launch->random() % w.copies.size()];
  if (!copy.landed) land(w, copy, copy.mask);
  copy.landed = true;
}

bool decode_async_copy(Decoder& d) {  // cp.async.cg.shared.global [to], [from], 16, bytes
  Instruction& op = d.op;
  const std::vector<std::string>& m = d.modifiers;
  if (m.size() < 2 || m[0] != "async") return false;
  if (m[1] == "commit_group") return d.run(commit);
  if (m[1] == "wait_group" || m[1] == "wait_all") {
    op.wait = {m[1] == "wait_all" ? -1 : d.integer(0), false};
    return d.run(wait);
  }
  if (m[1] != "ca" && m[1] != "cg") return false;
  d.address(0);
  const Operand& from = d.operand(1);
  if (from.kind != Operand::kAddress || from.reg.width != 8) return false;
  op.c = from.reg;
  op.c_offset = i32(from.offset);
  const int bytes = d.integer(2);
  if (bytes != 16 && (m[1] == "cg" || (bytes != 4 && bytes != 8))) return false;
  op.copy_bytes = u8(bytes);
  if (d.size() > 3) {
    const Operand& last = d.operand(3);
    const bool is_predicate = last.kind == Operand::kRegister && last.reg.width == 1;
    (is_predicate ? op.p : op.b) = d.source(3, is_predicate ? 1 : 4);
  }
  return d.run(issue);
}

}  // namespace emulator
