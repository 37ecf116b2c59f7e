// Branches, exits and barriers of a CTA.
#include "control.h"

#include <algorithm>

#include "decode.h"
#include "lanes.h"

namespace emulator {
namespace {

// The lanes in `leaving` go on elsewhere, or have ended; the others of the warp at the next instruction.
void diverge(Context& c, u32 staying) {
  for_lanes(staying, [&](int lane) { c.warp.lane_pc[lane] = c.next_pc; });
  c.warp.diverged = true;
  c.next_pc = kRegroup;
}

void branch(Context& c, const Instruction& op, u32 mask) {
  if (mask == c.warp.active) {
    c.next_pc = u32(op.target);
    return;
  }
  for_lanes(mask, [&](int lane) { c.warp.lane_pc[lane] = u32(op.target); });
  diverge(c, c.warp.active & ~mask);
}

void leave(Context& c, const Instruction&, u32 mask) {
  Warp& w = c.warp;
  w.live &= ~mask;
  w.active &= ~mask;
  if (w.active) {
    diverge(c, w.active);
  } else {
    c.next_pc = kRegroup;
  }
}

void trap(Context&, const Instruction&, u32) { fault("trap"); }

void nothing(Context&, const Instruction&, u32) {}

void complete(Cta& cta, Barrier& barrier) {
  for (int index : barrier.waiting) {
    Warp& w = cta.warps[index];
    const Instruction& op = *w.barrier;
    if (op.barrier.reduces) {
      if (op.barrier.reduction == Combine::kNone) {
        u32* d = lanes<u32>(w.registers, op.d);
        for_lanes(w.active, [&](int lane) { d[lane] = barrier.count; });
      } else {
        const bool result = op.barrier.reduction == Combine::kAnd ? barrier.all : barrier.any;
        set_predicate(w.registers, op.d, w.active, result ? ~0u : 0);
      }
    }
    w.clock = barrier.clock;
    w.clock[w.index]++;
    w.state = State::kRuns;
    w.synchronised = cta.epoch + 1;
  }
  cta.epoch++;
  barrier = Barrier{};
  counters.barriers++;
  cta.made_progress();
}

void wait_at_barrier(Context& c, const Instruction& op, u32 mask) {
  Warp& w = c.warp;
  Cta& cta = c.cta;
  if (mask != w.active || mask != w.live) fault("bar.sync by some lanes of a warp (%08x of %08x)", mask, w.live);
  const u32 id = lanes<u32>(c, op.a)[lowest(mask)];
  if (id > 15) fault("barrier %u", id);
  Barrier& barrier = cta.barriers[id];
  const u32 expected = op.b.exists() ? lanes<u32>(c, op.b)[lowest(mask)] : 0;
  if (expected % kWarpSize) fault("barrier count %u is no multiple of 32", expected);
  if (barrier.arrived && barrier.expected != expected)
    fault("barrier %u: counts %u and %u", id, barrier.expected, expected);
  if (!barrier.arrived) barrier.clock.assign(kClockEntries, 0);
  barrier.expected = expected;
  barrier.arrived += kWarpSize;
  merge(barrier.clock, w.clock);
  if (op.barrier.reduces) {
    const u32 votes = predicate(c, op.c, op.c_negated) & mask;
    barrier.all = barrier.all && votes == mask;
    barrier.any = barrier.any || votes;
    barrier.count += u32(count(votes));
  }
  if (op.barrier.arrive) {
    w.clock[w.index]++;
    cta.epoch++;
  } else {
    w.state = State::kAtBarrier;
    w.barrier = &op;
    barrier.waiting.push_back(w.index);
  }
  w.pc = c.next_pc;  // before it completes: the warp may run again at once
  check_barrier(cta, int(id));
}

}  // namespace

void check_barrier(Cta& cta, int id) {
  Barrier& barrier = cta.barriers[id];
  if (!barrier.arrived) return;
  const u32 expected = barrier.expected ? barrier.expected : kWarpSize * u32(cta.live_warps);
  if (barrier.arrived > expected)
    fault("barrier %d: %u threads arrived, %u were expected", id, barrier.arrived, expected);
  if (barrier.arrived == expected) complete(cta, barrier);
}

bool decode_branch(Decoder& d) { return d.run(branch); }
bool decode_exit(Decoder& d) { return d.run(leave); }
bool decode_trap(Decoder& d) { return d.run(trap); }

bool decode_barrier(Decoder& d) {  // bar.sync, bar.red.and.pred, barrier.cta.sync, bar.warp.sync
  Instruction& op = d.op;
  op.collective = true;
  if (d.has("cluster")) return d.run(nothing);  // of one CTA
  if (d.has("warp")) {
    op.member_mask = d.source(0, 4);
    return d.run(nothing);
  }
  if (d.has("sync") || d.has("arrive")) {
    op.barrier = {d.has("arrive"), false, Combine::kNone};
    op.a = d.source(0, 4);
    if (d.size() > 1) op.b = d.source(1, 4);
    return d.run(wait_at_barrier);
  }
  if (!d.has("red")) return false;
  op.barrier = {false, true, d.has("and") ? Combine::kAnd : d.has("or") ? Combine::kOr : Combine::kNone};
  op.d = d.destination(0, d.has("popc") ? 4 : 1);
  op.a = d.source(1, 4);
  if (d.size() == 4) op.b = d.source(2, 4);
  op.c = d.source(d.size() - 1, 1, op.c_negated);
  return d.run(wait_at_barrier);
}

}  // namespace emulator
